"""The base and the twig as the decoding programs call them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from twig_jax.config import LlavaConfig, TwigConfig
from twig_jax.decoding.cache import Cache
from twig_jax.decoding.tree import Tree
from twig_jax.models.attention import attend, causal_attend
from twig_jax.models.fused_attention import fused_attend, fuses
from twig_jax.models.int8 import quantised
from twig_jax.models.llava import Llava, Params
from twig_jax.models.twig import twig_decoder
from twig_jax.pruning.schedule import Rank
from twig_jax.sharding.mesh import ROWS


class Segment(NamedTuple):
    """Deep layers first .. last-1, and their slots for visual tokens of the prompt, R_max."""

    first: int
    last: int
    slots: int


class Weights(NamedTuple):
    """Parameters of the base and of the twig (None where no mode needs it).

    int8: the twig that drafts, where it is in int8; the other reads prompts, so that what is kept
    does not depend on it, and has no head.
    """

    base: Params
    twig: Params
    int8: Params = None

    @property
    def dtype(self) -> jnp.dtype:
        """Of states: the norms', whatever kernels and embeddings are kept in."""
        return self.base["text"]["norm"]["scale"].dtype

    @property
    def cache_dtype(self) -> jnp.dtype:
        """Of caches: the states', but for those that cpu.py has arranged."""
        bits = self.base["text"]["embed_tokens"]["embedding"].dtype == jnp.uint16
        return jnp.dtype(jnp.float32) if bits else self.dtype

    @property
    def drafter(self) -> Params:
        """The twig that drafts."""
        return self.twig if self.int8 is None else self.int8


def drafting_in_int8(base: Params, twig: Params) -> Weights:
    """Weights whose twig reads prompts as it is and drafts in int8."""
    reads = {name: part for name, part in twig.items() if name != "lm_head"}
    drafts = {name: part for name, part in twig.items() if name != "p_head"}
    return Weights(base, reads, quantised(drafts))


@dataclass(frozen=True)
class Program:
    """The static side of a compiled program: models and shapes.

    prune, draft: the two halves of the mode. adaptive: drafting may be switched off for a while.
    resumes: another turn may follow, so the twig's cache is kept though nothing is drafted.
    text_slots N, images I: the bucket. segments: all layers after the trunk. rank: see `Schedule`.
    tree: what is drafted an iteration. max_new: the most new tokens of any row. gpu: it is for
    NVIDIA GPUs, with attention in one kernel, and single tokens as two; see `_twofold`.
    """

    base: LlavaConfig
    twig: TwigConfig
    prune: bool
    draft: bool
    adaptive: bool
    resumes: bool
    text_slots: int
    images: int
    segments: tuple[Segment, ...]
    rank: Rank | None
    tree: Tree
    max_new: int
    gpu: bool

    @property
    def K(self) -> int:
        """Layers of the trunk."""
        return self.segments[0].first

    @property
    def width(self) -> int:
        """W, nodes of an iteration: the pending token and its drafts."""
        return 1 + self.tree.kept

    @property
    def prompt_slots(self) -> int:
        """P = N + I·M."""
        return self.text_slots + self.images * self.base.vision.num_tokens

    @property
    def generated_slots(self) -> int:
        """G."""
        return self.max_new + 1

    @property
    def fused(self) -> bool:
        """Whether layers attend by one kernel."""
        return self.gpu and fuses(self.base.text.head_dim)

    @property
    def runs_twig(self) -> bool:
        """Whether there is a twig that the mode needs."""
        return self.twig.T > 0 and (self.prune or self.draft)

    @property
    def keeps_twig(self) -> bool:
        """Whether the twig's cache outlives the prompt."""
        return self.runs_twig and (self.draft or self.resumes)

    def base_apply(self, weights: Weights, method: str, *args: Any, **kwargs: Any) -> Any:
        """A method of the base."""
        apply = partial(Llava(self.base).apply, {"params": weights.base}, method=method)
        return self._applied(apply, method, *args, **kwargs)

    def layers(
        self, weights: Weights, first: int, last: int, *args: Any, **kwargs: Any
    ) -> tuple[jax.Array, Cache]:
        """Base layers first .. last-1; see `Decoder.run`."""
        return self.base_apply(weights, "run", *args, first=first, last=last, **kwargs)

    def twig_apply(self, weights: Weights, method: str, *args: Any, **kwargs: Any) -> Any:
        """A method of the twig that reads prompts."""
        decoder = twig_decoder(self.base.text, self.twig)
        apply = partial(decoder.apply, {"params": weights.twig}, method=method)
        return self._applied(apply, method, *args, **kwargs)

    def draft_apply(self, weights: Weights, method: str, *args: Any, **kwargs: Any) -> Any:
        """A method of the twig that drafts."""
        return self.twig_apply(weights._replace(twig=weights.drafter), method, *args, **kwargs)

    def _applied(self, apply: Callable, method: str, *args: Any, **kwargs: Any) -> Any:
        """A method of base or twig, called as suits the devices."""
        if method == "run":
            # No token sees what is behind it; but a scratch block has slots of its own.
            causal = kwargs.get("scratch") is None
            attention = fused_attend if self.fused else causal_attend if causal else attend
            apply = partial(apply, attention=attention)
        if not self.gpu or method not in ("run", "logits"):
            return apply(*args, **kwargs)
        rows, tokens = args[0].shape[:2]
        mesh = jax.sharding.get_abstract_mesh()
        spread = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in ROWS)
        alone = tokens == 1 and rows <= spread  # on its device
        if method == "logits":
            return apply(_twofold(*args))[:, :1] if alone else apply(*args)
        return _run_twofold(apply, *args, **kwargs) if alone else apply(*args, **kwargs)


def _twofold(x: jax.Array) -> jax.Array:
    """Every row's only token twice, [B, 1, ...] -> [B, 2, ...].

    XLA makes no matrix product of a single token: on an H200 those with gate and up take a sixth
    longer than products of two tokens.
    """
    return jnp.concatenate([x, x], axis=1)


def _run_twofold(
    apply: Callable,
    x: jax.Array,
    positions: jax.Array,
    mask: jax.Array,
    cached_mask: jax.Array | None = None,
    scratch: Cache | None = None,
    **kwargs: Any,
) -> tuple[jax.Array, Cache]:
    """`Decoder.run` of one token a row, run as two of which the first counts.

    Nobody sees the second one's keys. In a scratch block they are in the slot behind the first's,
    where the next token of the row will be.
    """
    mask = _twofold(mask)
    if scratch is None:
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 1)))
    seen = None if cached_mask is None else _twofold(cached_mask)
    x, kvs = apply(
        _twofold(x), _twofold(positions), mask, cached_mask=seen, scratch=scratch, **kwargs
    )
    if scratch is None:
        kvs = jax.tree.map(lambda x: x[:, :, :1], kvs)
    return x[:, :1], kvs
