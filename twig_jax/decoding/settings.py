"""What is asked of the engine, and what it answers; per-row settings as the programs see them."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple

import jax
import numpy as np

from twig_jax.config import MODES

OF_TWIG = ("twig", "attention")
SELECTORS = (*OF_TWIG, "fastv", "given")


@dataclass(frozen=True)
class Settings:
    """How to decode.

    mode: plain, ttp, ssd or ttp_ssd. avg_retained: visual tokens a layer sees on average, per image
    (the modes with ttp). selector: what ranks them, one of SELECTORS: the
    twig's P-Head, or without one its attention; its attention anyhow; that of the trunk's last
    layer; or the requests' own scores.

    gamma: how many tokens ahead an iteration drafts at most; theta: drafting stops where no token
    is as probable as this under the twig. children, expanded, nodes: drafts are a tree, in which
    the best `expanded` nodes of each level get `children` each, and the best `nodes` of all (0 for
    all) are verified, by the probability of their paths; with one child it is a chain. adaptive: a
    row that drafts in vain stops, and tries again now and then.

    temperature 0 takes the likeliest token. Above it, what is drawn depends on `seed` and a token's
    position alone. Before the draw, in this order: repetition_penalty, division by the temperature,
    top_k (0 for all), top_p, min_p.

    An answer ends at EOS, after max_new_tokens or where the positions that the model knows end, or
    where one of `stop`, texts or sequences of token ids, is complete; a stop is no part of the
    answer. EOS is not chosen before min_new_tokens, and a stop that is complete by then is none.
    """

    mode: str = "ttp_ssd"
    avg_retained: float | None = None
    selector: str = "twig"
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    gamma: int = 5
    theta: float = 0.6
    children: int = 1
    expanded: int = 1
    nodes: int = 0
    adaptive: bool = False
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str | tuple[int, ...], ...] = ()

    @property
    def prune(self) -> bool:
        """Whether the mode prunes visual tokens."""
        return self.mode in ("ttp", "ttp_ssd")

    @property
    def draft(self) -> bool:
        """Whether the mode speculates."""
        return self.mode in ("ssd", "ttp_ssd") and self.gamma > 0

    @property
    def shape(self) -> tuple[Any, ...]:
        """What all rows of a batch have in common: the mode and the way of drafting."""
        return self.mode, self.adaptive, self.children, self.expanded, self.nodes

    def check(self) -> None:
        """Raises ValueError for a setting that means nothing."""
        if self.mode not in MODES:
            raise ValueError(f"no mode {self.mode!r}; there are: {', '.join(MODES)}")
        if self.selector not in SELECTORS:
            raise ValueError(f"no selector {self.selector!r}; there are: {', '.join(SELECTORS)}")
        for name, right, what in (
            ("max_new_tokens", _is_count(self.max_new_tokens, 1), "at least 1, and whole"),
            ("min_new_tokens", _is_count(self.min_new_tokens, 0), "at least 0, and whole"),
            ("gamma", _is_count(self.gamma, 0), "at least 0, and whole"),
            ("theta", self.theta >= 0, "0 or more"),
            ("children", _is_count(self.children, 1), "at least 1, and whole"),
            ("expanded", _is_count(self.expanded, 1), "at least 1, and whole"),
            ("nodes", _is_count(self.nodes, 0), "at least 0, which is all, and whole"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_k", _is_count(self.top_k, 0), "at least 0, which is all, and whole"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            (
                "repetition_penalty",
                1e-30 <= self.repetition_penalty <= 1e30,
                "between 1e-30 and 1e30",
            ),
            ("seed", _is_count(self.seed, 0, 2**32), "from 0 to 2**32 - 1, and whole"),
            ("stop", _are_stops(self.stop), "several texts or sequences of token ids, none empty"),
        ):
            if not right:
                raise ValueError(f"{name} must be {what}, not {getattr(self, name)!r}")


def _is_count(x: Any, least: int, beyond: int = 2**31) -> bool:
    return isinstance(x, Integral) and least <= int(x) < beyond


def _are_stops(stops: Any) -> bool:
    """A text alone would be taken for a stop at each of its letters, bytes for ids."""

    def is_stop(stop: Any) -> bool:
        if isinstance(stop, bytes) or not isinstance(stop, Sequence):
            return False
        return len(stop) > 0 and (isinstance(stop, str) or all(_is_count(x, 0) for x in stop))

    return not isinstance(stops, str) and all(map(is_stop, stops))


@dataclass(frozen=True)
class Request:
    """One prompt.

    ids int32 [S] with image slots, is_visual bool [S]; pixels float32 [I, H, W, 3], normalised, or
    visual [I·M, d], already embedded; neither for text. `settings` replaces the call's, but for its
    `shape`; `scores` float32 [S] is what selector "given" ranks. The first `before` tokens, with
    their images, are of an earlier turn that is kept.
    """

    ids: np.ndarray
    is_visual: np.ndarray
    pixels: np.ndarray | None = None
    visual: np.ndarray | None = None
    settings: Settings | None = None
    scores: np.ndarray | None = None
    before: int = 0


@dataclass(frozen=True)
class Result:
    """One answer, and how it came about."""

    tokens: np.ndarray  # int32 [n], what stopped the answer left out
    text: str | None  # the answer as text, where the engine knows the tokenizer
    stopped_by: str  # "eos", "length", "stop" or "cancelled"
    accepted: np.ndarray  # bool [n], True where the token was an accepted draft
    drafts: list[np.ndarray]  # tokens drafted in each iteration
    parents: list[np.ndarray]  # what each follows: 0 the token before, j draft j - 1
    probs: list[np.ndarray]  # their probabilities under the twig
    matched: np.ndarray  # int32 [iterations], accepted drafts
    kept: np.ndarray  # int32, prompt slots of the visual tokens kept
    scores: np.ndarray  # float32 [S], what they were ranked by
    prefill_s: float  # seconds of the whole batch: images, prompt and first drafts
    decode_s: float  # seconds of the loop, until this answer was there

    @property
    def emitted(self) -> int:
        """Tokens that decoding gave, EOS included."""
        return len(self.tokens) + (self.stopped_by == "eos")

    @property
    def depths(self) -> list[np.ndarray]:
        """How many tokens ahead each draft of each iteration is, from 1."""
        found = []
        for parents in self.parents:
            depths = np.zeros(len(parents) + 1, int)
            for i, parent in enumerate(parents):
                depths[i + 1] = depths[parent] + 1
            found.append(depths[1:])
        return found

    @property
    def levels(self) -> list[int]:
        """How many tokens ahead the drafts of each iteration reach."""
        return [int(depths.max(initial=0)) for depths in self.depths]


class Controls(NamedTuple):
    """Settings that are data: one value a row, each [B]."""

    max_new: jax.Array  # int32
    min_new: jax.Array  # int32, no EOS before so many tokens
    eos: jax.Array  # int32, -1 for none
    gamma: jax.Array  # int32
    theta: jax.Array  # float32
    temperature: jax.Array  # float32
    top_k: jax.Array  # int32, 0 for all
    top_p: jax.Array  # float32
    min_p: jax.Array  # float32
    penalty: jax.Array  # float32
    seed: jax.Array  # uint32
    selector: jax.Array  # int32, index into SELECTORS


def controls(settings: Sequence[Settings | None], eos: int) -> Controls:
    """The controls of a batch, as numpy arrays; a row of None is empty and done from the start."""
    rows = [Settings() if s is None else s for s in settings]

    def column(name: str, dtype: type) -> Any:
        return np.array([getattr(s, name) for s in rows], dtype)

    news: Any = np.array([0 if s is None else s.max_new_tokens for s in settings], np.int32)
    ends: Any = np.full(len(rows), eos, np.int32)
    selectors: Any = np.array([SELECTORS.index(s.selector) for s in rows], np.int32)
    return Controls(
        max_new=news,
        min_new=column("min_new_tokens", np.int32),
        eos=ends,
        gamma=column("gamma", np.int32),
        theta=column("theta", np.float32),
        temperature=column("temperature", np.float32),
        top_k=column("top_k", np.int32),
        top_p=column("top_p", np.float32),
        min_p=column("min_p", np.float32),
        penalty=column("repetition_penalty", np.float32),
        seed=column("seed", np.uint32),
        selector=selectors,
    )
