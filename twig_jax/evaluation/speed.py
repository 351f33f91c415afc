"""Speed of several ways to answer side by side: interleaved calls, their medians, and floors."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np

from twig_jax.config import LlavaConfig
from twig_jax.decoding import cost
from twig_jax.decoding.cost import Drafting, Machine
from twig_jax.decoding.generate import Generator, compiled_programs
from twig_jax.decoding.settings import Request, Result, Settings
from twig_jax.evaluation.scoring import acceptance
from twig_jax.programs import working_memory


@dataclass(frozen=True)
class Speed:
    """One way at one batch and answer length. Times are medians; an iteration is a step.

    Floors are those of cost.py; a share is the floor over the time.
    """

    way: str
    mode: str
    pruned: float  # share of an image's tokens that an average layer does not see
    batch: int
    max_new_tokens: int
    vision_ms: float  # images alone, on the device; the same for all ways
    vision_share: float
    prefill_ms: float  # images, prompt and the first step, on the device
    prefill_share: float
    first_token_ms: float  # from the call until first tokens can be read
    token_ms: float | None  # what each token adds after those of the first step; None without any
    tokens_per_s: float  # of all rows, over the whole call
    relspd: float | None  # plain's time over this way's, call by call
    predicted_relspd: float  # the same of the floors, with the drafts that were accepted
    step_ms: float | None  # None where the first step was all
    floor_step_ms: float
    floor_share: float | None
    tokar: float | None
    mean_drafted: float
    mean_accepted: float
    agreement: float | None  # share of tokens equal to those of the same pruning without drafts
    peak_bytes: int  # weights, caches and intermediate results of the larger program
    first_call_s: float  # with compilation, or loading what an earlier run left on disk
    cached_call_s: float | None  # with loading from disk; None where it was not measured
    recompiled: int  # programs compiled while all ways were timed


class Call(NamedTuple):
    """Answers, and the seconds until their first tokens and until their last could be read."""

    results: list[Result]
    first_s: float
    total_s: float


def measure(
    generator: Generator,
    requests: Sequence[Request],
    ways: Mapping[str, Settings],
    repeats: int,
    machine: Machine,
    *,
    restart: bool = False,
) -> list[Speed]:
    """Runs every way in turn, `repeats` times, after one call each that compiles.

    ways: all with one max_new_tokens, which every answer reaches. restart: drops all compiled
    programs after the first calls, to measure how long calls take that load them.
    """
    compiled = {way: timed(generator, requests, one).total_s for way, one in ways.items()}
    loaded: dict[str, float] = {}
    if restart:
        jax.clear_caches()
        loaded = {way: timed(generator, requests, one).total_s for way, one in ways.items()}
    vision = _vision(generator, requests, repeats)
    calls: dict[str, list[Call]] = {way: [] for way in ways}
    before = compiled_programs()
    for _ in range(repeats):
        for way, one in ways.items():
            calls[way].append(timed(generator, requests, one))
    recompiled = compiled_programs() - before
    return [
        _speed(
            generator,
            requests,
            ways,
            way,
            calls,
            machine,
            vision_ms=1e3 * vision,
            first_call_s=compiled[way],
            cached_call_s=loaded.get(way),
            recompiled=recompiled,
        )
        for way in ways
    ]


def _speed(
    generator: Generator,
    requests: Sequence[Request],
    ways: Mapping[str, Settings],
    way: str,
    calls: Mapping[str, Sequence[Call]],
    machine: Machine,
    *,
    vision_ms: float,
    first_call_s: float,
    cached_call_s: float | None,
    recompiled: int,
) -> Speed:
    settings, mine, rows = ways[way], calls[way], len(requests)
    results = mine[0].results  # greedy: all calls have the same
    told, levels = acceptance(results), _deepest(results)
    emitted = [r.emitted for r in results]
    further = max(r.emitted - int(r.matched[0]) - 1 for r in results)
    steps = max(len(r.matched) for r in results) - 1  # the first one belongs to prefill
    first = statistics.median(c.first_s for c in mine)
    total = statistics.median(c.total_s for c in mine)
    prefill_ms = 1e3 * statistics.median(c.results[0].prefill_s for c in mine)
    decode_ms = 1e3 * statistics.median(max(r.decode_s for r in c.results) for c in mine)
    step_ms = decode_ms / steps if steps else None

    given, plain = (
        cost.shapes(generator.batches.prepare(requests, one).program, rows, generator.weights)
        for one in (settings, replace(settings, mode="plain"))
    )
    vision_floor = 1e3 * cost.seconds(cost.encoding(given), machine)
    prompt_floor = 1e3 * cost.seconds(cost.prompt(given, levels), machine)
    step_floor = 1e3 * cost.seconds(cost.step(given, levels), machine)
    new = settings.max_new_tokens
    drafting = Drafting(levels, told.accepted)
    slow = cost.answer(plain, machine, new, Drafting())
    fast = cost.answer(given, machine, new, drafting)

    return Speed(
        way=way,
        mode=settings.mode,
        pruned=_pruned(generator, settings),
        batch=rows,
        max_new_tokens=new,
        vision_ms=vision_ms,
        vision_share=vision_floor / vision_ms,
        prefill_ms=prefill_ms,
        prefill_share=(vision_floor + prompt_floor) / prefill_ms,
        first_token_ms=1e3 * first,
        token_ms=1e3 * (total - first) / further if further else None,
        tokens_per_s=sum(emitted) / total,
        relspd=None
        if "plain" not in calls
        else statistics.median(
            p.total_s / c.total_s for p, c in zip(calls["plain"], mine, strict=True)
        ),
        predicted_relspd=slow / fast,
        step_ms=step_ms,
        floor_step_ms=step_floor,
        floor_share=None if step_ms is None else step_floor / step_ms,
        tokar=told.tokar if told.drafted else None,
        mean_drafted=told.drafted,
        mean_accepted=told.accepted,
        agreement=next(
            (
                _agreement(results, calls[other][0].results)
                for other, one in ways.items()
                if settings.draft and not one.draft and _pruning(one) == _pruning(settings)
            ),
            None,
        ),
        peak_bytes=max(map(_peak, generator.compiled(requests, settings).values())),
        first_call_s=first_call_s,
        cached_call_s=cached_call_s,
        recompiled=recompiled,
    )


def _peak(program: Any) -> int:
    """Bytes of a compiled program on one device."""
    return int(program.memory_analysis().argument_size_in_bytes + working_memory(program))


def random_requests(config: LlavaConfig, rows: int, text_tokens: int) -> list[Request]:
    """Prompts of random words, `text_tokens` each, around one image of noise."""
    M, size = config.vision.num_tokens, config.vision.image_size
    rng = np.random.default_rng(0)
    text = rng.integers(4, config.text.vocab_size - 1, (rows, text_tokens))
    text += text == config.image_token_id  # no word is an image's
    requests = []
    for row in text.astype(np.int32):
        ids = np.concatenate([row[:2], np.full(M, config.image_token_id, np.int32), row[2:]])
        is_visual = np.repeat([False, True, False], [2, M, text_tokens - 2])
        pixels = rng.normal(size=(1, size, size, 3)).astype(np.float32)
        requests.append(Request(ids, is_visual, pixels=pixels))
    return requests


def check_room(config: LlavaConfig, prompt: int, new: int) -> None:
    """Raises ValueError where answers of so many tokens would end before, for want of positions."""
    positions = config.text.max_positions
    if prompt + new > positions:
        raise ValueError(
            f"prompts of {prompt} tokens and answers of {new} are more than the {positions} "
            "positions that the model knows"
        )


def timed(generator: Generator, requests: Sequence[Request], settings: Settings) -> Call:
    """One call."""
    began = time.perf_counter()
    running = generator.start(requests, settings)
    first = time.perf_counter() - began
    results = generator.finish(running)
    return Call(results, first, time.perf_counter() - began)


def _vision(generator: Generator, requests: Sequence[Request], repeats: int) -> float:
    """Seconds of the vision tower on all images, after a call that compiles."""
    pixels = [x for r in requests if r.pixels is not None for x in r.pixels]
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(generator.images(pixels))
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def _pruning(settings: Settings) -> float | None:
    return settings.avg_retained if settings.prune else None


def _pruned(generator: Generator, settings: Settings) -> float:
    average, M = _pruning(settings), generator.config.vision.num_tokens
    return 0.0 if average is None else 1 - average / M


def _deepest(results: Sequence[Result]) -> float:
    """Levels that iterations drafted on average: a batch drafts until its last row stops."""
    each = [r.levels for r in results]
    most = max(map(len, each))
    return float(np.mean([max(row[i] for row in each if i < len(row)) for i in range(most)]))


def _agreement(results: Sequence[Result], others: Sequence[Result]) -> float:
    """Share of tokens that two sets of answers have in common, place by place."""
    same = [r.tokens == o.tokens for r, o in zip(results, others, strict=True)]
    return float(np.concatenate(same).mean())
