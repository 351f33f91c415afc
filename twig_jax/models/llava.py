"""LLaVA: a vision tower, a projector and a Llama decoder, as one parameter tree."""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from twig_jax.config import LlavaConfig
from twig_jax.models.attention import KV, Attention, attend
from twig_jax.models.clip import Projector, VisionTower
from twig_jax.models.llama import Decoder

Params = Any


class Llava(nn.Module):
    """The base VLM. Its methods are called through `apply(..., method=...)`."""

    config: LlavaConfig

    def setup(self) -> None:
        c = self.config
        self.vision = VisionTower(c.vision)
        self.projector = Projector(c.text.hidden_size)
        self.text = Decoder(c.text, c.text.num_layers)

    def encode(self, pixels: jax.Array, attention: Attention = attend) -> jax.Array:
        """Normalised pixels [B, I, H, W, 3] -> visual embeddings [B, I·M, d]."""
        features = self.vision(rearrange(pixels, "B I h w c -> (B I) h w c"), attention)
        return rearrange(self.projector(features), "(B I) M d -> B (I M) d", B=pixels.shape[0])

    def embed(self, tokens: jax.Array) -> jax.Array:
        """`Decoder.embed` of the decoder."""
        return self.text.embed(tokens)

    def merge(self, tokens: jax.Array, is_visual: jax.Array, visual: jax.Array) -> jax.Array:
        """Token embeddings with the visual ones put into their slots, in order.

        tokens int32 [B, P], is_visual bool [B, P], visual [B, I·M, d] -> [B, P, d].
        """
        if visual.shape[1] == 0:
            return self.text.embed(tokens)
        # The id that marks a slot may lie outside the vocabulary.
        x = self.text.embed(jnp.where(is_visual, 0, tokens))
        slot = jnp.maximum(jnp.cumsum(is_visual, axis=1) - 1, 0)  # [B, P]
        placed = jnp.take_along_axis(visual, slot[..., None], axis=1)
        return jnp.where(is_visual[..., None], placed.astype(x.dtype), x)

    def run(self, *args: Any, **kwargs: Any) -> tuple[jax.Array, tuple[KV, ...]]:
        """`Decoder.run` of the decoder."""
        return self.text.run(*args, **kwargs)

    def attention_rows(self, *args: Any) -> jax.Array:
        """`Decoder.attention_rows` of the decoder."""
        return self.text.attention_rows(*args)

    def logits(self, x: jax.Array) -> jax.Array:
        """`Decoder.logits` of the decoder."""
        return self.text.logits(x)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Touches every parameter, for initialisation."""
        return self.text(self.encode(pixels))


def init_base(config: LlavaConfig, rng: jax.Array) -> Params:
    """Random float32 parameters of the base."""
    size = config.vision.image_size
    return Llava(config).init(rng, jnp.zeros((1, 1, size, size, 3)))["params"]
