"""From requests to results: buckets, compiled programs, timings."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from twig_jax.config import LlavaConfig, TwigConfig
from twig_jax.decoding.batch import Batches, Prepared
from twig_jax.decoding.buckets import Bucket
from twig_jax.decoding.cache import State, idle, insert
from twig_jax.decoding.images import ImageEncoder, encode, place, upload
from twig_jax.decoding.loop import decode
from twig_jax.decoding.network import Program, Weights, drafting_in_int8
from twig_jax.decoding.prefill import Past, Signals, prefill
from twig_jax.decoding.running import Row, Running
from twig_jax.decoding.settings import Request, Result, Settings, controls
from twig_jax.decoding.transcript import Detokenize, Transcript
from twig_jax.models.cpu import arrange
from twig_jax.models.llava import Params
from twig_jax.pruning.schedule import Schedule, by_twig
from twig_jax.sharding.placement import distribute, gather, put
from twig_jax.sharding.rules import partition

_log = logging.getLogger(__name__)

_UNBOUNDED = 2**30
_MEASURED = 6  # iterations a timing of adaptive drafting is over
_STOP_CHUNK = 8  # iterations between two looks for stops, where nobody watches

# Compilers for GPUs can make one product of those with one input (queries, keys and values; gate
# and up). Of few tokens it reads all weights as they lie, however large; for whole prompts the
# weights would be put together in memory first. Other compilers do not look at it.
jitted_prefill = jax.jit(
    prefill, static_argnums=0, compiler_options={"xla_gpu_dot_merger_threshold_mb": 0}
)
jitted_decode = jax.jit(
    decode,
    static_argnums=0,
    donate_argnums=2,
    compiler_options={"xla_gpu_dot_merger_threshold_mb": 512},
)
_insert = jax.jit(insert, donate_argnums=0)
_idle = jax.jit(idle, static_argnums=1)


@dataclass(frozen=True)
class Compiled:
    """What warming up one bucket took."""

    bucket: Bucket
    programs: int
    seconds: float


class Generator:
    """A base with its twig, ready to answer; compiled programs are kept per bucket.

    A twig_config without a twig says at which layers visual tokens are pruned by other scores;
    schedule, instead of both, is any other way to prune. buckets: the shapes there are programs
    for; a batch takes the smallest it fits into. Without any, each batch is rounded up to a shape
    of its own. mesh: what to spread over, with the axes of sharding/mesh.py; all processes of
    several hosts make the same calls. detokenize: tokens -> text, for texts in results and stops.
    remembered_images: how many images' embeddings are kept, by content. draft_cost: how many plain
    steps each level of drafts adds to an iteration, for adaptive drafting; None to measure it.
    int8_drafts: the twig drafts in int8, which changes no answer; see models/int8.py, also for a
    base in int8. On CPUs `weights` are arranged; see models/cpu.py, which restores them too.
    """

    def __init__(
        self,
        config: LlavaConfig,
        base: Params,
        twig_config: TwigConfig | None = None,
        twig: Params | None = None,
        *,
        schedule: Schedule | None = None,
        buckets: Sequence[Bucket] = (),
        mesh: Mesh | None = None,
        detokenize: Detokenize | None = None,
        remembered_images: int = 0,
        draft_cost: float | None = None,
        int8_drafts: bool = False,
    ) -> None:
        if twig_config is not None and twig is None:
            twig_config = replace(twig_config, T=0)
            twig_config.check_schedule(config.text.num_layers)
        elif twig_config is not None:
            twig_config.check(config.text.num_layers)
        if schedule is not None and twig_config is not None:
            raise ValueError("a twig prunes by its own schedule: give one of the two")
        self.config = config
        self.twig_config = twig_config
        self.schedule = schedule or (None if twig_config is None else by_twig(twig_config))
        if int8_drafts and twig is None:
            raise ValueError("there is no twig to draft in int8: give one, or leave int8 out")
        weights = drafting_in_int8(base, twig) if int8_drafts else Weights(base, twig)
        weights = arrange(weights)
        if mesh is not None:
            weights = distribute(weights, mesh)
        self.weights = weights
        self.mesh = mesh
        self.detokenize = detokenize
        self.batches = Batches(
            config,
            weights,
            twig_config,
            self.schedule,
            tuple(buckets),
            detokenize is not None,
            mesh,
        )
        self.draft_cost = draft_cost
        self.images = ImageEncoder(config, weights, remembered_images)
        self._costs: dict[tuple[Program, int], np.ndarray] = {}
        self._known: set[tuple[Program, tuple[int, ...], bool]] = set()

    def generate(
        self,
        requests: Sequence[Request],
        settings: Settings,
        watch: Callable[[Running], Any] | None = None,
    ) -> list[Result]:
        """Answers one batch, in order.

        watch: is given the running batch after every iteration; the tokens do not depend on it.
        Raises ValueError for bad settings or requests, before anything runs: an unknown mode or
        selector, a budget without solution, a mode that needs a twig without one, image slots that
        do not match the images, a batch larger than all declared buckets; and MemoryError for a
        batch that does not fit into the device's memory.
        """
        return self.finish(self.start(requests, settings), watch)

    def finish(
        self, running: Running, watch: Callable[[Running], Any] | None = None
    ) -> list[Result]:
        """Lets a batch decode to its end; watch as in `generate`.

        Raises nothing of its own: `start` has refused what cannot be answered.
        """
        stops = any(row is not None and row.transcript.can_stop for row in running.rows)
        chunk = 1 if watch is not None else _STOP_CHUNK if stops else _UNBOUNDED
        while True:
            if watch is not None:
                watch(running)
            if not running.alive:
                return running.results()
            running.run(chunk)

    def generate_many(
        self,
        requests: Sequence[Request],
        settings: Settings,
        batch: int | None = None,
        told: Callable[[int, Result], Any] = lambda *_: None,
    ) -> list[Result]:
        """Answers any number of requests in batches of like lengths; results in the given order.

        The longest come first, and the last batch is filled up: it needs no program of its own.
        batch: None for 32, or the most rows of a declared bucket. told: is given (index, result) of
        each as it is there. Raises as `generate` does, for any of them before the first one runs.
        """
        if batch is None:
            batch = max((bucket.rows for bucket in self.batches.buckets), default=32)
        if batch < 1:
            raise ValueError(f"batch must be at least 1 request, not {batch}")
        need = [self.batches.need(i, r, settings) for i, r in enumerate(requests)]
        order = sorted(range(len(requests)), key=lambda i: need[i], reverse=True)
        parts = [order[first : first + batch] for first in range(0, len(order), batch)]
        if len(parts) > 1:
            parts[-1] += parts[-1][-1:] * (batch - len(parts[-1]))
        for part in parts:
            self.batches.prepare([requests[i] for i in part], settings)
        results: list[Result | None] = [None] * len(requests)
        for part in parts:
            found = self.generate([requests[i] for i in part], settings)
            for i, result in dict(zip(part, found, strict=True)).items():  # once each
                results[i] = result
                told(i, result)
        return [result for result in results if result is not None]

    def start(
        self,
        requests: Sequence[Request],
        settings: Settings,
        *,
        bucket: Bucket | None = None,
        past: Callable[[Program], Past] | None = None,
        resumes: bool = False,
    ) -> Running:
        """Prefills a batch: what `generate` does before its loop.

        bucket: None to choose one. past: gives the tokens that requests have `before`, in the shape
        of a program. resumes: what another turn needs is kept. Raises as `generate` does, and
        ValueError for a request that continues a past without one.
        """
        if past is None and any(r.before for r in requests):
            raise ValueError("a request with `before` continues an earlier turn: ask in a Session")
        prepared = self.batches.prepare(requests, settings, bucket=bucket, resumes=resumes)
        began = time.perf_counter()
        earlier = None if past is None else past(prepared.program)
        state, signals = self.prefill(prepared, requests, earlier)
        jax.block_until_ready(state.n)
        now = time.perf_counter()
        rows: list[Row | None] = [
            Row(request, Transcript(own, self.detokenize), signals, b, began, now)
            for b, (request, own) in enumerate(zip(requests, prepared.settings, strict=True))
        ]
        rows += [None] * (prepared.bucket.rows - len(rows))
        return Running(self, prepared.program, state, rows)

    def idle(self, settings: Settings, bucket: Bucket) -> Running:
        """A batch of free rows, to `insert` into; needs no programs but those of a single row.

        They are compiled, also for as many images as the bucket has. Raises as `generate` does.
        """
        nobody = Request(np.zeros(1, np.int32), np.zeros(1, bool), scores=np.zeros(1, np.float32))
        one = self.start([nobody], settings, bucket=replace(bucket, rows=1))
        self._cost(self.batches.prepare([nobody], settings, bucket=bucket))
        with self.context():
            self.images.warm_up(bucket.images)
            state = _idle(one.state, bucket.rows)
        return Running(self, one.program, state, [None] * bucket.rows)

    def warm_up(self, settings: Settings, buckets: Sequence[Bucket] = ()) -> list[Compiled]:
        """Compiles all that a mode needs for the declared buckets, or for those given, ahead.

        settings: those of the calls to come, as their mode, tree and `adaptive`, avg_retained and
        gamma are the program's. Requests' own avg_retained and gamma may be smaller; all else of
        settings compiles nothing. With jax's persistent compilation cache later starts only load
        the programs. Raises as `generate` does.
        """
        report = []
        for bucket in buckets or self.batches.buckets:
            began, before = time.perf_counter(), compiled_programs()
            size = self.config.vision.image_size
            M = self.config.vision.num_tokens
            # Of a bucket's images not all may fit into the positions that the model knows.
            images = min(bucket.images, (self.config.text.max_positions - 2) // M)
            ids = np.full(1 + images * M, self.config.bos_token_id, np.int32)
            request = Request(
                ids,
                np.arange(len(ids)) < len(ids) - 1,
                pixels=np.zeros((images, size, size, 3), np.float32),
                scores=np.zeros(len(ids), np.float32),
            )
            with self.context():
                self.images.warm_up(bucket.rows * bucket.images)
            own = replace(settings, max_new_tokens=bucket.new, min_new_tokens=0)
            running = self.start([replace(request, settings=own)] * bucket.rows, own, bucket=bucket)
            running.run(1)
            jax.block_until_ready(running.state.n)
            seconds = time.perf_counter() - began
            report.append(Compiled(bucket, compiled_programs() - before, seconds))
        return report

    def compiled(self, requests: Sequence[Request], settings: Settings) -> dict[str, Any]:
        """A batch's two programs, "prefill" and "decode", as they are compiled, to be looked at.

        Raises as `generate` does.
        """
        prepared = self.batches.prepare(requests, settings)
        program, weights, *rest = self._prompt(prepared, requests, None)
        stop: Any = np.zeros(prepared.bucket.rows, bool)
        with self.context():
            first = jitted_prefill.lower(program, weights, *rest)
            state, _ = first.out_info
            cost = self._cost(prepared)
            loop = jitted_decode.lower(program, weights, state, stop, cost, _UNBOUNDED)
            return {"prefill": first.compile(), "decode": loop.compile()}

    # What a running batch asks for.

    def prefill(
        self, prepared: Prepared, requests: Sequence[Request], past: Past | None = None
    ) -> tuple[State, Signals]:
        """Runs the prompts of a batch, and their first drafts."""
        self._announce(prepared, past)
        arguments = self._prompt(prepared, requests, past)
        with self.context():
            return jitted_prefill(*arguments)

    def decode(self, program: Program, state: State, stop: np.ndarray, most: int) -> State:
        """Runs the loop for `most` iterations. The state's buffers are reused."""
        cost = self._costs[program, len(stop)]
        with self.context():
            return jitted_decode(program, self.weights, state, stop, cost, most)

    def insert(self, state: State, row: int, other: State) -> State:
        """Replaces a row by row 0 of another state. The first state's buffers are reused."""
        with self.context():
            return _insert(state, row, other)

    def _prompt(self, prepared: Prepared, requests: Sequence[Request], past: Past | None) -> Any:
        """What `prefill` is called with."""
        cost = self._cost(prepared)
        with self.context():
            bucket = prepared.bucket
            visual = self.images.embed(requests, bucket.rows, bucket.images)
            inputs = self._spread(prepared.inputs._replace(visual=visual))
            rows = self._spread(prepared.controls)
        return prepared.program, self.weights, inputs, rows, cost, past

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """Where programs are traced and run: on the mesh, with 32 bits whatever the default is."""
        with jax.enable_x64(False), contextlib.ExitStack() as stack:
            if self.mesh is not None:
                stack.enter_context(jax.set_mesh(self.mesh))
            yield

    def _spread(self, tree: Any) -> Any:
        """Host arrays, their rows over the mesh's data axes."""
        if self.mesh is None:
            return tree
        mesh = self.mesh
        return jax.tree.map(
            lambda x: put(x, NamedSharding(mesh, partition(x.shape, ("rows",), mesh))), tree
        )

    def _announce(self, prepared: Prepared, past: Past | None) -> None:
        """Says in the log which bucket is about to be compiled."""
        shape = prepared.inputs.tokens.shape  # of later turns as long as they are, see `Batches`
        key = (prepared.program, shape, past is not None)
        if key not in self._known:
            self._known.add(key)
            turns = "" if past is None else "a later turn in "
            _log.info("compiling for %s%s", turns, prepared.bucket)

    def _cost(self, prepared: Prepared) -> np.ndarray:
        """What drafting 0 .. D levels adds to an iteration, in plain steps; see adaptive.py.

        Zeros where drafting is not adaptive; otherwise what `draft_cost` says, or measured once a
        program, by drafting none, one and all levels in a few iterations each.
        """
        program, rows = prepared.program, prepared.bucket.rows
        key = (program, rows)
        if key in self._costs:
            return self._costs[key]
        cost = np.zeros(program.tree.depth + 1, np.float32)
        if program.adaptive and self.draft_cost is not None:
            cost += np.arange(len(cost)) * self.draft_cost
        self._costs[key] = cost
        if program.adaptive and self.draft_cost is None:
            try:
                cost = self._costs[key] = self._measured(prepared)
            except BaseException:
                del self._costs[key]  # no costs, under which it was to be measured
                raise
            _log.info("an iteration that drafts costs %s plain steps", np.round(cost + 1, 2))
        return cost

    def _measured(self, prepared: Prepared) -> np.ndarray:
        program, rows = prepared.program, prepared.bucket.rows
        deepest = program.tree.depth
        # Whole prompts, also where the requests continue a past.
        whole = rows, program.prompt_slots
        blank = jax.tree.map(np.zeros_like, prepared.inputs)._replace(
            tokens=np.zeros(whole, np.int32),
            is_visual=np.zeros(whole, bool),
            lengths=np.ones(rows, np.int32),
        )
        times = {}
        for levels in sorted({0, 1, deepest}):
            forced = Settings(max_new_tokens=program.max_new, gamma=levels, theta=0.0)
            every = controls([forced] * rows, eos=-1)
            quickest = np.inf
            for _ in range(4):  # the first compiles
                state, _ = self.prefill(replace(prepared, inputs=blank, controls=every), [])
                before = gather(state.iterations)
                began = time.perf_counter()
                state = self.decode(program, state, np.zeros(rows, bool), _MEASURED)
                steps = int((gather(state.iterations) - before).max())
                quickest = min(quickest, (time.perf_counter() - began) / max(steps, 1))
            times[levels] = quickest
        cost = np.interp(np.arange(deepest + 1), list(times), list(times.values())) / times[0] - 1
        cost = np.maximum.accumulate(np.maximum(cost, 0)).astype(np.float32)
        if self.mesh is not None and len({d.process_index for d in self.mesh.devices.flat}) > 1:
            cost = multihost_utils.broadcast_one_to_all(cost)
        return cost


def compiled_programs() -> int:
    """How many programs this process has compiled for decoding."""
    jitted: tuple[Any, ...] = (jitted_prefill, jitted_decode, _insert, _idle, encode, upload, place)
    return sum(f._cache_size() for f in jitted)
