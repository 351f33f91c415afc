"""Accuracy, speed and acceptance of a set of answers."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from twig_jax.config import TwigConfig
from twig_jax.decoding.settings import Result

_DRAWS = 2000  # of a bootstrap


@dataclass(frozen=True)
class Acceptance:
    """What happened to drafted tokens. Shares are nan where nothing was drafted."""

    tokar: float  # accepted / drafted
    content: float  # the same over words that depend on the page
    wording: float  # and over the others
    drafted: float  # mean tokens drafted an iteration
    levels: float  # mean levels of drafts an iteration, which are its drafts where they are a chain
    accepted: float  # mean drafts accepted an iteration


def _share(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


def acceptance(
    results: Sequence[Result], content: Sequence[Sequence[bool]] | None = None
) -> Acceptance:
    """Counts drafts of all results; content[i] says which tokens of answer i depend on the page.

    A draft counts by its place in the answer; places past the known answer count as wording, as all
    do where nothing is known. Of the drafts for one place at most one is accepted, and one is for
    every accepted token.
    """
    content = [()] * len(results) if content is None else content
    counts = np.zeros((2, 2), int)  # [content, accepted]
    rounds = 0
    for result, flags in zip(results, content, strict=True):
        place = 0
        rounds += len(result.matched)
        for depths, matched in zip(result.depths, result.matched, strict=True):
            for j, there in enumerate(np.bincount(depths)[1:]):
                at, accepted = place + j, int(j < matched)
                counts[int(at < len(flags) and flags[at])] += there - accepted, accepted
            place += int(matched) + 1
    drafted, matches = counts.sum(), counts[:, 1].sum()
    return Acceptance(
        tokar=_share(matches, drafted),
        content=_share(counts[1, 1], counts[1].sum()),
        wording=_share(counts[0, 1], counts[0].sum()),
        drafted=_share(drafted, rounds),
        levels=_share(sum(sum(r.levels) for r in results), rounds),
        accepted=_share(matches, rounds),
    )


def tokens_per_s(result: Result) -> float:
    """New tokens over prefill and decoding time, EOS included (the paper's speed)."""
    return result.emitted / (result.prefill_s + result.decode_s)


def relacc(
    accelerated: Sequence[float],
    base: Sequence[float],
    groups: Sequence[Hashable] | None = None,
) -> tuple[float, float, float]:
    """Accelerated accuracy over the base's on the same samples, with a 95 % interval.

    groups: what each sample shares with others, as its image; each stands for itself without. The
    interval is a paired bootstrap over groups: samples of one are right or wrong together, and are
    drawn together. Draws in which the base has nothing right do not count. All three are nan where
    it never has, the interval's ends where there is but one group.
    """
    pairs = np.stack([accelerated, base], axis=1).astype(float)  # [n, 2]
    ours, of = pairs.sum(0)
    if not of:
        return float("nan"), float("nan"), float("nan")
    if groups is not None:
        number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
        sums = np.zeros((len(number), 2))
        np.add.at(sums, [number[group] for group in groups], pairs)
        pairs = sums
    if len(pairs) < 2:
        return float(ours / of), float("nan"), float("nan")
    rng = np.random.default_rng(0)
    # One draw at a time: all of a large benchmark's would not fit into memory.
    drawn = np.array(
        [pairs[rng.integers(len(pairs), size=len(pairs))].sum(0) for _ in range(_DRAWS)]
    )
    drawn = drawn[drawn[:, 1] > 0]
    low, high = np.percentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5])
    return float(ours / of), float(low), float(high)


def ceiling(twig: TwigConfig, layers: int, levels: float, accepted: float) -> float:
    """RelSpd of decoding alone if a layer pass cost the same whatever its width.

    Plain decoding pays L layers a token. An iteration pays K layers for the token before its drafts
    and for each of their levels, T for each level, and L - K once for verification; it emits
    accepted + 1 tokens.
    """
    iteration = twig.K * (levels + 1) + twig.T * levels + layers - twig.K
    return (accepted + 1) * layers / iteration
