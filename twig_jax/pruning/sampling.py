"""Drawing visual tokens without replacement, with the exact probability of what was drawn.

The Plackett-Luce model: tokens are drawn one after the other from s, which is renormalised after
each draw. The R highest of log s + Gumbel noise, in descending order, are such a draw (Kool et al.
2019, arXiv 1903.06059), so that shapes are static and nothing is drawn in a loop.
"""

import jax
import jax.numpy as jnp

_NEVER = -1e30  # finite: gradients of infinite logarithms are not numbers


def draw(key: jax.Array, logs: jax.Array, visible: jax.Array, count: int) -> jax.Array:
    """`count` different tokens in the order they are drawn, int32 [..., count].

    logs float32 [..., S]: log s; visible bool [..., S]: what can be drawn. Where there are fewer,
    the rest are tokens that cannot.
    """
    noise = jax.random.gumbel(key, logs.shape, jnp.float32)
    return jax.lax.top_k(jnp.where(visible, logs + noise, -jnp.inf), count)[1].astype(jnp.int32)


def log_probability(
    logs: jax.Array, visible: jax.Array, drawn: jax.Array, counts: jax.Array
) -> jax.Array:
    """log π of draws in their order: Σ_j [log s(a_j) − log(1 − Σ_{i<j} s(a_i))], float32 [...].

    logs, visible: as in `draw`; drawn int32 [..., R], of which the first counts [...] count. All
    are broadcast to what was drawn.
    """
    R = drawn.shape[-1]
    logs = jnp.where(visible, logs, _NEVER)
    logs = jnp.broadcast_to(logs, (*drawn.shape[:-1], logs.shape[-1]))
    own = jnp.take_along_axis(logs, drawn, axis=-1)
    left_over = jnp.put_along_axis(
        logs, drawn, jnp.full(drawn.shape, _NEVER), axis=-1, inplace=False
    )
    # What is left before each draw: it, the later ones, and what is never drawn.
    rest = jax.nn.logsumexp(left_over, axis=-1, keepdims=True)
    remaining = jax.lax.cumlogsumexp(
        jnp.concatenate([own, rest], axis=-1), axis=logs.ndim - 1, reverse=True
    )
    return jnp.where(jnp.arange(R) < counts[..., None], own - remaining[..., :-1], 0).sum(-1)
