"""TwigVLM in JAX: visual token pruning and self-speculative decoding for LLaVA.

import twig_jax

model = twig_jax.load("digits")
print(model.generate("What digit is in row B, column 3?", ["page.png"]).text)
"""

from typing import Any


def __getattr__(name: str) -> Any:
    # Imported on first use: parts of the package run without what the whole needs.
    if name in ("load", "Model"):
        from twig_jax import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
