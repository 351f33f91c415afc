"""VisionZip: tokens that the vision tower attends to, and merged ones for the rest."""

from functools import partial

import jax
import jax.numpy as jnp

from twig_jax.evaluation.pruners.probe import Probe
from twig_jax.pruning.schedule import Ranked

# Of 64 tokens, so many are merged ones (the paper's 54 + 10, 108 + 20, 162 + 30).
_CONTEXTUAL = 10 / 64


def visionzip(probe: Probe, retained: int) -> Ranked:
    """Dominant tokens by the class token's attention; the others are merged into a few of them.

    The few are evenly spaced among the others; each of the rest goes to the one whose key is most
    like its own, and what was brought together is averaged, as in the paper. (The released code
    adds the mean of what was brought to the token, and one of its dominant tokens is always the
    class token, which LLaVA's decoder was not trained with.) Merged tokens stay in the slots, and
    at the positions, of those few.
    """
    contextual = round(_CONTEXTUAL * retained)
    scores, features = jax.vmap(
        partial(merged, dominant=retained - contextual, contextual=contextual)
    )(probe.class_attention, probe.vision_keys, probe.features)
    return Ranked(scores, probe.project(features))


def merged(
    attention: jax.Array, keys: jax.Array, features: jax.Array, dominant: int, contextual: int
) -> tuple[jax.Array, jax.Array]:
    """Attention [V], keys [V, D], features [V, d] -> (scores [V], features with the merged ones).

    Scores are 2 for the dominant, 1 for those merged into, else 0.
    """
    V = len(attention)
    _, best = jax.lax.top_k(attention, dominant)
    scores = jnp.zeros(V).at[best].set(2.0)
    rest = V - dominant
    if not contextual or rest <= contextual:
        return jnp.where(scores > 0, scores, 1.0 if contextual else 0.0), features
    others = jnp.sort(jnp.where(scores > 0, V, jnp.arange(V)))[:rest]  # in their order
    targets = others[jnp.arange(contextual) * (rest // contextual)]
    unit = keys.astype(jnp.float32)
    unit = unit / jnp.maximum(jnp.linalg.norm(unit, axis=-1, keepdims=True), 1e-12)
    to = (unit[others] @ unit[targets].T).argmax(1)  # [rest]
    own = others[:, None] == targets  # [rest, contextual]
    to = jnp.where(own.any(1), own.argmax(1), to)
    group = jax.nn.one_hot(to, contextual, axis=0)  # [contextual, rest]
    mean = (group @ features[others].astype(jnp.float32)) / group.sum(1, keepdims=True)
    return scores.at[targets].set(1.0), features.at[targets].set(mean.astype(features.dtype))
