"""The embedded base without its upper layers."""

from dataclasses import replace

from twig_jax.config import LlavaConfig
from twig_jax.models.llava import Params


def first_layers(config: LlavaConfig, base: Params, count: int) -> tuple[LlavaConfig, Params]:
    """The base without all decoder layers but the first so many."""
    beyond = {f"layers_{i}" for i in range(count, config.text.num_layers)}
    text = {name: part for name, part in base["text"].items() if name not in beyond}
    return replace(config, text=replace(config.text, num_layers=count)), {**base, "text": text}
