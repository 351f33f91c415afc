"""Conversions between formats, streaming: no more than a part of the model is in memory."""

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from twig_jax.checkpoints.config_files import notes
from twig_jax.checkpoints.llava import (
    open_llava,
    padded,
    write_hf,
    write_orbax,
    write_settings,
)
from twig_jax.checkpoints.processor_files import TOKENIZER_FILES, has_tokenizer
from twig_jax.checkpoints.source import TREE, Place, Source
from twig_jax.checkpoints.storage import locked, read_json, write_json
from twig_jax.checkpoints.twig import (
    TWIG_FILE,
    feeds_twig,
    fingerprint,
    has_published_p_head,
    holds_twig,
    open_twig,
    read_notes,
    twig_sizes,
    with_words,
    write_notes,
)
from twig_jax.config import GATES, LlavaConfig, TwigConfig
from twig_jax.sharding.placement import distribute

TARGETS = ("orbax", "hf", "twig-official")
_MARGIN = 2**26  # bytes of settings and metadata beside the weights


@dataclass(frozen=True)
class Plan:
    """What a conversion will write.

    source: the tensors, already of the type and size to be written. config: of a base; twig and
    base_fingerprint: of a twig. folder: where the settings and the tokenizer come from. add_tokens:
    whether the tokenizer has yet to get the image and padding tokens.
    """

    to: str
    folder: Path
    source: Source
    config: LlavaConfig | None = None
    twig: TwigConfig | None = None
    base_fingerprint: str | None = None
    add_tokens: bool = False

    @property
    def nbytes(self) -> int:
        """The size of all tensors."""
        return sum(self.source.nbytes(tensor) for tensor in self.source.tensors)

    def destinations(self) -> list[tuple[str, tuple[int, ...], str]]:
        """(where it goes, shape there, type) of every tensor."""
        return [
            (f"{TREE}/{t.path}", t.our_shape, self.source.dtypes[t.path])
            if self.to == "orbax"
            else (t.name, t.shape, self.source.dtypes[t.path])
            for t in self.source.tensors
        ]


@contextmanager
def plan(
    folder: Path,
    to: str,
    *,
    vision_source: Path | None = None,
    dtype: Any = None,
    K: int | None = None,
    K_f: int | None = None,
    base: Path | None = None,
) -> Iterator[Plan]:
    """What converting `folder` to the format `to` will write, while the context is open.

    vision_source: the CLIP folder of an original base. dtype: None keeps what is stored. K, K_f:
    where a twig grows, if its folder does not say. base: the base it grew on, whose fingerprint it
    then carries. Nothing but shapes is read. Raises as `open_llava` and `open_twig` do, and
    ValueError for a target or anything else that does not fit what the folder holds.
    """
    if to not in TARGETS:
        raise ValueError(f"no target format {to!r}; there are: {', '.join(TARGETS)}")
    is_twig = holds_twig(folder)
    held, fitting = (
        ("a twig", ("orbax", "twig-official")) if is_twig else ("a base", ("orbax", "hf"))
    )
    if to not in fitting:
        raise ValueError(
            f"{folder} holds {held}, which can be converted to {' or '.join(fitting)}, not {to}"
        )
    if is_twig and vision_source is not None:
        raise ValueError(f"{folder} holds a twig, which has no vision tower: no vision source")
    if not is_twig and (K, K_f, base) != (None, None, None):
        raise ValueError(f"{folder} holds a base: K, K_f and a base are said of a twig")
    if not is_twig:
        with open_llava(folder, vision_source) as (config, source):
            small = to == "hf" and config.image_token_id >= config.text.vocab_size
            if small:
                config, source = padded(config, source)
            yield Plan(to, folder, source.cast(dtype), config=config, add_tokens=small)
        return
    layers, text = twig_sizes(folder)
    twig, grown_on = _grown(folder, layers, K, K_f)
    if base is not None:
        with open_llava(base) as (config, source):
            twig.check(config.text.num_layers)
            given = fingerprint(config, source.tree(among=feeds_twig(twig.K)), twig.K)
            if grown_on not in (None, given):
                raise ValueError(f"the twig in {folder} grew on another base than {base}")
            grown_on = given
            text = with_words(config.text, text.vocab_size)
    with open_twig(folder, text, twig) as source:
        yield Plan(to, folder, source.cast(dtype), twig=twig, base_fingerprint=grown_on)


def _grown(
    folder: Path, layers: int, K: int | None, K_f: int | None
) -> tuple[TwigConfig, str | None]:
    if (folder / TWIG_FILE).is_file():
        twig, grown_on = read_notes(folder)
        if K not in (None, twig.K) or K_f not in (None, twig.K_f):
            raise ValueError(
                f"{folder / TWIG_FILE} says K={twig.K}, K_f={twig.K_f}; leave out --K and --K_f"
            )
        return twig, grown_on
    if K is None or K_f is None:
        raise ValueError(
            f"{folder} does not say where its twig grows; give --K (trunk layers, 2 in the paper) "
            "and --K_f (the layer from which no visual tokens are seen, 24 for 7B)"
        )
    twig = TwigConfig(K, layers, K_f)
    return replace(twig, p_head=True, gate=GATES[1]) if has_published_p_head(folder) else twig, None


