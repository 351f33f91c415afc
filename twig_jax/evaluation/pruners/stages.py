"""Budgets of what prunes at several layers."""

import itertools
import math
from collections.abc import Callable
from functools import partial

from twig_jax.pruning.schedule import Rank, Schedule


def staged(
    layers: tuple[int, ...], shares: Callable[[float], tuple[float, ...]], rank: Rank
) -> Schedule:
    """Prunes before each of `layers`, to shares of all visual tokens.

    shares: of a number from 0 to 1, which the budget decides, -> the share of each segment; all are
    0 at 0 and 1 at 1, and grow with it.
    """
    return Schedule(layers, partial(fewest, layers, shares), rank)


def fewest(
    layers: tuple[int, ...],
    shares: Callable[[float], tuple[float, ...]],
    average: float,
    num_layers: int,
    num_tokens: int,
    images: int,
) -> tuple[int, ...]:
    """The least tokens of every segment with which a layer sees R̄ an image on average, or more.

    Arguments as of `staged` and `Schedule.budget`; a share of all tokens is rounded up. Raises
    ValueError where no shares reach the average, the layers before the first exceed it, or a stage
    has no layer.
    """
    K, L, whole = layers[0], num_layers, images * num_tokens
    depths = [last - first for first, last in itertools.pairwise((*layers, L))]
    if min(depths) < 1:
        raise ValueError(f"a decoder of {L} layers is too shallow to prune before {layers}")

    def tokens(x: float) -> tuple[int, ...]:
        return tuple(math.ceil(share * whole) for share in shares(x))

    def enough(x: float) -> bool:
        seen = K * whole + sum(d * R for d, R in zip(depths, tokens(x), strict=True))
        return seen >= round(images * L * average, 6)

    low, high = K * num_tokens / L, num_tokens
    if images and not low < average <= high:
        raise ValueError(
            f"no number of kept tokens gives {average:g} visual tokens a layer on average: with "
            f"{K} of {L} layers that see all {num_tokens} it can be more than {low:g} and at most "
            f"{high:g}"
        )
    below, above = 0.0, 1.0
    for _ in range(50):
        middle = (below + above) / 2
        below, above = (below, middle) if enough(middle) else (middle, above)
    return tokens(above)
