"""The twig: a few decoder layers with a norm and head of their own, fed by base layer K - 1.

With a P-Head (TwigVLM++, arXiv 2503.14075v3, section 3.4) it also has two gates beside the
self-attention of its last layer, whose queries and keys they multiply to rank visual tokens:

    s = mean over heads of softmax over visual tokens of (G_q(x_q) ⊙ q)(G_k(X_k) ⊙ K)^T / sqrt(D)

x_q, X_k are the layer's normalised inputs, q and K after RoPE, as in its attention. A gate is
2 · sigmoid of a linear layer that starts at zero: it starts at 1, s as the attention itself, and a
gate can mute or double a channel but not turn it round. The published checkpoints have relu(z) ·
sigmoid(z) of a linear layer z without bias (github.com/MILVLG/twigvlm, pruning_head.py).
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from twig_jax.config import GATES, TextConfig, TwigConfig
from twig_jax.models.attention import attention_rows
from twig_jax.models.layers import Dense
from twig_jax.models.llama import Decoder
from twig_jax.models.llava import Params


class PHead(nn.Module):
    """The gates of a P-Head, from normalised inputs of the twig's last layer; see `GATES`."""

    config: TextConfig
    gate: str

    def setup(self) -> None:
        c, zeros, bias = self.config, nn.initializers.zeros, self.gate == GATES[0]
        self.q_gate = Dense(c.num_heads * c.head_dim, use_bias=bias, kernel_init=zeros)
        self.k_gate = Dense(c.num_kv_heads * c.head_dim, use_bias=bias, kernel_init=zeros)

    def _opened(self, z: jax.Array) -> jax.Array:
        return nn.sigmoid(z) * (2 if self.gate == GATES[0] else nn.relu(z))

    def query(self, y: jax.Array) -> jax.Array:
        """[B, Q, d] -> what queries are multiplied by, [B, Q, H, D]."""
        gate = self._opened(self.q_gate(y))
        return rearrange(gate, "B Q (H D) -> B Q H D", D=self.config.head_dim)

    def key(self, y: jax.Array) -> jax.Array:
        """[B, S, d] -> what keys are multiplied by, [B, S, K, D]."""
        gate = self._opened(self.k_gate(y))
        return rearrange(gate, "B S (K D) -> B S K D", D=self.config.head_dim)


class Twig(Decoder):
    """A twig's layers, norm and head; `gate`: of a P-Head, None without one."""

    embeds: bool = False
    gate: str | None = None

    def setup(self) -> None:
        super().setup()
        if self.gate is not None:
            self.p_head = PHead(self.config, self.gate)

    def key_gates(self, x: jax.Array) -> jax.Array:
        """G_k of tokens x [B, S, d], the last layer's inputs: [B, S, K, D]."""
        return self.p_head.key(self.layers[-1].input_layernorm(x))

    def visual_scores(
        self,
        x: jax.Array,
        positions: jax.Array,
        k: jax.Array,
        gates: jax.Array,
        mask: jax.Array,
    ) -> jax.Array:
        """s of queries x [B, Q, d] at positions [B, Q], the last layer's inputs: float32 [B, Q, S].

        k [B, K, S, D]: that layer's keys; gates [B, S, K, D] of `key_gates`; mask bool [B, Q, S]:
        which slots are visual tokens of a query. A row sums to 1, or is zero where there is none.
        """
        layer = self.layers[-1]
        keys = k * rearrange(gates, "B S K D -> B K S D").astype(k.dtype)
        q = layer.queries(x, self.rope(positions)) * self.p_head.query(layer.input_layernorm(x))
        return attention_rows(q, keys, mask).mean(1)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Touches every parameter, for initialisation: [B, S, d] -> [B, S, V]."""
        if self.gate is not None:
            self.p_head.query(x)
            self.p_head.key(x)
        return super().__call__(x)


def twig_decoder(text: TextConfig, twig: TwigConfig) -> Twig:
    """The module; the twig has no embedding, it reads the states after base layer K - 1."""
    return Twig(text, twig.T, gate=twig.gate if twig.p_head else None)


STARTS = ("next", "last", "random")


def init_twig(
    base: Params, text: TextConfig, twig: TwigConfig, how: str = "next", seed: int = 0
) -> Params:
    """A twig's first parameters (paper, section 3.2 and its ablation).

    `how`: "next" copies base layers K .. K+T-1, "last" the last T layers, "random" draws them from
    `seed`. Norm and head are copies of the base's, a P-Head is a `fresh_p_head`. Raises ValueError
    for another `how`, or where the base has too few layers.
    """
    twig.check(text.num_layers)
    ranking = {"p_head": fresh_p_head(text)} if twig.p_head else {}
    kernel = (
        base["text"]["embed_tokens"]["embedding"].T
        if text.tied_head
        else base["text"]["lm_head"]["kernel"]
    )
    head = {"norm": base["text"]["norm"], "lm_head": {"kernel": kernel}}
    if how == "random":
        x = jnp.zeros((1, 1, text.hidden_size))
        drawn = twig_decoder(text, twig).init(jax.random.key(seed), x)["params"]
        return jax.tree.map(jnp.array, {**drawn, **head, **ranking})
    if how not in STARTS:
        raise ValueError(
            f"no twig to start from called {how!r}; there are: {', '.join(STARTS)}, or a folder"
        )
    first = twig.K if how == "next" else text.num_layers - twig.T
    if first + twig.T > text.num_layers or first < 0:
        raise ValueError(f"a base of {text.num_layers} layers has no layers {first} + {twig.T}")
    layers = {f"layers_{t}": base["text"][f"layers_{first + t}"] for t in range(twig.T)}
    return jax.tree.map(jnp.array, {**layers, **head, **ranking})


def fresh_p_head(text: TextConfig) -> Params:
    """A float32 P-Head whose scores are the last layer's attention among visual tokens."""
    d, D = text.hidden_size, text.head_dim
    return {
        name: {"kernel": jnp.zeros((d, heads * D)), "bias": jnp.zeros((heads * D,))}
        for name, heads in (("q_gate", text.num_heads), ("k_gate", text.num_kv_heads))
    }


def feeding(base: Params, K: int) -> Params:
    """The part of a base that a twig on layer K - 1 reads."""
    kept = ["embed_tokens", *(f"layers_{k}" for k in range(K))]
    return {**base, "text": {name: base["text"][name] for name in kept}}