def convert(
    plan: Plan,
    out: Path,
    *,
    mesh: Mesh | None = None,
    extra: dict[str, Any] | None = None,
    tokenizer: Any = None,
    seen: Callable[[int], Any] = lambda _: None,
) -> None:
    """Writes what `plan` says to the folder `out`, which appears once it is whole.

    mesh: the shardings an orbax tree is written with. extra: further fields for config.json.
    tokenizer: of a base whose plan says `add_tokens`; None copies its files without these tokens.
    seen is told the bytes of every tensor read. Raises FileExistsError where `out` is there or just
    being written, ValueError where the tokenizer's ids are not the model's, OSError where the disk
    is too small or full.
    """
    source = plan.source.watched(seen)
    with _staged(out, plan.nbytes) as staging:
        if plan.twig is not None:
            write_notes(staging, plan.twig, plan.base_fingerprint)
        if plan.config is not None:
            files = plan.folder if has_tokenizer(plan.folder) else None
            fields = notes(plan.folder) | (extra or {})
            write_settings(staging, plan.config, plan.source, files, fields)
            if tokenizer is not None and plan.add_tokens:
                _save_tokenizer(staging, tokenizer, plan.config)
        if plan.to == "orbax":
            write_orbax(staging, source, placing(mesh))
        else:
            write_hf(staging, source)


def placing(mesh: Mesh | None = None) -> Place:
    """place(path, array): a jax array on the host, or in the mesh's sharding of that parameter."""
    if mesh is None:
        host = jax.local_devices(backend="cpu")[0]
        return lambda path, x: jax.device_put(x, host)
    return lambda path, x: distribute({path: x}, mesh)[path]


def verify(plan: Plan, out: Path, *, seen: Callable[[int], Any] = lambda _: None) -> list[str]:
    """Tensors whose values in `out` differ from what `plan` says, by checksum; reads both again."""
    with _opened(plan, out) as written:
        return [
            tensor.name
            for tensor in plan.source.watched(seen).tensors
            if _digest(plan.source.watched(seen).read(tensor)) != _digest(written.read(tensor))
        ]


@contextmanager
def _opened(plan: Plan, out: Path) -> Iterator[Source]:
    if plan.twig is not None:
        _, text = twig_sizes(out)
        with open_twig(out, text, plan.twig) as source:
            yield source
    else:
        with open_llava(out) as (_, source):
            yield source


def _digest(x: np.ndarray) -> bytes:
    x = np.asarray(jax.device_put(x, jax.local_devices(backend="cpu")[0]))  # a fast transpose
    return hashlib.sha256(f"{x.dtype} {x.shape}".encode() + x.tobytes()).digest()


@contextmanager
def _staged(out: Path, nbytes: int) -> Iterator[Path]:
    """A folder beside `out` that gets its name at the end, and is gone after a failure."""
    staging = out.with_name(f"{out.name}.partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out.with_name(f"{out.name}.lock")):
        if out.exists():
            raise FileExistsError(f"{out} is there already; remove it or choose another place")
        if staging.exists():  # of a conversion that was killed
            shutil.rmtree(staging)
        free = shutil.disk_usage(out.parent).free
        if free < nbytes + _MARGIN:
            raise OSError(
                f"{out.parent} has {free / 2**30:.1f} GiB free, "
                f"{(nbytes + _MARGIN) / 2**30:.1f} GiB are needed"
            )
        staging.mkdir()
        try:
            yield staging
            staging.rename(out)
        except BaseException:
            _remove(staging)
            raise


def _remove(folder: Path) -> None:
    """Removes a folder, again where threads that an error has left behind still write to it."""
    began = gone = time.monotonic()
    while time.monotonic() < min(gone + 1, began + 60):
        if folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
            gone = time.monotonic()
        time.sleep(0.02)


def _save_tokenizer(folder: Path, tokenizer: Any, config: LlavaConfig) -> None:
    """Saves it with the image and padding tokens that transformers' processor looks for."""
    added = ["<image>", "<pad>"]
    # A vocabulary that was padded has words that the tokenizer does not know.
    padding = range(len(tokenizer), config.image_token_id)
    tokenizer.add_tokens([f"<unused_{i}>" for i in padding], special_tokens=True)
    tokenizer.add_tokens(added, special_tokens=True)
    tokenizer.pad_token = "<pad>"
    found = tokenizer.convert_tokens_to_ids(added)
    if found != [config.image_token_id, config.pad_token_id]:
        raise ValueError(
            f"the tokenizer gives {', '.join(added)} the ids {found}; the model has "
            f"{config.image_token_id} and {config.pad_token_id}"
        )
    for name in TOKENIZER_FILES:  # older settings would win over those saved now
        (folder / name).unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    # As it is: AutoTokenizer builds Llama's own class anew, with other ids for some texts.
    settings = folder / "tokenizer_config.json"
    write_json(settings, read_json(settings) | {"tokenizer_class": "PreTrainedTokenizerFast"})
