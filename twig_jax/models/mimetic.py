"""An initialisation for decoders that are trained from scratch.

Mimetic initialisation (Trockman and Kolter, arXiv 2305.09828) sets products of attention weights
near multiples of the identity, as trained transformers have them: tokens then attend to tokens like
themselves and copy what they find. Looking up the named cell of a page is a chain of such steps.
"""

import jax
import jax.numpy as jnp

from twig_jax.config import TextConfig
from twig_jax.models.llava import Params


def mimetic(
    base: Params, text: TextConfig, rng: jax.Array, match: float = 1.0, copy: float = 0.15
) -> Params:
    """The base with its decoder's attention and head set anew.

    In every layer W_q = W_k = `match` · U and W_v W_o = `copy` · I, where U is a random orthogonal
    matrix split over the heads; noise of the usual initialisation is kept on top. The head starts
    as the embedding. Needs as many key as query heads, and heads as wide as the model together.
    """
    if text.num_kv_heads != text.num_heads or text.num_heads * text.head_dim != text.hidden_size:
        raise ValueError("mimetic initialisation needs full multi-head attention")
    decoder = dict(base["text"])
    orthogonal = jax.nn.initializers.orthogonal()
    for i in range(text.num_layers):
        rng, a, b = jax.random.split(rng, 3)
        u, v = (orthogonal(key, (text.hidden_size, text.hidden_size)) for key in (a, b))
        layer = dict(decoder[f"layers_{i}"])
        for name, matrix in (
            ("q_proj", match * u),
            ("k_proj", match * u),
            ("v_proj", v),
            ("o_proj", copy * v.T),
        ):
            layer[name] = {"kernel": layer[name]["kernel"] + matrix}
        decoder[f"layers_{i}"] = layer
    decoder["lm_head"] = {"kernel": jnp.array(decoder["embed_tokens"]["embedding"].T)}
    return {**base, "text": decoder}
