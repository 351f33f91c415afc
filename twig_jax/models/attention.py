"""Attention over one or several blocks of keys, and single rows of it.

Letters: B batch, Q query and S key positions, H heads, K key/value heads, G = H / K, D head width.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange


class KV(NamedTuple):
    """Keys (after RoPE) and values of one layer, both [B, K, S, D].

    Heads lead, so that attention reads them as they lie: with slots first, every step would copy
    the whole cache into this order.
    """

    k: jax.Array
    v: jax.Array


class Context(NamedTuple):
    """A block of keys and values with the mask that says which query sees which of its slots."""

    kv: KV
    mask: jax.Array  # bool [B, Q, S]


# Of queries [B, Q, H, D] over a context -> [B, Q, H, D]: `attend`, or what suits a device better.
Attention = Callable[[jax.Array, Sequence[Context]], jax.Array]


def rope_angles(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin of the rotary angles, float32 [..., S, D], for int32 positions [..., S].

    Both halves of D have the same angles.
    """
    inv_freq = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None].astype(jnp.float32) * inv_freq  # [..., S, D/2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([sin, sin], axis=-1)


def apply_rope(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates x [B, S, H, D] by the angles of `rope_angles` (the rotate-half convention)."""
    cos, sin = (t[:, :, None, :] for t in rope)  # [B, S, 1, D]
    y = x.astype(jnp.float32)
    x1, x2 = jnp.split(y, 2, axis=-1)
    # Sums of whole heads: halves that are made apart are put together by kernels of their own.
    return (y * cos + jnp.concatenate([-x2, x1], axis=-1) * sin).astype(x.dtype)


def _logits(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    """Scaled, masked float32 attention logits [B, K, R, S], R = G·Q queries of a key head."""
    q = rearrange(q * q.shape[-1] ** -0.5, "B Q (K G) D -> B K (G Q) D", K=k.shape[1])
    q = q.astype(k.dtype)
    if 4 * mask.shape[1] < k.shape[2]:
        # Few queries over a cache: with the keys on the left, CPUs need no transposed copy of them.
        logits = jnp.einsum("BKSD,BKRD->BKSR", k, q, preferred_element_type=jnp.float32)
        logits = logits.swapaxes(2, 3)
    else:
        logits = jnp.einsum("BKRD,BKSD->BKRS", q, k, preferred_element_type=jnp.float32)
    return jnp.where(jnp.tile(mask, (1, q.shape[2] // mask.shape[1], 1))[:, None], logits, -jnp.inf)


_QUERIES = 512  # of long sequences that are attended at a time
_CAUSAL = 256  # of shorter ones, where that leaves out keys


def queries_at_once(count: int) -> int:
    """How many of so many causal queries `attend` has scores of at the same time."""
    return min(count, _CAUSAL if count <= 2 * _QUERIES else _QUERIES)


def attend(q: jax.Array, context: Sequence[Context], causal: bool = False) -> jax.Array:
    """Softmax attention of q [B, Q, H, D] over the union of several blocks; returns [B, Q, H, D].

    The blocks share one softmax but are never concatenated, so a cache is read in place; one may
    be of a wider type than q. A query that sees nothing (padding) returns zeros. In long sequences
    the scores [Q, S] are never there as a whole, in the backward pass neither. causal: the last
    block is the queries' own, of which none sees what is behind itself; what no query of a part
    sees is left out then.
    """
    Q = q.shape[1]
    if Q <= 2 * _QUERIES:
        size = _CAUSAL if causal else Q
        parts = [slice(at, at + size) for at in range(0, Q, size)]
        return jnp.concatenate(
            [_attend(q[:, part], _seen_by(part, context, causal)) for part in parts], axis=1
        )

    def chunks(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, -Q % _QUERIES)] + [(0, 0)] * (x.ndim - 2))
        return rearrange(x, "B (n c) ... -> n B c ...", c=_QUERIES)

    @jax.checkpoint
    def chunk(q: jax.Array, masks: list[jax.Array]) -> jax.Array:
        return _attend(q, [Context(c.kv, mask) for c, mask in zip(context, masks, strict=True)])

    out = jax.lax.map(lambda part: chunk(*part), (chunks(q), [chunks(c.mask) for c in context]))
    return rearrange(out, "n B c H D -> B (n c) H D")[:, :Q]


causal_attend = functools.partial(attend, causal=True)


def _seen_by(queries: slice, context: Sequence[Context], causal: bool) -> list[Context]:
    """What some queries see of it."""
    found = [Context(c.kv, c.mask[:, queries]) for c in context]
    if causal:
        kv, mask = found[-1]
        kv = KV(*(x[:, :, : queries.stop] for x in kv))
        found[-1] = Context(kv, mask[:, :, : queries.stop])
    return found


def _attend(q: jax.Array, context: Sequence[Context]) -> jax.Array:
    logits = jnp.concatenate([_logits(q, c.kv.k, c.mask) for c in context], axis=-1)
    weights, total = _softmax(logits)
    ends = itertools.accumulate(c.kv.k.shape[2] for c in context[:-1])
    parts = [
        jnp.einsum(
            "BKRS,BKSD->BKRD",
            w.astype(c.kv.v.dtype),
            c.kv.v,
            preferred_element_type=jnp.float32,
        )
        for w, c in zip(
            jnp.split(weights.astype(q.dtype), list(ends), axis=-1), context, strict=True
        )
    ]
    out = functools.reduce(jnp.add, parts) / total
    return rearrange(out, "B K (G Q) D -> B Q (K G) D", Q=q.shape[1]).astype(q.dtype)


def _softmax(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights over the last axis and their sum, to be divided by it; zeros where all is -inf."""
    # Finite also where nothing is seen; the softmax does not depend on it, so no gradient flows.
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.exp(logits - jnp.maximum(top, jnp.finfo(jnp.float32).min))
    return weights, jnp.maximum(weights.sum(-1, keepdims=True), jnp.float32(1e-30))


def attention_rows(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    """Attention probabilities of a few queries a row of the batch.

    q [B, Q, H, D], k [B, K, S, D], mask bool [B, Q, S] -> float32 [B, H, Q, S]; zeros where a query
    sees nothing. This is O(Q·S·D): pruning never needs the whole S x S matrix, whatever kernel
    computes the layer itself.
    """
    weights, total = _softmax(_logits(q, k, mask))
    return rearrange(weights / total, "B K (G Q) S -> B (K G) Q S", Q=q.shape[1])
