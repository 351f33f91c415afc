"""The short way in: load a checkpoint by name or folder, then ask it about images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from twig_jax.config import INT8, LlavaConfig
from twig_jax.data.tokens import Conventions
from twig_jax.decoding.buckets import Bucket
from twig_jax.decoding.generate import Generator
from twig_jax.decoding.running import Running
from twig_jax.decoding.session import Session
from twig_jax.decoding.settings import Request, Result, Settings
from twig_jax.models.cpu import arranged
from twig_jax.models.int8 import is_kernel, quantise
from twig_jax.sharding.placement import distribute


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
        without the conversation template. Raises ValueError for unreadable images, for one that is
        in no list, and where markers and images differ in number.
        """
        from twig_jax.data import conversation

        if not raw:
            template = self.conventions.template
            prompt = conversation.prompt(template, [(prompt, None)], images=_count(images))
        return self._request(prompt, images)

    def _request(self, prompt: str, images: Sequence[Any]) -> Request:
        from twig_jax.data.images import load_image, preprocess
        from twig_jax.data.tokens import prompt_ids

        v, c, count = self.config.vision, self.conventions, _count(images)
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
        ids, is_visual = prompt_ids(
            self.tokenizer,
            prompt,
            self.config.image_token_id,
            v.num_tokens,
            count,
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
    ) -> Result:
        """Answers one question about images, as `request` reads them.

        settings: None for `self.settings`; `changes` replaces single fields of it, as in
        `mode="plain"`. told: is given the text as it comes, piece by piece. Raises as `request` and
        `Generator.generate` do.
        """
        settings = replace(settings or self.settings, **changes)
        request = self.request(prompt, images, raw=raw)
        return self.generator.generate([request], settings, _telling(told))[0]

    def chat(
        self, settings: Settings | None = None, *, reprune: bool = True, **changes: Any
    ) -> "Chat":
        """A conversation of several turns; the arguments are as in `generate` and `Session`."""
        settings = replace(settings or self.settings, **changes)
        return Chat(self, Session(self.generator, settings, reprune=reprune))


@dataclass(frozen=True)
class Chat:
    """A conversation: each question is answered in the light of those before."""

    model: Model
    session: Session

    def ask(
        self, prompt: str, images: Sequence[Any] = (), told: Callable[[str], Any] | None = None
    ) -> Result:
        """Answers the next question, about images that are new with it; see `Model.generate`.

        Raises as `Model.request` and `Session.ask` do.
        """
        from twig_jax.data import conversation

        model, so_far = self.model, self.session.ids
        if not len(so_far):
            request = model.request(prompt, images)
        else:
            name, eos = model.conventions.template, model.config.eos_token_id
            text = conversation.following(name, prompt, _count(images))
            # As behind an answer: tokenizers may put a space before a text that begins.
            before = "a"
            request = model._request(before + text, images)
            first = len(model.tokenizer.encode(before))
            # The text starts with the end of the last answer, of which the model may have said EOS.
            end = conversation.template(name).answer_end
            if so_far[-1] == eos and eos in model.tokenizer.encode(end, add_special_tokens=False):
                first = int(np.argmax(request.ids == eos)) + 1
            request = replace(request, ids=request.ids[first:], is_visual=request.is_visual[first:])
        return self.session.ask(
            request.ids, request.is_visual, request.pixels, watch=_telling(told)
        )


def _count(images: Sequence[Any]) -> int:
    """How many images there are. Raises ValueError for a single one, which is no list of them."""
    # An array of several has four dimensions, or is one of paths.
    array = getattr(images, "ndim", 1) in (2, 3)
    if array or isinstance(images, str | bytes) or not hasattr(images, "__len__"):
        raise ValueError("images are a list, of a single one too: [image]")
    return len(images)


def _telling(told: Callable[[str], Any] | None) -> Callable[[Running], Any] | None:
    """A watch that hands on the text of a single row piece by piece."""
    if told is None:
        return None
    said = 0

    def watch(running: Running) -> None:
        nonlocal said
        text = running.text(0)
        told(text[said:])
        said = max(said, len(text))

    return watch


def load(
    checkpoint: str | Path = "digits",
    twig: str | Path | None = None,
    dtype: str | None = None,
    *,
    allow_base_mismatch: bool = False,
    conventions: str | None = None,
    template: str | None = None,
    mesh: Mesh | None = None,
    buckets: Sequence[Bucket] = (),
    remembered_images: int = 0,
    int8: str | None = None,
) -> Model:
    """A base and its twig.

    checkpoint: a folder or hub id, in Hugging Face's, the original LLaVA's (with its vision tower)
    or our orbax format; "digits" is the embedded pair. twig: a twig folder. dtype: to compute in;
    None is float32 on CPUs, bfloat16 elsewhere. conventions: "llava" reads text and images as
    LLaVA's own code does, see `data.tokens.conventions`; None as the checkpoint's folder says.
    template: a conversation template other than theirs. mesh, buckets, remembered_images: see
    `Generator`. int8: "twig" drafts in int8, with the same answers; "all" has the base's decoder in
    int8 as well, which is another, coarser model. Tensors are put on the device one by one, into
    their shardings where there is a mesh. Raises FileNotFoundError for what is not there,
    ValueError for a twig of another base (unless allowed) and for what is not supported,
    ImportError for files that need torch (.bin) or sentencepiece (tokenizer.model) where that is
    missing.
    """
    from twig_jax.checkpoints.llava import local_folder, open_llava
    from twig_jax.checkpoints.twig import feeds_twig, read_notes, read_twig
    from twig_jax.data import conversation, tokens
    from twig_jax.data.digits import ASSETS

    if str(checkpoint) == "digits":
        checkpoint, twig = ASSETS / "base", twig or ASSETS / "twig"
    folder = local_folder(checkpoint)
    found = tokens.conventions(folder, conventions)
    if template is not None:
        conversation.template(template)
        found = replace(found, template=template)
    if int8 not in (None, *INT8):
        raise ValueError(f"no int8 {int8!r}; there are: {', '.join(INT8)}")
    if int8 == "twig" and twig is None:
        raise ValueError('int8="twig" needs a twig: give one, or leave int8 out')
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"

    def place(path: str, x: Any) -> Any:
        x = arranged(path, x)
        return jax.tree.map(jnp.asarray, x) if mesh is None else distribute({path: x}, mesh)[path]

    def place_in_int8(path: str, x: np.ndarray) -> Any:
        return place(path, quantise(x) if is_kernel(path) else x)

    tokenizer = tokens.load_tokenizer(folder)
    twig_config = twig_params = None
    with open_llava(folder) as (config, source):
        if twig is not None:
            grown = local_folder(twig)
            trunk = source.tree(among=feeds_twig(read_notes(grown)[0].K))
            twig_config, twig_params = read_twig(
                grown, trunk, config, dtype, place, allow_base_mismatch
            )
        base = source.cast(dtype).tree(place_in_int8 if int8 == "all" else place)
    generator = Generator(
        config,
        base,
        twig_config,
        twig_params,
        buckets=buckets,
        mesh=mesh,
        detokenize=lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True),
        remembered_images=remembered_images,
        int8_drafts=int8 is not None and twig is not None,
    )
    return Model(generator, tokenizer, found)
