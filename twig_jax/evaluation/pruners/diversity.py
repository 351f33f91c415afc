"""Choosing tokens that differ from each other."""

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange

from twig_jax.evaluation.pruners.probe import Probe
from twig_jax.pruning.schedule import Ranked

# Tokens of image and question that DART compares the others with.
_PIVOTS = 4


def _unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def divprune(probe: Probe, retained: int) -> Ranked:
    """The greedy answer to the max-min problem over cosine distances of visual embeddings."""
    return Ranked(jax.vmap(lambda x: max_min(x, retained))(probe.visual))


def max_min(x: jax.Array, retained: int) -> jax.Array:
    """x [V, d] -> float32 [V], positive for the chosen, highest for the first.

    The first is farthest from its nearest neighbour; each next one from its nearest chosen.
    """
    unit = _unit(x)
    distance = 1 - unit @ unit.T
    V = len(x)
    nearest = jnp.where(jnp.eye(V, dtype=bool), jnp.inf, distance).min(1)
    first = nearest.argmax()
    scores = jnp.zeros(V).at[first].set(retained)

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        scores, nearest = carry
        new = jnp.where(scores > 0, -jnp.inf, nearest).argmax()
        return scores.at[new].set(retained - i), jnp.minimum(nearest, distance[new])

    return jax.lax.fori_loop(1, retained, step, (scores, distance[first]))[0]


def dart(probe: Probe, retained: int) -> Ranked:
    """Pivots, and for each the tokens that duplicate it least; after K layers.

    Pivots are the visual tokens and the last text tokens with the largest keys; the others are
    compared by the states that go on. (The released code compares them after the decoder's last
    norm, which the paper does not speak of.)
    """
    x, kv = probe.run(probe.K)
    assert kv is not None
    size = jnp.abs(rearrange(kv.k, "B K P D -> B P (K D)").astype(jnp.float32)).sum(-1)  # [B, P]
    slots = jnp.arange(x.shape[1])
    last_visual = jnp.where(probe.is_visual, slots, -1).max(1, keepdims=True)
    asks = probe.real & (slots > last_visual)
    found, texts = jax.lax.top_k(jnp.where(asks, size, -1), _PIVOTS)
    texts = jnp.where(found < 0, texts[:, :1], texts)  # the best again where there are too few
    own = jnp.take_along_axis(x, texts[..., None], axis=1)
    chosen = jax.vmap(partial(least_duplicated, retained=retained))(
        probe.of_visual(x), probe.of_visual(size), own
    )
    return Ranked(chosen)


def least_duplicated(x: jax.Array, size: jax.Array, texts: jax.Array, retained: int) -> jax.Array:
    """States x [V, d] with key sizes [V] and text pivots [p, d] -> float32 [V], 1 for the chosen.

    The pivots take turns: each in its turn takes an equal share of what is left to choose, the
    least similar ones to it.
    """
    chosen = min(_PIVOTS, retained)
    _, pivots = jax.lax.top_k(size, chosen)
    every = jnp.concatenate([x[pivots], texts])
    similar = _unit(every) @ _unit(x).T  # [pivots, V]
    taken = jnp.zeros(len(x), bool).at[pivots].set(True)
    for i in range(len(every)):
        share = (retained - chosen) * (i + 1) // len(every) - (retained - chosen) * i // len(every)
        if share:
            _, new = jax.lax.top_k(jnp.where(taken, -jnp.inf, -similar[i]), share)
            taken = taken.at[new].set(True)
    return taken.astype(jnp.float32)
