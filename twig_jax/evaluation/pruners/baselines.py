"""Choosing without looking: what a ranking has to beat."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from twig_jax.evaluation.pruners.probe import Probe
from twig_jax.pruning.schedule import Ranked


def random(probe: Probe, retained: int) -> Ranked:
    """All subsets alike; the draw depends on the request alone."""
    V = probe.visual.shape[1]
    key = jax.random.key(0)
    return Ranked(
        jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i), (V,)))(probe.seeds)
    )


def uniform(probe: Probe, retained: int) -> Ranked:
    """A grid: patches in the order in which they are farthest from those before them."""
    vision = probe.config.vision
    M, order = vision.num_tokens, farthest_first(math.isqrt(vision.num_patches))
    ranks = np.full(M, float(len(order)))  # a class token, which leads, comes last
    ranks[order + (M - len(order))] = np.arange(len(order))
    images = probe.visual.shape[1] // M
    row = np.tile(-ranks, images)
    return Ranked(jnp.broadcast_to(jnp.asarray(row, jnp.float32), (len(probe.tokens), len(row))))


def farthest_first(side: int) -> np.ndarray:
    """Cells of a side x side grid, from its middle on, each as far as can be from those before.

    Whatever the number kept, they cover the image evenly: of equal distances, which are many, no
    side of the image goes first.
    """
    cells = np.stack(np.divmod(np.arange(side * side), side), axis=1)
    order = [(side // 2) * side + side // 2]
    distance = np.full(side * side, np.inf)
    lots = np.random.default_rng(0).random(side * side) / 2  # squared distances are whole numbers
    while len(order) < side * side:
        distance = np.minimum(distance, ((cells - cells[order[-1]]) ** 2).sum(1))
        order.append(int((distance + lots * (distance > 0)).argmax()))
    return np.array(order)
