"""The CLIP vision tower and LLaVA's two-layer projector."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from twig_jax.config import VisionConfig
from twig_jax.models.attention import KV, Attention, Context, attend
from twig_jax.models.layers import Dense, LayerNorm, quick_gelu, traced_once


class EncoderLayer(nn.Module):
    """Pre-norm transformer encoder layer with biases and quick GELU."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: jax.Array, attention: Attention = attend) -> jax.Array:
        """x [B, S, d] -> [B, S, d]."""
        c = self.config
        y = LayerNorm(c.layer_norm_eps, name="layer_norm1")(x)
        q, k, v = (Dense(c.hidden_size, use_bias=True, name=f"{n}_proj")(y) for n in "qkv")
        q = rearrange(q, "B S (H D) -> B S H D", H=c.num_heads)
        k, v = (rearrange(x, "B S (H D) -> B H S D", H=c.num_heads) for x in (k, v))
        everything = jnp.ones((x.shape[0], x.shape[1], x.shape[1]), bool)
        y = rearrange(attention(q, [Context(KV(k, v), everything)]), "B S H D -> B S (H D)")
        x = x + Dense(c.hidden_size, use_bias=True, name="out_proj")(y)
        y = LayerNorm(c.layer_norm_eps, name="layer_norm2")(x)
        y = quick_gelu(Dense(c.intermediate_size, use_bias=True, name="fc1")(y))
        return x + Dense(c.hidden_size, use_bias=True, name="fc2")(y)


class VisionTower(nn.Module):
    """CLIP's image encoder up to the feature layer LLaVA reads."""

    config: VisionConfig

    def setup(self) -> None:
        c = self.config
        init = nn.initializers.normal(0.02)
        self.class_embedding = self.param("class_embedding", init, (c.hidden_size,))
        self.patch_embedding = self.param(
            "patch_embedding", init, (c.patch_size, c.patch_size, 3, c.hidden_size)
        )
        self.position_embedding = self.param(
            "position_embedding", init, (c.num_patches + 1, c.hidden_size)
        )
        self.pre_layernorm = LayerNorm(c.layer_norm_eps)
        self.layers = [EncoderLayer(c) for _ in range(c.num_layers)]
        self.post_layernorm = LayerNorm(c.layer_norm_eps)

    def __call__(self, pixels: jax.Array, attention: Attention = attend) -> jax.Array:
        """Normalised pixels [B, H, W, 3] -> features [B, M, d_v]."""
        c = self.config
        x = rearrange(pixels, "B (h p) (w q) c -> B (h w) p q c", p=c.patch_size, q=c.patch_size)
        patches = jnp.einsum(
            "BMpqc,pqcd->BMd", x, self.patch_embedding, preferred_element_type=jnp.float32
        )
        x = patches.astype(x.dtype)
        cls = jnp.broadcast_to(self.class_embedding, (x.shape[0], 1, c.hidden_size))
        x = jnp.concatenate([cls, x], axis=1) + self.position_embedding
        x = self.pre_layernorm(x)
        for i, layer in enumerate(self.layers):
            # Layers above the feature layer exist in published checkpoints but never run.
            if i < c.layers_used or self.is_initializing():
                x = traced_once(layer, x, attention=attention)
        if self.is_initializing():
            self.post_layernorm(x)
        return x if c.class_token else x[:, 1:]


class Projector(nn.Module):
    """Two dense layers with an exact GELU between, from vision to text width."""

    hidden_size: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, M, d_v] -> [B, M, d]."""
        x = Dense(self.hidden_size, use_bias=True, name="linear_1")(x)
        x = jax.nn.gelu(x, approximate=False)
        return Dense(self.hidden_size, use_bias=True, name="linear_2")(x)
