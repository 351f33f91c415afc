"""bfloat16 on CPUs: parameters as XLA's programs for CPUs read them as they are.

For CPUs XLA knows one fast operation on bfloat16, products of matrices that are summed in float32;
with AMX or AVX512-BF16 they are far faster than float32's. All else is widened to float32 first,
and whole: the kernel that one vector is multiplied by, the table that one row is taken from, the
cache that one slot is written to. So here

    kernels      are [out, in], which is read at twice the rate of [in, out],
    few vectors  are multiplied as four: one vector is no matrix, and four are as fast as two,
    embeddings   are their bits, of which rows are taken and become bfloat16,
    caches       are float32 (`Weights.cache_dtype`): written in place, and one query's attention
                 to them is a product of float32.

Values and results are those of bfloat16 elsewhere. docs/performance.md has what it brings.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from twig_jax.sharding.rules import path_string

Params = Any

_FEWEST = 4  # vectors of a product


class Transposed(NamedTuple):
    """A kernel [in, out], transposed."""

    values: jax.Array  # [out, in]

    def after(self, x: jax.Array) -> jax.Array:
        """x @ kernel: [..., in] -> [..., out] of the same type, summed in float32."""
        # Of more than two axes XLA would transpose the kernel.
        rows = x.reshape(-1, x.shape[-1])
        padded = jnp.pad(rows, ((0, max(_FEWEST - len(rows), 0)), (0, 0)))
        y = jnp.einsum("ni,oi->no", padded, self.values, preferred_element_type=jnp.float32)
        return y[: len(rows)].astype(x.dtype).reshape(*x.shape[:-1], -1)


def arranged(path: str, x: Any) -> Any:
    """The parameter at 'a/b/c' of a base or twig as it is read here.

    On other devices, of other types, and where it is arranged already it stays.
    """
    if jax.default_backend() != "cpu" or getattr(x, "dtype", None) != jnp.bfloat16:
        return x
    if path.endswith("/kernel"):
        return Transposed(jnp.asarray(x).T)
    return _bits(jnp.asarray(x)) if path.endswith("embed_tokens/embedding") else x


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


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint16)
