"""Interleaved timings: every accelerated call right after a plain one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from twig_jax.decoding.settings import Result
from twig_jax.evaluation.scoring import acceptance, tokens_per_s

Call = Callable[[int], Result]  # answers sample i


@dataclass(frozen=True)
class Timed:
    """Timings of one way to answer and of the plain calls beside it; medians over repeats."""

    results: list[Result]
    speeds: np.ndarray  # tokens/s [samples]
    first: np.ndarray  # seconds until the first tokens [samples]
    plain_results: list[Result]
    plain_speeds: np.ndarray  # the same of the plain calls right before
    plain_first: np.ndarray

    def figures(self) -> dict[str, Any]:
        """For result files.

        tokens_per_s: the mean of the samples' (the paper's speed), tokens_per_s_total: all tokens
        over all time. relspd: the first over plain's. first_token_s, and relative to plain's.
        timings: [new tokens, tokens/s, plain's new tokens, plain's tokens/s] a sample. tokar,
        mean_accepted: of these samples' drafts, None where there are none.
        """
        drafts = acceptance(self.results)
        drew = any(len(d) for r in self.results for d in r.drafts)
        lengths, plain_lengths = _lengths(self.results), _lengths(self.plain_results)
        return {
            "tokens_per_s": float(self.speeds.mean()),
            "tokens_per_s_total": total_speed(self.results, self.speeds),
            "relspd": float(self.speeds.mean() / self.plain_speeds.mean()),
            "first_token_s": float(self.first.mean()),
            "first_token_speedup": float(self.plain_first.mean() / self.first.mean()),
            "tokar": drafts.tokar if drew else None,
            "mean_accepted": drafts.accepted if drew else None,
            "timings": [
                [int(n), float(s), int(m), float(p)]
                for n, s, m, p in zip(
                    lengths, self.speeds, plain_lengths, self.plain_speeds, strict=True
                )
            ],
        }


def timed(
    plain: Call,
    calls: Mapping[Any, Call],
    samples: int,
    repeats: int,
    told: Callable[[], Any] = lambda: None,
) -> dict[Any, Timed]:
    """Times calls at batch 1, a plain one right before each; `told` after every sample.

    Compilation is over before the first measured call.
    """
    for call in (plain, *calls.values()):
        for i in range(samples):
            call(i)
    speeds, first = np.zeros((2, len(calls), 2, samples, repeats))
    results: list[list[list[Result]]] = [[[], []] for _ in calls]
    for i in range(samples):
        for r in range(repeats):
            for c, call in enumerate(calls.values()):
                for side, one in enumerate((plain, call)):
                    result = one(i)
                    speeds[c, side, i, r] = tokens_per_s(result)
                    first[c, side, i, r] = result.prefill_s
                    if r == 0:
                        results[c][side].append(result)
        told()
    speeds, first = np.median(speeds, axis=-1), np.median(first, axis=-1)
    return {
        name: Timed(
            results[c][1],
            speeds[c, 1],
            first[c, 1],
            results[c][0],
            speeds[c, 0],
            first[c, 0],
        )
        for c, name in enumerate(calls)
    }


def beside(timings: Sequence[Timed]) -> Timed:
    """The plain calls of several timings as one of its own: their means."""
    results = timings[0].plain_results
    speeds = np.mean([t.plain_speeds for t in timings], axis=0)
    first = np.mean([t.plain_first for t in timings], axis=0)
    return Timed(results, speeds, first, results, speeds, first)


def total_speed(results: Sequence[Result], speeds: np.ndarray) -> float:
    """All tokens over all time, of answers at so many tokens/s each."""
    lengths = _lengths(results)
    return float(lengths.sum() / (lengths / speeds).sum())


def _lengths(results: Sequence[Result]) -> np.ndarray:
    return np.array([r.emitted for r in results])
