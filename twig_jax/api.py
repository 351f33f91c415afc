"""The short way in: load a checkpoint by name or folder, then ask it about images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from twig_jax.config import LlavaConfig
from twig_jax.decoding.generate import Generator, Result, Settings

DIGITS = Path(__file__).parent / "assets" / "digits"


@dataclass(frozen=True)
class Model:
    """A base, its twig and its tokenizer."""

    generator: Generator
    tokenizer: Any

    @property
    def config(self) -> LlavaConfig:
        """The base's configuration."""
        return self.generator.config

    def generate(self, prompt: str, images: list[Any], settings: Settings) -> Result:
        """Answers one question about images (paths, bytes, PIL images or arrays)."""
        from twig_jax.data.images import load_image, preprocess
        from twig_jax.evaluation.tasks import make_request

        v = self.config.vision
        pixels = np.zeros((0, v.image_size, v.image_size, 3), np.float32)
        if images:
            pixels = np.stack(
                [preprocess(load_image(i), v.image_size, v.image_mean, v.image_std) for i in images]
            )
        request = make_request(self.tokenizer, self.config, prompt, pixels)
        return self.generator.generate([request], settings)[0]

    def text(self, result: Result) -> str:
        """The answer as text."""
        return self.tokenizer.decode(result.tokens, skip_special_tokens=True).strip()


def load(
    checkpoint: str | Path = "digits", twig: str | Path | None = None, dtype: str = "float32"
) -> Model:
    """Reads a Hugging Face LLaVA folder and a twig folder; "digits" is the embedded pair.

    Raises FileNotFoundError for folders that are not there, ValueError for a twig of another base.
    """
    from twig_jax.checkpoints.hf import read_llava, read_twig
    from twig_jax.data.tokens import load_tokenizer

    if str(checkpoint) == "digits":
        checkpoint, twig = DIGITS / "base", twig or DIGITS / "twig"
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no checkpoint folder {folder}; give a LLaVA folder in Hugging Face format, or digits"
        )
    config, base = read_llava(folder, jnp.dtype(dtype))
    twig_config = twig_params = None
    if twig is not None:
        twig_config, twig_params = read_twig(twig, base, config, jnp.dtype(dtype))
        twig_params = jax.tree.map(jnp.asarray, twig_params)
    base = jax.tree.map(jnp.asarray, base)
    return Model(Generator(config, base, twig_config, twig_params), load_tokenizer(folder))
