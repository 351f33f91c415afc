"""The Llama decoder as layers that can be run in ranges, with explicit keys and values."""

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from twig_jax.config import TextConfig
from twig_jax.models.attention import (
    KV,
    Attention,
    Context,
    apply_rope,
    attend,
    attention_rows,
    rope_angles,
)
from twig_jax.models.layers import Dense, Embed, RMSNorm, traced_once

Rope = tuple[jax.Array, jax.Array]


class DecoderLayer(nn.Module):
    """Pre-norm decoder layer: grouped-query attention with RoPE, then SwiGLU."""

    config: TextConfig

    def setup(self) -> None:
        c = self.config

        def dense(features: int) -> Dense:
            return Dense(features, kernel_init=nn.initializers.normal(0.02))

        self.input_layernorm = RMSNorm(c.rms_norm_eps)
        self.q_proj = dense(c.num_heads * c.head_dim)
        self.k_proj = dense(c.num_kv_heads * c.head_dim)
        self.v_proj = dense(c.num_kv_heads * c.head_dim)
        self.o_proj = dense(c.hidden_size)
        self.post_attention_layernorm = RMSNorm(c.rms_norm_eps)
        self.gate_proj = dense(c.intermediate_size)
        self.up_proj = dense(c.intermediate_size)
        self.down_proj = dense(c.hidden_size)

    def _heads(self, x: jax.Array) -> jax.Array:
        return rearrange(x, "B S (H D) -> B S H D", D=self.config.head_dim)

    def __call__(
        self,
        x: jax.Array,
        rope: Rope,
        mask: jax.Array,
        cached: Context | None = None,
        scratch: tuple[KV, jax.Array] | None = None,
        attention: Attention = attend,
    ) -> tuple[jax.Array, KV]:
        """x [B, Q, d] -> ([B, Q, d], keys and values).

        Without `scratch` the queries see each other under `mask` [B, Q, Q], and the new keys and
        values [B, K, Q, D] are returned. With `scratch` = (block [B, K, W, D], index) they are
        written to the block at that slot first, `mask` is [B, Q, W] and the block is returned.
        `cached` is an earlier block that is read but never written.
        """
        y = self.input_layernorm(x)
        q = apply_rope(self._heads(self.q_proj(y)), rope)
        k, v = apply_rope(self._heads(self.k_proj(y)), rope), self._heads(self.v_proj(y))
        kv = KV(*(rearrange(x, "B S K D -> B K S D") for x in (k, v)))
        if scratch is not None:
            block, index = scratch
            # Selecting beats updating slices: XLA copies a block that is updated in a loop's body
            # and read there in another shape.
            slot = jnp.arange(block.k.shape[2])[:, None]
            for i in range(x.shape[1]):
                kv_i = jax.tree.map(lambda new, i=i: new[:, :, i : i + 1], kv)
                block = jax.tree.map(partial(jnp.where, slot == index + i), kv_i, block)
            kv = block
        context = [Context(kv, mask)] if cached is None else [cached, Context(kv, mask)]
        x = x + self.o_proj(rearrange(attention(q, context), "B S H D -> B S (H D)"))
        y = self.post_attention_layernorm(x)
        return x + self.down_proj(jax.nn.silu(self.gate_proj(y)) * self.up_proj(y)), kv

    def queries(self, x: jax.Array, rope: Rope) -> jax.Array:
        """The queries [B, Q, H, D] of this layer's input x [B, Q, d]."""
        return apply_rope(self._heads(self.q_proj(self.input_layernorm(x))), rope)


class Decoder(nn.Module):
    """A stack of `num_layers` decoder layers with a final norm and head.

    The base has an embedding; the twig (`embeds=False`) reads the base's hidden states and has a
    head of its own whatever the base's is.
    """

    config: TextConfig
    num_layers: int
    embeds: bool = True

    def setup(self) -> None:
        c = self.config
        if self.embeds:
            self.embed_tokens = Embed(
                c.vocab_size, c.hidden_size, embedding_init=nn.initializers.normal(0.1)
            )
        self.layers = [DecoderLayer(c) for _ in range(self.num_layers)]
        self.norm = RMSNorm(c.rms_norm_eps)
        self.tied = c.tied_head and self.embeds
        if not self.tied:
            self.lm_head = Dense(c.vocab_size, kernel_init=nn.initializers.normal(0.02))

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int32 [B, S] -> [B, S, d]."""
        if tokens.size > 1:
            return self.embed_tokens(tokens)
        # One index is a slice to XLA, which for GPUs brings a table that is split together first.
        return self.embed_tokens(jnp.concatenate([tokens, tokens], axis=1))[:, :1]

    def rope(self, positions: jax.Array) -> Rope:
        """Rotary angles for int32 positions [B, S]."""
        return rope_angles(positions, self.config.head_dim, self.config.rope_theta)

    def run(
        self,
        x: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        first: int = 0,
        last: int | None = None,
        cached: tuple[KV, ...] | None = None,
        cached_mask: jax.Array | None = None,
        scratch: tuple[KV, ...] | None = None,
        index: jax.Array | int = 0,
        attention: Attention = attend,
    ) -> tuple[jax.Array, tuple[KV, ...]]:
        """Layers first .. last-1 on x [B, Q, d] at positions [B, Q]: (states, one KV a layer).

        `cached` and `scratch` hold one block a layer of the range, as in `DecoderLayer`.
        """
        rope = self.rope(positions)
        layers = self.layers[first:last]
        out = []
        for i, layer in enumerate(layers):
            x, kv = traced_once(
                layer,
                x,
                rope,
                mask,
                None if cached is None or cached_mask is None else Context(cached[i], cached_mask),
                None if scratch is None else (scratch[i], jnp.asarray(index)),
                attention=attention,
            )
            out.append(kv)
        return x, tuple(out)

    def attention_rows(
        self, layer: int, x: jax.Array, positions: jax.Array, k: jax.Array, mask: jax.Array
    ) -> jax.Array:
        """Attention in one layer, from its input x [B, Q, d] at positions [B, Q] over its keys.

        k [B, K, S, D], mask bool [B, Q, S] -> float32 [B, H, Q, S].
        """
        return attention_rows(self.layers[layer].queries(x, self.rope(positions)), k, mask)

    def logits(self, x: jax.Array) -> jax.Array:
        """Final norm and head: [B, Q, d] -> float32 [B, Q, V]."""
        head = self.embed_tokens.attend if self.tied else self.lm_head
        return head(self.norm(x)).astype(jnp.float32)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Touches every parameter, for initialisation: [B, S, d] -> [B, S, V]."""
        if self.embeds:
            x = x + self.embed(jnp.zeros(x.shape[:2], jnp.int32))
        shape = (x.shape[0], x.shape[1], x.shape[1])
        x, _ = self.run(x, jnp.zeros(x.shape[:2], jnp.int32), jnp.ones(shape, bool))
        return self.logits(x)
