"""Speed of several modes side by side: interleaved calls, their medians, and the memory's floor."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from twig_jax.decoding.buckets import nbytes
from twig_jax.decoding.generate import Generator
from twig_jax.decoding.settings import Request, Result, Settings
from twig_jax.evaluation.scoring import ceiling


@dataclass(frozen=True)
class Speed:
    """One mode at one batch and answer length. Times are medians; an iteration is a step."""

    mode: str
    batch: int
    max_new_tokens: int
    prefill_ms: float  # images, prompt and the first step, on the device
    first_token_ms: float  # from the call until first tokens can be read
    token_ms: float  # what each further token of a row adds
    tokens_per_s: float  # of all rows, over the whole call
    relspd: float | None  # plain's time over this mode's, call by call
    step_ms: float | None  # None where the first step was all
    floor_step_ms: float  # its weights and caches, read once where they are needed
    floor_share: float | None
    tokar: float | None
    mean_drafted: float
    mean_accepted: float
    ceiling: float | None
    first_call_s: float  # with compilation


class _Call(NamedTuple):
    results: list[Result]
    first_s: float
    total_s: float


def measure(
    generator: Generator,
    requests: Sequence[Request],
    settings: Mapping[str, Settings],
    repeats: int,
    bandwidth: float,
) -> list[Speed]:
    """Runs every mode in turn, `repeats` times, after one call each that compiles.

    settings: of each mode, all with one max_new_tokens. bandwidth: in bytes/s, for the floor.
    """
    compiled, caches = {}, {}
    for mode, one in settings.items():
        began = time.perf_counter()
        running = generator.start(requests, one)
        caches[mode] = {k: nbytes(v) for k, v in running.state.caches._asdict().items()}
        generator.finish(running)
        compiled[mode] = time.perf_counter() - began
    calls: dict[str, list[_Call]] = {mode: [] for mode in settings}
    for _ in range(repeats):
        for mode, one in settings.items():
            calls[mode].append(_timed(generator, requests, one))
    return [
        _speed(generator, one, calls[mode], calls.get("plain"), caches[mode], bandwidth, compiled)
        for mode, one in settings.items()
    ]


def _timed(generator: Generator, requests: Sequence[Request], settings: Settings) -> _Call:
    began = time.perf_counter()
    running = generator.start(requests, settings)
    first = time.perf_counter() - began
    results = generator.finish(running)
    return _Call(results, first, time.perf_counter() - began)


def _speed(
    generator: Generator,
    settings: Settings,
    calls: Sequence[_Call],
    plain: Sequence[_Call] | None,
    caches: Mapping[str, int],
    bandwidth: float,
    compiled: Mapping[str, float],
) -> Speed:
    results = calls[0].results  # greedy: all calls have the same
    emitted = [len(r.tokens) + (r.stopped_by == "eos") for r in results]
    steps = max(len(r.matched) for r in results) - 1  # the first one belongs to prefill
    drafted = sum(len(d) for r in results for d in r.drafts)
    levels = sum(sum(r.levels) for r in results)
    matched = sum(int(r.matched.sum()) for r in results)
    rounds = sum(len(r.matched) for r in results)
    first = statistics.median(c.first_s for c in calls)
    total = statistics.median(c.total_s for c in calls)
    decoding = statistics.median(c.results[0].decode_s for c in calls)
    step = decoding / steps if steps else None
    floor = _step_bytes(generator, caches, levels / rounds) / bandwidth
    twig = generator.twig_config
    return Speed(
        mode=settings.mode,
        batch=len(results),
        max_new_tokens=settings.max_new_tokens,
        prefill_ms=1e3 * statistics.median(c.results[0].prefill_s for c in calls),
        first_token_ms=1e3 * first,
        token_ms=1e3 * (total - first) / max(max(emitted) - 1, 1),
        tokens_per_s=sum(emitted) / total,
        relspd=None
        if plain is None
        else statistics.median(p.total_s / c.total_s for p, c in zip(plain, calls, strict=True)),
        step_ms=None if step is None else 1e3 * step,
        floor_step_ms=1e3 * floor,
        floor_share=None if step is None else floor / step,
        tokar=matched / drafted if drafted else None,
        mean_drafted=drafted / rounds,
        mean_accepted=matched / rounds,
        ceiling=None
        if twig is None
        else ceiling(twig, generator.config.text.num_layers, levels / rounds, matched / rounds),
        first_call_s=compiled[settings.mode],
    )


def _step_bytes(generator: Generator, caches: Mapping[str, int], levels: float) -> float:
    """Bytes that one step reads: base and caches once, trunk and twig again for every level."""
    text = generator.weights.base["text"]
    sizes = {name: nbytes(tree) for name, tree in text.items() if name != "embed_tokens"}
    twig = generator.twig_config
    base = sum(sizes.values()) + caches["trunk"] + caches["deep"]
    if twig is None or not levels:
        return base
    trunk = sum(sizes[f"layers_{i}"] for i in range(twig.K)) + caches["trunk"]
    return base + levels * (trunk + nbytes(generator.weights.twig) + caches["twig"])
