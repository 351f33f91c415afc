"""The short way in: load a checkpoint by name or folder, then ask it about images."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from twig_jax.config import LlavaConfig
from twig_jax.data.tokens import Conventions
from twig_jax.decoding.generate import Generator, Request, Result, Settings

DIGITS = Path(__file__).parent / "assets" / "digits"


@dataclass(frozen=True)
class Answer:
    """The text of an answer, and how it came about."""

    text: str
    result: Result


@dataclass(frozen=True)
class Model:
    """A base, its twig and its tokenizer; `conventions` says how the base reads text and images."""

    generator: Generator
    tokenizer: Any
    conventions: Conventions

    @property
    def config(self) -> LlavaConfig:
        """The base's configuration."""
        return self.generator.config

    @property
    def settings(self) -> Settings:
        """How `generate` decodes unless told otherwise.

        With a twig: drafts, and a third of the visual tokens (192 of LLaVA-1.5's 576).
        """
        if self.generator.twig_config is None:
            return Settings(mode="plain")
        return Settings(mode="ttp_ssd", avg_retained=round(self.config.vision.num_tokens / 3))

    def request(self, prompt: str, images: Sequence[Any] = (), *, raw: bool = False) -> Request:
        """A question about images (paths, bytes, PIL images or arrays), ready to be answered.

        The images come first unless `<image>` marks their places. raw: the prompt is used as it is,
        without the conversation template. Raises ValueError for unreadable images and where
        markers and images differ in number.
        """
        from twig_jax.data import conversation
        from twig_jax.data.images import load_image, preprocess
        from twig_jax.data.tokens import prompt_ids

        v, c = self.config.vision, self.conventions
        pixels = [
            preprocess(
                load_image(image),
                v.image_size,
                v.image_mean,
                v.image_std,
                c.pad,
                shortest_edge=c.shortest_edge,
            )
            for image in images
        ]
        if not raw:
            prompt = conversation.prompt(c.template, [(prompt, None)], images=len(images))
        ids, is_visual = prompt_ids(
            self.tokenizer,
            prompt,
            self.config.image_token_id,
            v.num_tokens,
            len(images),
            tokenize=c.tokenize,
        )
        return Request(ids, is_visual, pixels=np.stack(pixels) if pixels else None)

    def generate(
        self,
        prompt: str,
        images: Sequence[Any] = (),
        settings: Settings | None = None,
        *,
        raw: bool = False,
        told: Callable[[str], Any] | None = None,
        **changes: Any,
    ) -> Answer:
        """Answers one question about images, as `request` reads them.

        settings: None for `self.settings`; `changes` replaces single fields of it, as in
        `mode="plain"`. told: is given the text as it comes, piece by piece. Raises ValueError as
        `request` and `Generator.generate` do.
        """
        settings = replace(settings or self.settings, **changes)
        request = self.request(prompt, images, raw=raw)
        if told is None:
            (result,) = self.generator.generate([request], settings)
            return Answer(self.text(result.tokens), result)
        said = ""

        def watch(tokens: Sequence[np.ndarray]) -> None:
            nonlocal said
            text = self.text(tokens[0])
            # The bytes of a character may come with the next token.
            if text.startswith(said) and not text.endswith("\ufffd"):
                told(text[len(said) :])
                said = text

        (result,) = self.generator.generate([request], settings, watch=watch)
        text = self.text(result.tokens)
        told(text[len(said) :])
        return Answer(text, result)

    def text(self, tokens: Iterable[int]) -> str:
        """Tokens of an answer as text."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True).strip()


def load(
    checkpoint: str | Path = "digits",
    twig: str | Path | None = None,
    dtype: str | None = None,
    *,
    allow_base_mismatch: bool = False,
    template: str | None = None,
) -> Model:
    """A base and its twig.

    checkpoint: a folder or hub id, in Hugging Face's, the original LLaVA's or our orbax format;
    "digits" is the embedded pair. twig: a twig folder. dtype: to compute in; None is float32 on
    CPUs, bfloat16 elsewhere. template: a conversation template other than the checkpoint's own.
    Tensors are put on the device one by one. Raises FileNotFoundError for what is not there,
    ValueError for a twig of another base (unless allowed) and for what is not supported.
    """
    from twig_jax.checkpoints.llava import local_folder, read_llava
    from twig_jax.checkpoints.twig import read_twig
    from twig_jax.data import conversation
    from twig_jax.data.tokens import conventions, load_tokenizer

    if str(checkpoint) == "digits":
        checkpoint, twig = DIGITS / "base", twig or DIGITS / "twig"
    folder = local_folder(checkpoint)
    found = conventions(folder)
    if template is not None:
        conversation.template(template)
        found = replace(found, template=template)
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"

    def place(path: str, x: np.ndarray) -> jax.Array:
        return jnp.asarray(x)

    config, base = read_llava(folder, dtype, place)
    twig_config = twig_params = None
    if twig is not None:
        twig_config, twig_params = read_twig(
            local_folder(twig), base, config, dtype, place, allow_base_mismatch
        )
    generator = Generator(config, base, twig_config, twig_params)
    return Model(generator, load_tokenizer(folder), found)
