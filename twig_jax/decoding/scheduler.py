"""Continuous batching: questions arrive at any time, answers stream out, rows are used again."""

import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import replace

from twig_jax.decoding.buckets import Bucket
from twig_jax.decoding.generate import Generator
from twig_jax.decoding.running import Running
from twig_jax.decoding.settings import Request, Result, Settings


class Ticket:
    """One question on its way. Iterating yields its text piece by piece, and drives the scheduler.

    So it raises what `Scheduler.step` does, also where another question could not start; it can be
    iterated again.
    result: the answer once `done`; None if it was cancelled before its turn came, or could not
    start.
    """

    def __init__(self, scheduler: "Scheduler", request: Request) -> None:
        self.request = request
        self.result: Result | None = None
        self.done = False
        self._scheduler = scheduler

    @property
    def text(self) -> str:
        """What can be shown of the answer by now."""
        return self._scheduler.text(self)

    def cancel(self) -> None:
        """Ends it where it is; other answers are not disturbed."""
        self._scheduler.cancel(self)

    def __iter__(self) -> Iterator[str]:
        said = 0
        while True:
            done, text = self.done, self.text  # in this order: others may drive the scheduler too
            if len(text) > said:
                yield text[said:]
                said = len(text)
            elif done:
                return
            elif not self._scheduler.step() and not self.done:
                raise RuntimeError("the scheduler does not have this question")


class Scheduler:
    """Serves questions in the order they come, as many at once as the bucket has rows.

    One shape serves all: a question is prefilled alone and takes a free row of the running batch;
    nothing is compiled after the first answer. settings: of requests without their own, and the
    largest budget and gamma of any. chunk: iterations between two looks at who is through. Threads
    may share it: one at a time is in it. Raises ValueError for a chunk below 1, and as
    `Generator.idle` does.
    """

    def __init__(
        self, generator: Generator, settings: Settings, bucket: Bucket, chunk: int = 4
    ) -> None:
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1 iteration, not {chunk}")
        self.generator = generator
        self.settings = settings
        self.bucket = bucket
        self.chunk = chunk
        self._one = replace(bucket, rows=1)
        self._batch: Running = generator.idle(settings, bucket)
        self._queue: deque[Ticket] = deque()
        self._rows: list[Ticket | None] = [None] * bucket.rows
        self._lock = threading.RLock()

    def submit(self, request: Request) -> Ticket:
        """Takes a question into the queue.

        Raises ValueError for one that is bad or larger than the bucket, before anything runs.
        """
        prepared = self.generator.batches.prepare([request], self.settings, bucket=self._one)
        with self._lock:
            if prepared.program != self._batch.program:
                raise ValueError(
                    "a request may not have a larger budget or gamma than the scheduler's settings"
                )
            ticket = Ticket(self, request)
            self._queue.append(ticket)
        return ticket

    @property
    def running(self) -> list[Ticket]:
        """The questions that have a row."""
        return [ticket for ticket in self._rows if ticket is not None]

    def text(self, ticket: Ticket) -> str:
        """What can be shown of the answer to a question by now."""
        with self._lock:
            if ticket.result is not None:
                return ticket.result.text or ""
            return self._batch.text(self._rows.index(ticket)) if ticket in self._rows else ""

    def cancel(self, ticket: Ticket) -> None:
        """Ends a question, waiting or running."""
        with self._lock:
            if ticket in self._queue:
                self._queue.remove(ticket)
                ticket.done = True
            elif ticket in self._rows:
                self._batch.cancel(self._rows.index(ticket))
                self._deliver()

    def step(self) -> bool:
        """Fills free rows, decodes one chunk, delivers; False where there was nothing to do.

        Raises as `Generator.generate` does where a question cannot start: it is done, without a
        result, and the others go on with the next step. So do those that wait where a program is
        interrupted, as by Ctrl-C; those that ran are done then, without a result.
        """
        with self._lock:
            try:
                return self._step()
            except BaseException:
                if self._batch.lost:
                    for ticket in self.running:
                        ticket.done = True
                    self._rows = [None] * self.bucket.rows
                    self._batch = self.generator.idle(self.settings, self.bucket)
                raise

    def _step(self) -> bool:
        for b, ticket in enumerate(self._rows):
            if ticket is None and self._queue:
                following = self._queue.popleft()
                try:
                    alone = self.generator.start(
                        [following.request], self.settings, bucket=self._one
                    )
                    self._batch.insert(b, alone)
                    self._rows[b] = following
                except BaseException:
                    following.done = True  # without an answer; the others go on
                    self._batch.rows[b] = self._rows[b] = None
                    raise
        if not self.running:
            return False
        self._deliver()
        if self._batch.alive:
            self._batch.run(self.chunk)
            self._deliver()
        return True

    def run(self) -> None:
        """Serves until nobody waits."""
        while self.step():
            pass

    def _deliver(self) -> None:
        """Hands out the results of rows that are through."""
        through = [b for b, row in enumerate(self._batch.rows) if row is not None and row.done]
        if not through:
            return
        for b, result in zip(through, self._batch.results(through), strict=True):
            ticket = self._rows[b]
            assert ticket is not None
            ticket.result, ticket.done = result, True
            self._rows[b] = self._batch.rows[b] = None
