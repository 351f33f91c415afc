"""The plug-in for lmms-eval: `lmms-eval --model twig_jax`, where twig_jax[lmms] is installed."""

from typing import Any


def manifest() -> Any:
    """What lmms-eval's registry of models asks an entry point for: a name, and the class behind."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("twig_jax", simple_class_path="twig_jax.lmms.model.TwigJax")
