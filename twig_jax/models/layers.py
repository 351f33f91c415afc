"""Small layers shared by the models."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from twig_jax.models.cpu import Transposed, floats
from twig_jax.models.int8 import Int8


class Dense(nn.Dense):
    """A linear layer, without bias unless told, whose kernel may be `Int8` or `Transposed`."""

    use_bias: bool = False

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] -> [..., out]."""
        kernel = self.get_variable("params", "kernel")
        if not isinstance(kernel, Int8 | Transposed):
            return super().__call__(x)
        y = kernel.after(x)
        return y + self.get_variable("params", "bias") if self.use_bias else y


class Embed(nn.Embed):
    """A table of words, which may be its bits; see cpu.py."""

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int32 [...] -> [..., d]."""
        return floats(super().__call__(tokens))

    def attend(self, x: jax.Array) -> jax.Array:
        """As a head: [..., d] -> [..., V]."""
        if self.embedding.dtype != jnp.uint16:
            return super().attend(x)
        return Transposed(floats(self.embedding)).after(x)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis, computed in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return scale * y.astype(x.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, computed in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def quick_gelu(x: jax.Array) -> jax.Array:
    """CLIP's approximation of GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


def traced_once(layer: nn.Module, *args: Any, attention: Any) -> Any:
    """layer(*args, attention=attention), traced once for all layers and arguments of its shapes.

    layer: a bound one, of a stack of equal ones. attention: a function that lives as long as the
    program, as each new one is traced anew. Compilers get the same program: they put such calls in
    their place first. A layer whose parameters are made, or whose intermediates are captured, is
    called itself.
    """
    if layer.is_initializing() or layer.is_mutable_collection("intermediates"):
        return layer(*args, attention=attention)
    alone = layer.clone(parent=None, name=None)
    return _applied(alone, layer.variables, *args, attention=attention)


@partial(jax.jit, static_argnums=0, static_argnames="attention")
def _applied(layer: nn.Module, variables: Any, *args: Any, attention: Any) -> Any:
    return layer.apply(variables, *args, attention=attention)
