"""Parameters on CPUs: where they lie and how, so that XLA's programs read them as they are.

Large ones lie in huge pages, where the system has them: a step reads all weights, and with pages of
4 KiB 5 to 7 % of its time is spent on looking up where they are.

Of bfloat16 XLA knows one fast operation for CPUs, products of matrices that are summed in float32;
with AMX or AVX512-BF16 they are far faster than float32's. All else is widened to float32 first,
and whole: the kernel that one vector is multiplied by, the table that one row is taken from, the
cache that one slot is written to. So of bfloat16 here

    kernels      are `Transposed`, and a single vector is multiplied as several,
    embeddings   are their bits, of which rows are taken and become bfloat16,
    caches       are float32 (`Weights.cache_dtype`): written in place, and one query's attention
                 to them is a product of float32.

Of float32 large kernels are `Transposed`. Kernels of int8 are multiplied by vectors that are
written as int8 too. Values and results are those of other devices; docs/performance.md has what it
brings.
"""

import contextlib
import mmap
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint

from twig_jax.sharding.rules import path_string

Params = Any

FEW = 64  # vectors at most that a kernel is multiplied by on its right
_AT_A_TIME = 4  # of these
_PAGE = 1 << 21  # a huge one of x86 and ARM


class Transposed(NamedTuple):
    """A kernel [in, out], transposed.

    For few vectors it is the left operand, which XLA's library reads as it lies; the right one is
    copied into another order first. So up to 16 vectors take hardly longer than two.
    """

    values: jax.Array  # [out, in]

    def after(self, x: jax.Array) -> jax.Array:
        """x @ kernel: [..., in] -> [..., out] of the same type, summed in float32."""
        # Of more than two axes XLA would transpose the kernel.
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) > FEW:
            y = jnp.einsum("ni,oi->no", rows, self.values, preferred_element_type=jnp.float32)
        elif len(rows) == 1 and rows.dtype == jnp.float32:
            y = jnp.einsum("oi,ni->on", self.values, rows).T
        else:
            y = _few_after(rows, self.values, jnp.float32)
        return y.astype(x.dtype).reshape(*x.shape[:-1], -1)


def in_digits(x: jax.Array, values: jax.Array) -> jax.Array:
    """x values^T, [..., in] and int8 [out, in] -> float32 [..., out], by products of int8 alone.

    For few vectors. XLA would write the kernel as floats first; a product of two int8 arrays reads
    it as it lies, and sums exactly. So each vector is written as digits of base 254, three of
    float32, two of other types, which are multiplied beside each other. It is off by at most half
    of the last digit, 1 / 254^3 or 1 / 254^2 of its largest entry.
    """
    rows = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    scale = jnp.abs(rows).max(1, keepdims=True) / 127
    rest = rows / jnp.where(scale > 0, scale, 1)
    digits = []
    for _ in range(3 if x.dtype == jnp.float32 else 2):
        digits.append(jnp.round(rest))
        rest = (rest - digits[-1]) * 254
    y = _few_after(jnp.concatenate(digits).astype(jnp.int8), values, jnp.int32)
    parts = y.astype(jnp.float32).reshape(len(digits), len(rows), -1)
    y = sum(part / 254**i for i, part in enumerate(parts)) * scale
    return y.reshape(*x.shape[:-1], -1)


def _few_after(rows: jax.Array, kernel: jax.Array, summed: Any) -> jax.Array:
    """rows kernel^T, which stays in place: [n, in] and [out, in] -> [n, out] of type `summed`."""
    padded = _row_major(jnp.pad(rows, ((0, -len(rows) % _AT_A_TIME), (0, 0))))
    y = jnp.einsum("oi,ni->on", kernel, padded, preferred_element_type=summed)
    # Not a plain transpose, which XLA would take as leave to exchange the two operands.
    return _row_major(_row_major(y)[:, : len(rows)].T)


def _row_major(x: jax.Array) -> jax.Array:
    """x [a, b] in this order in memory."""
    return with_layout_constraint(x, Layout((0, 1)))


def arranged(path: str, x: Any) -> Any:
    """The parameter at 'a/b/c' of a base or twig as it is read here.

    x: an array, or a kernel that is `Transposed` or `Int8`. It stays on other devices, and where it
    is arranged already.
    """
    if jax.default_backend() != "cpu" or not hasattr(x, "dtype"):
        return x
    large = x.dtype == jnp.float32 and x.nbytes >= _PAGE
    if path.endswith("/kernel") and (large or x.dtype == jnp.bfloat16):
        return Transposed(_in_huge_pages(jnp.asarray(x).T))
    if x.dtype == jnp.bfloat16 and path.endswith("embed_tokens/embedding"):
        x = jax.lax.bitcast_convert_type(jnp.asarray(x), jnp.uint16)
    return _in_huge_pages(x)


def arrange(params: Params) -> Params:
    """A base's or twig's parameters, each as `arranged`."""
    return jax.tree_util.tree_map_with_path(lambda path, x: arranged(path_string(path), x), params)


def restored(params: Params) -> Params:
    """What `arrange` was given."""
    return jax.tree.map(
        lambda x: x.values.T if isinstance(x, Transposed) else floats(x),
        params,
        is_leaf=lambda x: isinstance(x, Transposed),
    )


def floats(x: jax.Array) -> jax.Array:
    """bfloat16 of its bits; all else stays."""
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def _in_huge_pages(x: Any) -> Any:
    """The array, copied to pages of its own if it fills one and lies on the first device alone."""
    if x.nbytes < _PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return x
    if isinstance(x, jax.Array):
        here = x.sharding.device_set == {jax.local_devices()[0]}
        if not here or x.unsafe_buffer_pointer() % _PAGE == 0:
            return x
    pages = mmap.mmap(-1, x.nbytes + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # of a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    room = np.frombuffer(pages, np.uint8)
    room = room[-room.ctypes.data % _PAGE :][: x.nbytes].view(x.dtype).reshape(x.shape)
    room[...] = x
    return jax.device_put(room, may_alias=True)
