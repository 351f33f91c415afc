"""Small layers shared by the models."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from twig_jax.models.int8 import Int8


class Dense(nn.Dense):
    """A linear layer without bias, whose kernel may be `Int8`."""

    use_bias: bool = False

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] -> [..., out]."""
        kernel = self.get_variable("params", "kernel")
        return kernel.after(x) if isinstance(kernel, Int8) else super().__call__(x)


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
