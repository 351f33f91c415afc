"""LLaVA checkpoints in Hugging Face's layout and twigs in the official one, read and written.

Reading and writing are exact inverses: values are only ever rounded to the type asked for.
"""

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from twig_jax.checkpoints.hf_config import read_config, write_config, write_processor
from twig_jax.checkpoints.storage import (
    WEIGHTS,
    Weights,
    float_dtype,
    read_json,
    write_json,
    write_weights,
)
from twig_jax.checkpoints.tables import (
    Params,
    Tensor,
    canonical,
    check_shapes,
    flatten,
    llava_tensors,
    twig_tensors,
    unflatten,
)
from twig_jax.config import LlavaConfig, TwigConfig

TWIG_FILE = "twig.json"
TWIG_VERSION = 1


def read_llava(folder: str | Path, dtype: Any = None) -> tuple[LlavaConfig, Params]:
    """A LLaVA checkpoint: (configuration, parameters as numpy arrays).

    Reads one safetensors file or shards with an index, of float16, bfloat16 or float32, under any
    of the names that transformers has used. `dtype` rounds every array to that type; None keeps
    what is stored. Nothing is put on a device. Raises FileNotFoundError for missing files,
    ValueError for settings that are not supported, and one ValueError for all tensors that are
    missing, unexpected or misshaped.
    """
    folder = Path(folder)
    config = read_config(folder)
    with Weights(folder) as weights:
        return config, _read(weights, llava_tensors(config), canonical(weights.shapes), dtype)


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
    folder, name = Path(folder), float_dtype(dtype).name
    tensors = _theirs(params, llava_tensors(config), name)
    folder.mkdir(parents=True, exist_ok=True)
    write_processor(folder, config, None if tokenizer is None else Path(tokenizer))
    write_config(folder, config, name)
    write_weights(folder, tensors)


def read_twig(
    folder: str | Path,
    base: Params,
    config: LlavaConfig,
    dtype: Any = None,
    allow_base_mismatch: bool = False,
) -> tuple[TwigConfig, Params]:
    """A twig folder: (configuration, parameters as numpy arrays), checked against its base.

    base, config: the base it is to run on. `dtype` as in `read_llava`. Warns where the twig does
    not say what base it grew on. Raises FileNotFoundError for missing files, ValueError for a twig
    of another base (unless `allow_base_mismatch`) or of a newer format, and one ValueError for all
    tensors that are missing, unexpected or misshaped.
    """
    folder = Path(folder)
    path = folder / TWIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {TWIG_FILE}, which says where its twig grows")
    notes = read_json(path)
    absent = [key for key in ("version", "K", "T", "K_f") if not isinstance(notes.get(key), int)]
    if absent:
        raise ValueError(f"{path} needs whole numbers for {', '.join(absent)}")
    if notes["version"] != TWIG_VERSION or notes.get("p_head") is not None:
        raise ValueError(
            f"{path} has version {notes['version']} and p_head {notes.get('p_head')!r}; "
            f"only version {TWIG_VERSION} without a p_head can be read"
        )
    twig = TwigConfig(notes["K"], notes["T"], notes["K_f"])
    twig.check(config.text.num_layers)
    grown_on = notes.get("base_fingerprint")
    if grown_on is None:
        warnings.warn(f"{path} does not say what base its twig grew on; not checked", stacklevel=2)
    elif grown_on != fingerprint(config, base, twig.K) and not allow_base_mismatch:
        raise ValueError(
            f"the twig in {folder} grew on another base than this one; give it its own base, or "
            "allow the mismatch (allow_base_mismatch) and expect few accepted drafts"
        )
    with Weights(folder) as weights:
        names = {name: name for name in weights.shapes}
        return twig, _read(weights, twig_tensors(config.text, twig.T), names, dtype)


