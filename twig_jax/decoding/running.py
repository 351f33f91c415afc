"""A batch in flight: programs run on the device, answers are read and ended on the host."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from twig_jax.decoding.cache import State, Trace
from twig_jax.decoding.network import Program
from twig_jax.decoding.prefill import Signals
from twig_jax.decoding.settings import Request, Result
from twig_jax.decoding.transcript import Transcript
from twig_jax.sharding.placement import gather

if TYPE_CHECKING:
    from twig_jax.decoding.generate import Generator


@dataclass
class Row:
    """One answer of a batch in flight."""

    request: Request
    transcript: Transcript
    signals: Signals  # of the batch the row came with, at index `of`
    of: int
    began: float  # when its prefill began and ended, by time.perf_counter
    prefilled: float
    stopped_by: str | None = None
    ended: float = 0.0

    @property
    def done(self) -> bool:
        """Whether nothing follows."""
        return self.stopped_by is not None


class Running:
    """Rows decoding together. `rows[b]` is None where nobody has taken the place."""

    def __init__(
        self, generator: "Generator", program: Program, state: State, rows: Sequence[Row | None]
    ) -> None:
        self.generator = generator
        self.program = program
        self.state = state
        self.rows = list(rows)
        self._stop = np.zeros(len(self.rows), bool)
        self._read()

    @property
    def alive(self) -> bool:
        """Whether any row goes on."""
        return any(row is not None and not row.done for row in self.rows)

    @property
    def lost(self) -> bool:
        """Whether an interruption left nothing to go on with: programs reuse their arguments."""
        return self.state.n.is_deleted()

    def run(self, iterations: int) -> None:
        """Lets every row decode for so many iterations, or until all are done."""
        stop, self._stop = self._stop, np.zeros_like(self._stop)
        self.state = self.generator.decode(self.program, self.state, stop, iterations)
        self._read()

    def insert(self, b: int, other: "Running") -> None:
        """Puts the only row of another batch of the same program into a free place."""
        (row,) = other.rows
        self.state = self.generator.insert(self.state, b, other.state)
        self.rows[b] = row
        self._stop[b] = other._stop[0]

    def cancel(self, b: int) -> None:
        """Ends a row where it is."""
        row = self.rows[b]
        if row is not None and not row.done:
            self._end(b, row, "cancelled")

    def text(self, b: int) -> str:
        """What can be shown of a row's answer by now."""
        row = self.rows[b]
        return "" if row is None else row.transcript.text

    def results(self, which: Sequence[int] | None = None) -> list[Result]:
        """Results of the rows that are taken, or of those in `which`."""
        chosen = (
            [b for b, row in enumerate(self.rows) if row is not None] if which is None else which
        )
        traces, iterations = gather((self.state.trace, self.state.iterations))
        signals: dict[int, Any] = {}
        out = []
        for b in chosen:
            row = self.rows[b]
            assert row is not None
            if id(row.signals) not in signals:
                seen = row.signals
                signals[id(row.signals)] = gather((seen.scores, seen.kept))
            scores, kept = (x[row.of].copy() for x in signals[id(row.signals)])
            size, rounds = len(row.transcript.tokens), int(iterations[b])
            trace = jax.tree.map(lambda x, b=b: x[b].copy(), traces)  # not those of all rows
            emitted = np.cumsum(trace.matched[:rounds] + 1)
            if row.transcript.stopped:  # later drafts, of before anybody looked, answer nothing
                rounds = 1 + int(np.searchsorted(emitted, row.transcript.read))
            own = np.isin(np.arange(size), emitted - 1)  # what an iteration ends with is the base's
            length, is_visual = len(row.request.ids), row.request.is_visual
            kept = kept[kept < length]
            out.append(
                Result(
                    tokens=row.transcript.tokens,
                    text=row.transcript.text if self.generator.detokenize else None,
                    stopped_by=row.stopped_by or "",
                    accepted=~own,
                    drafts=_ragged(trace, trace.drafts, rounds),
                    parents=_ragged(trace, trace.parents, rounds),
                    probs=_ragged(trace, trace.probs, rounds),
                    matched=trace.matched[:rounds],
                    kept=kept[is_visual[kept]],
                    scores=scores[:length],
                    prefill_s=row.prefilled - row.began,
                    decode_s=(row.ended if row.done else time.perf_counter()) - row.prefilled,
                )
            )
        return out

    def _read(self) -> None:
        """Takes over what the device has produced, and ends rows that are through."""
        tokens, n, done = gather((self.state.tokens, self.state.n, self.state.done))
        for b, row in enumerate(self.rows):
            if row is None or row.done:
                continue
            emitted = tokens[b, : n[b]].copy()
            by_eos = n[b] > 0 and emitted[-1] == self.generator.config.eos_token_id
            row.transcript.update(emitted[:-1] if by_eos else emitted, ended=bool(done[b]))
            if row.transcript.stopped:
                self._end(b, row, "stop")
            elif done[b]:
                self._end(b, row, "eos" if by_eos else "length")

    def _end(self, b: int, row: Row, why: str) -> None:
        row.stopped_by, row.ended = why, time.perf_counter()
        row.transcript.end()
        self._stop[b] = True


def _ragged(trace: Trace, values: np.ndarray, rounds: int) -> list[np.ndarray]:
    counts = (trace.drafts[:rounds] >= 0).sum(1)
    return [values[i, :count] for i, count in enumerate(counts)]
