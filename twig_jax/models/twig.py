"""The twig: a few decoder layers with a norm and head of their own, fed by base layer K - 1."""

import jax
import jax.numpy as jnp

from twig_jax.config import TextConfig, TwigConfig
from twig_jax.models.llama import Decoder
from twig_jax.models.llava import Params


def twig_decoder(text: TextConfig, twig: TwigConfig) -> Decoder:
    """The module; the twig has no embedding, it reads the states after base layer K - 1."""
    return Decoder(text, twig.T, embeds=False)


def init_twig(
    base: Params, text: TextConfig, twig: TwigConfig, how: str = "next", seed: int = 0
) -> Params:
    """A twig's first parameters (paper, section 3.2 and its ablation).

    `how`: "next" copies base layers K .. K+T-1, "last" the last T layers, "random" draws them from
    `seed`. Norm and head are copies of the base's. Raises ValueError for another `how`, or where
    the base has too few layers.
    """
    twig.check(text.num_layers)
    kernel = (
        base["text"]["embed_tokens"]["embedding"].T
        if text.tied_head
        else base["text"]["lm_head"]["kernel"]
    )
    head = {"norm": base["text"]["norm"], "lm_head": {"kernel": kernel}}
    if how == "random":
        x = jnp.zeros((1, 1, text.hidden_size))
        drawn = twig_decoder(text, twig).init(jax.random.key(seed), x)["params"]
        return jax.tree.map(jnp.array, {**drawn, **head})
    if how not in ("next", "last"):
        raise ValueError(
            f"no twig to start from called {how!r}; there are: next, last, random, or a folder"
        )
    first = twig.K if how == "next" else text.num_layers - twig.T
    if first + twig.T > text.num_layers or first < 0:
        raise ValueError(f"a base of {text.num_layers} layers has no layers {first} + {twig.T}")
    layers = {f"layers_{t}": base["text"][f"layers_{first + t}"] for t in range(twig.T)}
    return jax.tree.map(jnp.array, {**layers, **head})


def feeding(base: Params, K: int) -> Params:
    """The part of a base that a twig on layer K - 1 reads."""
    kept = ["embed_tokens", *(f"layers_{k}" for k in range(K))]
    return {**base, "text": {name: base["text"][name] for name in kept}}