def write_twig(
    folder: str | Path,
    params: Params,
    twig: TwigConfig,
    base: Params,
    config: LlavaConfig,
    dtype: Any = "float16",
) -> None:
    """Writes a twig folder: `model.safetensors` in the official names, and `twig.json`.

    base, config: the base the twig grew on. Raises ValueError for parameters that do not fit the
    configurations and for values that `dtype` cannot hold.
    """
    folder, name = Path(folder), float_dtype(dtype).name
    twig.check(config.text.num_layers)
    tensors = _theirs(params, twig_tensors(config.text, twig.T), name)
    notes = {"version": TWIG_VERSION, **dataclasses.asdict(twig), "p_head": None}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / TWIG_FILE, {**notes, "base_fingerprint": fingerprint(config, base, twig.K)})
    write_weights(folder, tensors)


def fingerprint(config: LlavaConfig, base: Params, K: int) -> str:
    """Names the base that a twig on layer K - 1 reads: hexadecimal sha256.

    Of the decoder's architecture and of samples, at fixed places, of what feeds the twig: word
    embeddings, projector and the first K layers. Only the signs of the samples count: they survive
    any rounding, so float32, float16 and bfloat16 copies of one base agree. (Values do not: in 1
    of 16 cases rounding to bfloat16 gives another result by way of float16.) A vocabulary padded
    with further tokens is the same base too.
    """
    text = dataclasses.asdict(config.text)
    shape = {k: float(v) for k, v in text.items() if k not in ("vocab_size", "max_positions")}
    found = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
    flat = flatten({"projector": base["projector"]})
    for k in range(K):
        flat |= flatten({"text": {f"layers_{k}": base["text"][f"layers_{k}"]}})
    kernels = {path: leaf for path, leaf in flat.items() if path.endswith("/kernel")}
    # Rows that every vocabulary of the same tokens shares.
    kernels["text/embed_tokens/embedding"] = base["text"]["embed_tokens"]["embedding"][:1024]
    for path, leaf in sorted(kernels.items()):
        rows, columns = (max(1, size // 64) for size in leaf.shape)
        sample = np.asarray(leaf[::rows, ::columns]).astype(np.float32)
        found.update(path.encode() + np.packbits(np.signbit(sample)).tobytes())
    return found.hexdigest()


def _read(weights: Weights, tensors: Iterable[Tensor], names: dict[str, str], dtype: Any) -> Params:
    """Our tree of `tensors`, which the files have under `names`."""
    expected = {tensor.name: tensor for tensor in tensors}
    check_shapes(
        {name: tensor.shape for name, tensor in expected.items()},
        {name: weights.shapes[found] for name, found in names.items()},
        str(weights.folder),
    )
    to = None if dtype is None else float_dtype(dtype)
    flat = {}
    for name, tensor in expected.items():
        x = tensor.to_ours(weights[names[name]])
        flat[tensor.path] = x if to is None else _rounded(x, to, name)
    return unflatten(flat)


def _theirs(params: Params, tensors: Iterable[Tensor], dtype: str) -> dict[str, np.ndarray]:
    """Arrays as the files store them, by their names."""
    flat = flatten(params)
    tensors = list(tensors)
    check_shapes(
        {tensor.path: tensor.our_shape for tensor in tensors},
        {path: tuple(leaf.shape) for path, leaf in flat.items()},
        f"the tree to be written to {WEIGHTS}",
    )
    to = float_dtype(dtype)
    return {
        # safetensors writes memory as it lies, so a transposed view must be laid out first.
        t.name: np.ascontiguousarray(t.to_theirs(_rounded(np.asarray(flat[t.path]), to, t.path)))
        for t in tensors
    }


def _rounded(x: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """x as `dtype`; ValueError where finite values are too large for it."""
    if x.dtype == dtype:
        return x
    with np.errstate(over="ignore"):
        y = x.astype(dtype)
    if np.isinf(y).any() and not np.isinf(x).any():
        raise ValueError(f"{name} has values that {dtype.name} cannot hold")
    return y
