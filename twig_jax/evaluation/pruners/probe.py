"""What pruners look at: the base's states, keys and attention over a prompt."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from twig_jax.config import LlavaConfig, TwigConfig
from twig_jax.models.attention import KV
from twig_jax.models.llava import Llava, Params
from twig_jax.pruning.schedule import Ranked, Schedule, by_twig
from twig_jax.pruning.select import first_of, take


@dataclass(frozen=True)
class Pruner:
    """A way to choose visual tokens.

    source: the paper. schedule: of (L, the twig's K, T, K_f) -> before which layers it prunes, and
    how much. rank: of (what is seen, R) -> verdicts on the visual embeddings [B, V], before the
    decoder runs; None where the schedule ranks within it, or the engine does by `selector`.
    """

    source: str
    schedule: Callable[[int, TwigConfig], Schedule]
    rank: Callable[["Probe", int], Ranked] | None = None
    selector: str = "given"


def before_decoder(num_layers: int, twig: TwigConfig) -> Schedule:
    """No decoder layer sees a pruned token, all see the others: R is R̄."""
    return by_twig(TwigConfig(K=0, T=0, K_f=num_layers))


def after_two_layers(num_layers: int, twig: TwigConfig) -> Schedule:
    """Two of 32 layers, or the same share of others, see all tokens; the rest the kept ones."""
    return by_twig(TwigConfig(K=max(1, round(num_layers / 16)), T=0, K_f=num_layers))


def as_the_twig(num_layers: int, twig: TwigConfig) -> Schedule:
    """The twig's own schedule, FinalWipe included: what differs is the ranking alone."""
    return by_twig(twig)


@dataclass(frozen=True, eq=False)
class Probe:
    """A batch of right-padded prompts with V = I·M visual tokens a row, to be traced under jit.

    tokens int32 [B, P], is_visual bool [B, P], lengths int32 [B], pixels [B, I, H, W, 3], seeds
    uint32 [B] that depend on the request alone. K: layers that see all tokens. `twig` is what it is
    compared with.
    """

    config: LlavaConfig
    K: int
    twig: TwigConfig
    base: Params
    tokens: jax.Array
    is_visual: jax.Array
    lengths: jax.Array
    pixels: jax.Array
    seeds: jax.Array

    def _apply(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        return Llava(self.config).apply({"params": self.base}, *args, method=method, **kwargs)

    @cached_property
    def _tower(self) -> tuple[jax.Array, Any]:
        """The tower's features [B·I, M, d_v], and the projections of the layer that gives them."""
        last = f"layers_{self.config.vision.layers_used - 1}"
        features, kept = self._apply(
            lambda model, pixels: model.vision(rearrange(pixels, "B I h w c -> (B I) h w c")),
            self.pixels,
            capture_intermediates=lambda module, _: module.name in ("q_proj", "k_proj"),
            mutable=["intermediates"],
        )
        if last not in kept.get("intermediates", {}).get("vision", {}):
            return features, {}
        found = kept["intermediates"]["vision"][last]
        heads = self.config.vision.num_heads
        return features, {
            name: rearrange(found[name]["__call__"][0], "N S (H D) -> N H S D", H=heads)
            for name in ("q_proj", "k_proj")
        }

    @property
    def features(self) -> jax.Array:
        """What the projector reads, [B, V, d_v]."""
        return rearrange(self._tower[0], "(B I) M d -> B (I M) d", B=len(self.tokens))

    def project(self, features: jax.Array) -> jax.Array:
        """[B, V, d_v] -> [B, V, d]."""
        return self._apply(lambda model, x: model.projector(x), features)

    @cached_property
    def visual(self) -> jax.Array:
        """Visual embeddings [B, V, d]."""
        return self.project(self.features)

    def _projected(self, name: str) -> jax.Array:
        if not self._tower[1]:
            raise ValueError("visual features are read below the vision tower's first layer")
        return self._tower[1][name]

    @property
    def class_attention(self) -> jax.Array:
        """Attention of the class token to visual tokens, mean over heads, float32 [B, V].

        In the tower's last layer that runs. Raises ValueError where none does.
        """
        q, k = self._projected("q_proj")[:, :, 0], self._projected("k_proj")
        logits = jnp.einsum("NHD,NHSD->NHS", q, k, preferred_element_type=jnp.float32)
        row = jax.nn.softmax(logits * q.shape[-1] ** -0.5, axis=-1).mean(1)[
            :, -self.config.vision.num_tokens :
        ]
        return rearrange(row, "(B I) M -> B (I M)", B=len(self.tokens))

    @property
    def vision_keys(self) -> jax.Array:
        """Visual tokens' keys in that layer, mean over heads, [B, V, D]; raises as that does."""
        keys = self._projected("k_proj").mean(1)[:, -self.config.vision.num_tokens :]
        return rearrange(keys, "(B I) M D -> B (I M) D", B=len(self.tokens))

    @property
    def real(self) -> jax.Array:
        """Slots that are no padding, bool [B, P]."""
        return jnp.arange(self.tokens.shape[1]) < self.lengths[:, None]

    def run(self, layers: int) -> tuple[jax.Array, KV | None]:
        """States [B, P, d] after so many layers, and the last one's keys and values."""
        x = self._apply("merge", self.tokens, self.is_visual, self.visual)
        if layers == 0:
            return x, None
        B, P = self.tokens.shape
        mask = jnp.tril(jnp.ones((P, P), bool)) & self.real[:, None]
        at = jnp.broadcast_to(jnp.arange(P), (B, P))
        x, kvs = self._apply("run", x, at, mask, 0, layers)
        return x, kvs[-1]

    def attention(self, layer: int) -> jax.Array:
        """Attention of every token in a layer, mean over heads: float32 [B, P, P], by query."""
        x, _ = self.run(layer)
        _, kv = self.run(layer + 1)
        assert kv is not None
        P = x.shape[1]

        def row(end: jax.Array) -> jax.Array:
            seen = self.real & (jnp.arange(P) <= end)
            at = jnp.full((len(x), 1), end)
            found = self._apply("attention_rows", layer, take(x, at), at, kv.k, seen[:, None])
            return found.mean(1)[:, 0]

        return jax.lax.map(row, jnp.arange(P)).swapaxes(0, 1)

    def last(self, x: jax.Array) -> jax.Array:
        """x [B, P, ...] at the prompt's last token, [B, ...]."""
        return take(x, (self.lengths - 1)[:, None])[:, 0]

    def of_visual(self, x: jax.Array) -> jax.Array:
        """x [B, P, ...] at the visual tokens, [B, V, ...]."""
        return take(x, first_of(self.is_visual, self.visual.shape[1]))
