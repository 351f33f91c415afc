"""The fixed-budget gather: from scores to the prompt slots that go on."""

import jax
import jax.numpy as jnp


def select(
    scores: jax.Array,
    is_visual: jax.Array,
    lengths: jax.Array,
    retained: jax.Array,
    text_slots: int,
    retained_slots: int,
) -> jax.Array:
    """Prompt slots of every text token and the best visual ones, in their original order.

    scores float32 [B, P] (read at visual slots only), is_visual bool [B, P], lengths int32 [B],
    retained int32 [B] (R of each row, at most `retained_slots`) -> int32 [B, Q] with
    Q = text_slots + retained_slots, of either at most P; unused slots hold P and come last. Of
    equal scores the lower slot wins. Slots with NaN or -inf are never kept, however many there is
    room for.
    """
    P = scores.shape[1]
    real = jnp.arange(P) < lengths[:, None]
    text = first_of(real & ~is_visual, text_slots)
    if retained_slots == 0:
        return text
    retained_slots = min(retained_slots, P)
    ranked = jnp.where(is_visual & real & ~jnp.isnan(scores), scores, -jnp.inf)
    best, visual = jax.lax.top_k(ranked, retained_slots)  # [B, R_max]
    keep = (jnp.arange(retained_slots) < retained[:, None]) & (best > -jnp.inf)
    return jnp.sort(jnp.concatenate([text, jnp.where(keep, visual, P)], axis=1), axis=1)


def first_of(wanted: jax.Array, slots: int) -> jax.Array:
    """The first `slots` indices of what is wanted, ascending, padded with the width.

    bool [B, S] -> int32 [B, slots].
    """
    S = wanted.shape[1]
    indices = jnp.sort(jnp.where(wanted, jnp.arange(S, dtype=jnp.int32), S), axis=1)
    return indices[:, :slots]


def take(x: jax.Array, indices: jax.Array) -> jax.Array:
    """x [B, S, ...] at indices [B, Q]; an index past the end gives zeros."""
    expanded = indices.reshape(indices.shape + (1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, expanded, axis=1, mode="fill", fill_value=0)
