"""Growing a decoder in depth without changing what it computes."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from twig_jax.models.llava import Params


def deepen(base: Params, source: Sequence[int | None]) -> Params:
    """The base with `len(source)` decoder layers: layer i is a copy of old layer source[i].

    None stands for a new layer that starts as the identity: a copy of the nearest layer before it
    whose two output projections are zero (block expansion, LLaMA Pro, arXiv 2401.02415), so the
    deeper model starts with the same logits. Raises ValueError unless every old layer is used once,
    in order.
    """
    text = base["text"]
    old = [n for n in text if n.startswith("layers_")]
    if [s for s in source if s is not None] != list(range(len(old))):
        raise ValueError(
            f"{tuple(source)} must name each of the {len(old)} old layers once, in order"
        )
    layers, nearest = {}, 0
    for i, s in enumerate(source):
        nearest = nearest if s is None else s
        layer = jax.tree.map(jnp.array, text[f"layers_{nearest}"])
        if s is None:
            for name in ("o_proj", "down_proj"):
                layer[name] = jax.tree.map(jnp.zeros_like, layer[name])
        layers[f"layers_{i}"] = layer
    rest = {n: v for n, v in text.items() if n not in old}
    return {**base, "text": {**rest, **layers}}
