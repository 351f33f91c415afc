"""The twig: a few decoder layers with a norm and head of their own, fed by base layer K - 1."""

import jax
import jax.numpy as jnp

from twig_jax.config import TextConfig, TwigConfig
from twig_jax.models.llama import Decoder
from twig_jax.models.llava import Params


def twig_decoder(text: TextConfig, twig: TwigConfig) -> Decoder:
    """The module; the twig has no embedding, it reads the states after base layer K - 1."""
    return Decoder(text, twig.T, embeds=False)


def init_twig(base: Params, text: TextConfig, twig: TwigConfig, how: str = "next") -> Params:
    """A twig's first parameters, copied from the base (paper, section 3.2).

    `how`: "next" takes base layers K .. K+T-1, "last" the last T layers. Norm and head are the
    base's. Raises ValueError where the base has too few layers.
    """
    twig.check(text.num_layers)
    first = {"next": twig.K, "last": text.num_layers - twig.T}[how]
    if first + twig.T > text.num_layers or first < 0:
        raise ValueError(f"a base of {text.num_layers} layers has no layers {first} + {twig.T}")
    layers = {f"layers_{t}": base["text"][f"layers_{first + t}"] for t in range(twig.T)}
    tree = {**layers, "norm": base["text"]["norm"], "lm_head": base["text"]["lm_head"]}
    return jax.tree.map(jnp.array, tree)
