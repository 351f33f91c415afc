"""Weights of 8 bits: half the bytes of bfloat16, which is what decoding at small batches waits for.

Symmetric, one scale an output channel, weights alone:

    scale = max |w| / 127 of a column,  values = round(w / scale),  x w ~ (x values) scale

The scale comes after the product, so that the values' conversion is all that is left before it:
compilers for accelerators make it where the product reads its operand, and no float copy of a
kernel is written. For CPUs, where one would be, it is another product (cpu.py). Values lie as
[out, in]: GPUs read them faster where what is summed over is contiguous (docs/performance.md).
Google's qwix does the same for any model, by replacing jax's products while a module is traced;
here there is one kind of layer, and its parameters stay a plain tree of arrays.
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from twig_jax.models.cpu import FEW, Transposed, in_digits, restored
from twig_jax.sharding.rules import path_string

Params = Any

# The kernels of a decoder, as a base or as a twig: all that every token reads, but for the norms.
_KERNELS = re.compile(r"(text/)?(layers_\d+/(q|k|v|o|gate|up|down)_proj|lm_head)/kernel")


class Int8(NamedTuple):
    """A kernel [in, out] in int8, transposed."""

    values: jax.Array  # int8 [out, in], from -127 to 127
    scale: jax.Array  # float32 [out]

    def after(self, x: jax.Array) -> jax.Array:
        """x @ kernel: [..., in] -> [..., out] of the same type, summed in float32."""

        def product(x: jax.Array, values: jax.Array) -> jax.Array:
            w = values.astype(x.dtype)
            return jnp.einsum("...i,oi->...o", x, w, preferred_element_type=jnp.float32)

        few = x.size // x.shape[-1] <= FEW // 3  # of up to three digits each
        cpu = in_digits if few else product
        y = jax.lax.platform_dependent(x, self.values, cpu=cpu, default=product)
        return (y * self.scale).astype(x.dtype)


@jax.jit
def quantise(kernel: Any) -> Int8:
    """A float kernel [in, out] in int8: no entry is off by more than half its column's scale."""
    w = jnp.asarray(kernel, jnp.float32)
    largest = jnp.abs(w).max(0)
    scale = jnp.where(largest > 0, largest / 127, 1.0)
    return Int8(jnp.round(w / scale).astype(jnp.int8).T, scale)


def is_kernel(path: str) -> bool:
    """Whether the parameter at 'a/b/c' of a base or twig is a kernel of its decoder."""
    return _KERNELS.fullmatch(path) is not None


def quantised(params: Params) -> Params:
    """A base's or twig's parameters with the kernels of its decoder in int8."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: quantise(restored(x)) if is_kernel(path_string(path)) else x,
        params,
        is_leaf=lambda x: isinstance(x, Transposed),
    )
