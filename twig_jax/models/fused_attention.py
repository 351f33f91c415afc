"""Attention over blocks of keys as one kernel of a GPU, by Pallas and Triton.

XLA makes four to seven kernels of `attention.attend`, each with a start and an end of its own, and
scores [Q, S] that are written and read. This one keeps them on the chip, with a running maximum
(Milakov and Gimelshein 2018; flash attention, Dao et al. 2022). Where queries are few it reads
parts of the slots beside each other, as few rows have fewer heads than a GPU has processors (flash
decoding).
"""

from collections.abc import Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import pallas as pl

from twig_jax.models.attention import Context, attend
from twig_jax.sharding.rules import partition

try:
    from jax.experimental.pallas import triton
except ImportError:  # jax means to give it up one day
    triton = None  # type: ignore[assignment]

_ROWS = 64  # queries of a key head that one program takes
_SLOTS = 64  # read at a time, if their keys are no larger than
_KEYS = 2**14  # bytes, so that what is in flight fits on the smaller chips too
_PROGRAMS = 2048  # about as many of few queries as keep a GPU busy
_PARTS = 16  # of a block at most: they are added up one by one


def fuses(head_dim: int) -> bool:
    """Whether there is a kernel for heads of this width."""
    return triton is not None and head_dim in (16, 32, 64, 128, 256)


