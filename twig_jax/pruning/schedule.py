"""At which layers visual tokens are dropped, how many stay, and what may rank them on the way."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from twig_jax.config import TwigConfig
from twig_jax.pruning.budget import retained
from twig_jax.pruning.select import take


class Ranked(NamedTuple):
    """A verdict on S tokens a row: of the visual ones the highest are kept.

    scores: float32 [B, S]. replaced: [B, S, d], what takes the place of their states, or of their
    embeddings, where tokens were merged.
    """

    scores: jax.Array
    replaced: jax.Array | None = None


class View(NamedTuple):
    """A prompt of P slots between two layers, where S of them are left."""

    states: jax.Array  # [B, S, d], what the next layer would read
    slots: jax.Array  # int32 [B, S], where in the prompt they are; the last ones P, if unused
    is_visual: jax.Array  # bool [B, P]
    embeddings: jax.Array  # [B, P, d], what the first layer read
    retained: jax.Array  # int32 [B], visual tokens that go on
    text: jax.Array  # int32 [B, N], which of the S are text, S where unused
    # Of tokens int32 [B, Q] among the S -> float32 [B, Q, S], how these attended in the layer
    # before, the mean over heads.
    attention: Callable[[jax.Array], jax.Array]

    @property
    def visual(self) -> jax.Array:
        """Which of the S are visual, bool [B, S]."""
        return take(self.is_visual, self.slots)

    @property
    def last(self) -> jax.Array:
        """Which of the S is the prompt's last token, int32 [B]."""
        return (self.slots < self.is_visual.shape[1]).sum(1, dtype=jnp.int32) - 1


Rank = Callable[[View], Ranked]


@dataclass(frozen=True)
class Schedule:
    """Where the layers that see a choice of visual tokens begin, and how many they see.

    layers: the first of each segment, ascending; layers before all segments see every token.
    budget: of (R̄, L, M, images) -> R of each segment, at most that of the segment before; raises
    ValueError where nothing gives this average. rank: what chooses before every segment; None for
    the engine's selectors, which look once, before the first.
    """

    layers: tuple[int, ...]
    budget: Callable[[float, int, int, int], tuple[int, ...]]
    rank: Rank | None = None


def by_twig(twig: TwigConfig) -> Schedule:
    """R tokens (Eq. 6) in layers K .. K_f-1, and none after (FinalWipe)."""

    def budget(average: float, num_layers: int, num_tokens: int, images: int) -> tuple[int, ...]:
        return retained(average, twig, num_layers, num_tokens, images), 0

    return Schedule((twig.K, twig.K_f), budget)
