"""Bases: Hugging Face LLaVA folders, original LLaVA folders and our orbax folders.

Reading and writing are exact inverses: values are only ever rounded to the type asked for.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from twig_jax.checkpoints.config_files import (
    is_original,
    read_config,
    write_config,
)
from twig_jax.checkpoints.manager import write_tree
from twig_jax.checkpoints.processor_files import write_processor
from twig_jax.checkpoints.source import (
    TREE,
    Place,
    Source,
    from_files,
    from_orbax,
    from_tree,
    resized,
)
from twig_jax.checkpoints.storage import Weights, float_dtype, read_json, write_weights
from twig_jax.checkpoints.tables import Params, canonical, llava_tensors, unflatten
from twig_jax.config import LlavaConfig

_VISION = re.compile(r"^vision_tower\.")
_PART_BYTES = 2**29


def local_folder(name: str | Path) -> Path:
    """The folder of a checkpoint: itself, or a hub id's files, fetched or from the local cache.

    Raises FileNotFoundError for what is neither, or where the hub cannot be reached.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise FileNotFoundError(f"no checkpoint folder {name}")
    from huggingface_hub import snapshot_download  # comes with transformers

    patterns = ["*.json", "*.safetensors", "*.bin", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(str(name), allow_patterns=patterns))
    except Exception as error:  # the hub's client fails in a dozen ways, all of them here
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileNotFoundError(
            f"no folder {name}, and the hub does not give it: {first}; download it where there is "
            "a network and give its folder"
        ) from error


@contextmanager
def open_llava(
    folder: str | Path, vision_source: str | Path | None = None
) -> Iterator[tuple[LlavaConfig, Source]]:
    """(configuration, tensors) of a base, whatever its layout, while the context is open.

    vision_source: the folder of a CLIP or Hugging Face LLaVA model whose vision tower to take, for
    an original checkpoint that has none of its own. One that was trained along
    (unfreeze_mm_vision_tower), as LLaVA, keeps its own, of which the source says the shape.
    Raises FileNotFoundError for missing files, ValueError for settings that are not supported, for
    files cut short and where there is no vision tower, and one ValueError that names tensors that
    are missing, unexpected or misshaped.
    """
    folder = Path(folder)
    vision = None if vision_source is None else Path(vision_source)
    config = read_config(folder, vision)
    if (folder / TREE).is_dir():
        if vision is not None:
            raise ValueError(f"{folder} has a vision tower of its own; leave the vision source out")
        yield config, from_orbax(llava_tensors(config), folder / TREE)
        return
    with ExitStack() as stack:
        weights = stack.enter_context(Weights(folder))
        names, ignored = canonical(weights.shapes)
        model = read_json(folder / "config.json")
        own_tower = any(map(_VISION.match, names))
        if vision is None and is_original(model) and not own_tower:
            raise ValueError(
                f"{folder} has no vision tower: original checkpoints come without theirs; "
                f"launch.convert joins them, with {model.get('mm_vision_tower')} as --vision_source"
            )
        if config.text.tied_head and "language_model.lm_head.weight" in names:
            head = names.pop("language_model.lm_head.weight")
            embedding = names.get("language_model.model.embed_tokens.weight")
            if embedding and not np.array_equal(weights[head], weights[embedding]):
                raise ValueError(
                    f"{folder} has a head of its own, which config.json ties to the word "
                    "embeddings: set tie_word_embeddings to false there, as transformers does"
                )
            ignored.append(head)
        files = [(weights, names)]
        if vision is not None and not (own_tower and model.get("unfreeze_mm_vision_tower")):
            tower = stack.enter_context(Weights(vision))
            towers, constants = canonical(tower.shapes)
            ignored += constants
            # The tower asked for replaces one that came along, and is all that is read there.
            ignored += [names.pop(name) for name in [*names] if _VISION.match(name)]
            ignored += [towers.pop(name) for name in [*towers] if not _VISION.match(name)]
            files.append((tower, towers))
        yield config, from_files(llava_tensors(config), files, str(folder), ignored)


def read_llava(folder: str | Path, dtype: Any = None) -> tuple[LlavaConfig, Params]:
    """A base: (configuration, parameters), as numpy arrays.

    `dtype` rounds every array to that type; None keeps what is stored. Raises as `open_llava` does.
    """
    with open_llava(folder) as (config, source):
        return config, source.cast(dtype).tree()


def write_llava(
    folder: str | Path,
    params: Params,
    config: LlavaConfig,
    dtype: Any = "float16",
    tokenizer: str | Path | None = None,
) -> None:
    """Writes a folder that transformers' LlavaForConditionalGeneration.from_pretrained loads.

    params: the base's tree, jax or numpy arrays. dtype: of the stored tensors. tokenizer: a folder
    whose tokenizer files (and processor settings, where it has them) are copied, for AutoTokenizer
    and AutoProcessor. Raises ValueError for parameters that do not fit `config` and for values
    that `dtype` cannot hold.
    """
    source = from_tree(llava_tensors(config), params, "the tree to be written").cast(dtype)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_settings(folder, config, source, None if tokenizer is None else Path(tokenizer))
    write_hf(folder, source)


def write_settings(
    folder: Path,
    config: LlavaConfig,
    source: Source,
    tokenizer: Path | None,
    extra: dict[str, Any] | None = None,
) -> None:
    """The JSON files of a base's folder. extra: fields for config.json beside the model's."""
    pad = (extra or {}).get("image_aspect_ratio") == "pad"
    write_processor(folder, config, tokenizer, pad)
    write_config(folder, config, _common(source), extra)


def write_hf(folder: Path, source: Source) -> None:
    """The tensors of a base or a twig as safetensors files under the published names."""
    tensors = {tensor.name: tensor for tensor in source.tensors}

    def read(name: str) -> np.ndarray:
        return tensors[name].to_theirs(source.read(tensors[name]))

    write_weights(folder, {name: source.nbytes(t) for name, t in tensors.items()}, read)


def write_orbax(folder: Path, source: Source, place: Place) -> None:
    """The tensors of a base or a twig as an orbax tree, half a GiB in memory at a time.

    place(path, array) makes the jax array to be stored, in its sharding.
    """

    def parts() -> Iterator[Params]:
        part: dict[str, Any] = {}
        size = 0
        for tensor in source.tensors:
            if part and size + source.nbytes(tensor) > _PART_BYTES:
                yield unflatten(part)
                part, size = {}, 0
            part[tensor.path] = place(tensor.path, source.read(tensor))
            size += source.nbytes(tensor)
        yield unflatten(part)

    write_tree(folder / TREE, parts())


def padded(config: LlavaConfig, source: Source) -> tuple[LlavaConfig, Source]:
    """A base whose vocabulary has room for the image and padding tokens.

    transformers looks every id up, that of the image slots too.
    """
    old = config.text.vocab_size
    text = replace(config.text, vocab_size=padded_size(old))
    bigger = replace(config, text=text, image_token_id=old, pad_token_id=old + 1)
    return bigger, resized(source, llava_tensors(bigger))


def padded_size(words: int) -> int:
    """The next multiple of 64 with room for two more tokens: 32,064 for 32,000, as published."""
    return -(-(words + 2) // 64) * 64


def _common(source: Source) -> str:
    """The type of most values."""
    sizes: dict[str, int] = {}
    for tensor in source.tensors:
        dtype = source.dtypes[tensor.path]
        sizes[dtype] = sizes.get(dtype, 0) + source.nbytes(tensor)
    return float_dtype(max(sizes, key=lambda dtype: sizes[dtype])).name