def fused_attend(q: jax.Array, context: Sequence[Context], *, interpret: bool = False) -> jax.Array:
    """`attention.attend` of q [B, Q, H, D], the same but for rounding.

    Each device of the mesh that is set attends for its rows and heads. interpret: computes on any
    device what the kernel would, slowly. Unless D is a power of two from 16 to 256, and where jax
    no longer has the kernel's compiler, it is `attend`.
    """
    if not fuses(q.shape[-1]):
        return attend(q, context)
    here = partial(_attend, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return here(q, context)
    heads = "tensor" if context[0].kv.k.shape[1] % mesh.shape["tensor"] == 0 else None

    def spec(x: jax.Array, *axes: str | None) -> Any:
        return partition(x.shape, ("rows", *axes), mesh)

    own = spec(q, None, heads)
    blocks = [
        c._replace(kv=jax.tree.map(lambda x: spec(x, heads), c.kv), mask=spec(c.mask))
        for c in context
    ]
    split = jax.shard_map(here, in_specs=(own, blocks), out_specs=own, check_vma=False)
    return split(q, list(context))


def _attend(q: jax.Array, context: Sequence[Context], *, interpret: bool) -> jax.Array:
    B, Q, H, D = q.shape
    K = context[0].kv.k.shape[1]
    queries = rearrange(q * D**-0.5, "B Q (K G) D -> B K (G Q) D", K=K)
    rows = queries.shape[2]
    size = min(max(pl.next_power_of_2(rows), 16), _ROWS)  # 16: a matrix unit's least
    count = pl.cdiv(rows, size)
    # Whole prompts keep a GPU busy without parts.
    most = min(max(_PROGRAMS // (B * K), 1), _PARTS) if count == 1 else 1
    blocks: list[jax.Array] = []
    shares = []
    for c in context:
        # Booleans have no addresses of their own in Triton.
        mask = jnp.broadcast_to(c.mask[:, None], (B, H // K, *c.mask.shape[1:])).astype(jnp.int8)
        blocks += [*c.kv, rearrange(mask, "B G Q S -> B (G Q) S")]
        shares.append(_Share.of(c.kv.k.shape[2], most, D * q.dtype.itemsize))
    parts = sum(share.parts for share in shares)
    # Few queries leave room for a third chunk in flight.
    compiler = triton.CompilerParams(num_warps=4, num_stages=3 if size == 16 else 2)
    sums, tops, totals = pl.pallas_call(
        partial(_kernel, shares, size, count),
        grid=(B, K * count, parts),
        in_specs=[pl.no_block_spec] * (1 + len(blocks)),
        out_specs=[pl.no_block_spec] * 3,
        out_shape=[
            jax.ShapeDtypeStruct((parts, B, K, rows, D), jnp.float32),
            jax.ShapeDtypeStruct((parts, B, K, rows), jnp.float32),
            jax.ShapeDtypeStruct((parts, B, K, rows), jnp.float32),
        ],
        compiler_params=None if interpret else compiler,
        interpret=interpret,
        name="fused_attention",
    )(queries, *blocks)
    # One after the other: a sum over an axis would be a kernel of its own.
    top = reduce(jnp.maximum, tops)
    weights = [jnp.exp(each - top) for each in tops]
    total = sum(w * each for w, each in zip(weights, totals, strict=True))
    out = sum(w[..., None] * each for w, each in zip(weights, sums, strict=True))
    out = out / jnp.maximum(total, 1e-30)[..., None]
    return rearrange(out, "B K (G Q) D -> B Q (K G) D", Q=Q).astype(q.dtype)


class _Share(NamedTuple):
    """How a block of slots is shared: parts of so many chunks each, of so many slots."""

    parts: int
    chunks: int
    width: int

    @classmethod
    def of(cls, slots: int, most: int, size: int) -> "_Share":
        """In `most` parts or fewer, of slots whose keys are `size` bytes each."""
        width = max(min(pl.next_power_of_2(slots), _SLOTS, _KEYS // size), 16)
        chunks = pl.cdiv(pl.cdiv(slots, width), most)
        return cls(pl.cdiv(slots, chunks * width), chunks, width)


def _kernel(shares: Sequence[_Share], size: int, count: int, q_ref: Any, *refs: Any) -> None:
    """`size` queries of a key head of a row of the batch over one part of the slots.

    Each head has `count` such programs.
    """
    blocks, out_refs = refs[:-3], refs[-3:]
    b, program, part = (pl.program_id(axis) for axis in range(3))
    queries = pl.ds(program % count * size, size)
    first = 0
    for i, share in enumerate(shares):
        block = blocks[3 * i : 3 * i + 3]
        place = (part, b, program // count, queries)
        mine = (part >= first) & (part < first + share.parts)
        pl.when(mine)(partial(_part, share, part - first, place, q_ref, block, out_refs))
        first += share.parts


def _part(
    share: _Share, number: Any, place: tuple[Any, ...], q_ref: Any, block: Any, out_refs: Any
) -> None:
    """Part `number` of a block: its weighted sum, top and total, which belong in a place of all."""
    k_ref, v_ref, mask_ref = block
    part, b, head, queries = place
    rows, D = q_ref.shape[2:]
    size = queries.size
    real = queries.start + jnp.arange(size) < rows
    q = _load(q_ref.at[b, head, queries, :], real[:, None])

    def add(i: Any, carry: Any) -> Any:
        """Adds a chunk to what there is: maximum, total of the weights, and their sum."""
        top, total, out = carry
        began = (number * share.chunks + i) * share.width
        slots = pl.ds(began, share.width)
        there = began + jnp.arange(share.width) < k_ref.shape[2]
        # All that is read is asked for first.
        seen = _load(mask_ref.at[b, queries, slots], real[:, None] & there)
        k = _load(k_ref.at[b, head, slots, :], there[:, None])
        v = _load(v_ref.at[b, head, slots, :], there[:, None])
        logits = jnp.dot(q, k.T, preferred_element_type=jnp.float32)
        logits = jnp.where(seen != 0, logits, -jnp.inf)
        higher = jnp.maximum(top, logits.max(1))
        weights, kept = jnp.exp(logits - higher[:, None]), jnp.exp(top - higher)
        more = jnp.dot(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return higher, total * kept + weights.sum(1), out * kept[:, None] + more

    lowest = jnp.full(size, jnp.finfo(jnp.float32).min)
    carry = lowest, jnp.zeros(size), jnp.zeros((size, D))
    top, total, out = (
        add(0, carry) if share.chunks == 1 else jax.lax.fori_loop(0, share.chunks, add, carry)
    )
    sums, tops, totals = out_refs
    triton.store(sums.at[part, b, head, queries, :], out, mask=real[:, None])
    triton.store(tops.at[part, b, head, queries], top, mask=real)
    triton.store(totals.at[part, b, head, queries], total, mask=real)


def _load(ref: Any, mask: jax.Array) -> jax.Array:
    """What a masked load reads, zeros elsewhere."""
    shape = jnp.broadcast_shapes(mask.shape, tuple(ref.shape))
    return triton.load(ref, mask=jnp.broadcast_to(mask, shape), other=0)
