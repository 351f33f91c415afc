"""Twig folders: `model.safetensors` in the official names, or an orbax tree, and `twig.json`."""

import dataclasses
import hashlib
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from twig_jax.checkpoints.llava import padded_size, write_hf
from twig_jax.checkpoints.manager import tree_shapes
from twig_jax.checkpoints.source import (
    TREE,
    Place,
    Source,
    from_files,
    from_orbax,
    from_tree,
    resized,
)
from twig_jax.checkpoints.storage import Weights, read_json, write_json
from twig_jax.checkpoints.tables import Params, flatten, twig_tensors
from twig_jax.config import GATES, LlavaConfig, TextConfig, TwigConfig
from twig_jax.sharding.placement import gather

TWIG_FILE = "twig.json"
TWIG_VERSION = 1

# What a checkpoint of a twig consists of; official files may hold parts of their base as well, and
# old versions of transformers store a constant of each layer.
_OF_TWIG = re.compile(
    r"^(model\.layers\.\d+\.(?!self_attn\.rotary_emb\.)|model\.norm\.|lm_head\.|p_head\."
    r"|leaf_attention_module\.)"
)


def holds_twig(folder: Path) -> bool:
    """Whether a folder holds a twig, ours or the official weights, and not a base.

    Raises FileNotFoundError for a folder without weights.
    """
    if (folder / TWIG_FILE).is_file():
        return True
    if (folder / TREE).is_dir():
        return False
    with Weights(folder) as weights:
        names = set(weights.shapes)
    return not any("vision" in n or "projector" in n for n in names) and "lm_head.weight" in names


def read_notes(folder: str | Path) -> tuple[TwigConfig, str | None]:
    """(where a folder's twig grows, fingerprint of its base) from its twig.json.

    Raises FileNotFoundError without the file, ValueError for one that cannot be read or is newer.
    """
    path = Path(folder) / TWIG_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {TWIG_FILE}, which says where its twig grows; launch.train --export "
            "writes a twig's folder, and launch.convert makes one of published weights"
        )
    notes = read_json(path)
    absent = [key for key in ("version", "K", "T", "K_f") if not isinstance(notes.get(key), int)]
    if absent:
        raise ValueError(f"{path} needs whole numbers for {', '.join(absent)}")
    p_head = notes.get("p_head")
    known = [None, *({"gate": gate} for gate in GATES)]
    if notes["version"] != TWIG_VERSION or p_head not in known:
        raise ValueError(
            f"{path} has version {notes['version']} and p_head {p_head!r}; only version "
            f"{TWIG_VERSION} with p_head null or {' or '.join(map(str, known[1:]))} can be read"
        )
    twig = TwigConfig(notes["K"], notes["T"], notes["K_f"])
    if p_head is not None:
        twig = dataclasses.replace(twig, p_head=True, gate=p_head["gate"])
    return twig, notes.get("base_fingerprint")


def write_notes(folder: Path, twig: TwigConfig, base_fingerprint: str | None) -> None:
    """Writes twig.json."""
    notes = {
        "version": TWIG_VERSION,
        "K": twig.K,
        "T": twig.T,
        "K_f": twig.K_f,
        "p_head": {"gate": twig.gate} if twig.p_head else None,
        "base_fingerprint": base_fingerprint,
    }
    write_json(folder / TWIG_FILE, notes)


def twig_sizes(folder: str | Path) -> tuple[int, TextConfig]:
    """(T, the decoder's sizes) of a twig's weights, read off the shapes alone.

    Of heads, the shapes tell only the ratio. Raises FileNotFoundError and ValueError for folders
    that hold no twig.
    """
    folder = Path(folder)
    if (folder / TREE).is_dir():
        shapes = {path: leaf.shape[::-1] for path, leaf in tree_shapes(folder / TREE).items()}
        layer, names = (
            "layers_{}",
            ("lm_head/kernel", "q_proj/kernel", "k_proj/kernel", "gate_proj/kernel"),
        )
    else:
        with Weights(folder) as weights:
            shapes = weights.shapes
        layer = "model.layers.{}"
        names = (
            "lm_head.weight",
            "self_attn.q_proj.weight",
            "self_attn.k_proj.weight",
            "mlp.gate_proj.weight",
        )
    layers = {found[1] for name in shapes if (found := re.match(layer.format(r"(\d+)"), name))}
    separator = "/" if "/" in names[0] else "."
    first = [names[0], *(layer.format(0) + separator + name for name in names[1:])]
    absent = [name for name in first if len(shapes.get(name, ())) != 2]
    if absent:
        raise ValueError(f"{folder} holds no twig: it has no {', '.join(absent)}")
    (vocabulary, width), (q, _), (k, _), (middle, _) = (shapes[name] for name in first)
    head = int(np.gcd(q, k))
    text = TextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=middle,
        num_heads=q // head,
        num_kv_heads=k // head,
        head_dim=head,
    )
    return len(layers), text


def has_published_p_head(folder: Path) -> bool:
    """Whether the P-Head of a published TwigVLM++ checkpoint is among a twig's weights."""
    if (folder / TREE).is_dir():
        return False
    with Weights(folder) as weights:
        return any(name.startswith("leaf_attention_module.") for name in weights.shapes)


def with_words(text: TextConfig, words: int) -> TextConfig:
    """`text` with a twig's own vocabulary, where one of the two is the other with room for images.

    The official twigs have the 32,000 tokens of the original LLaVA, Hugging Face's bases 32,064.
    """
    smaller, larger = sorted((text.vocab_size, words))
    return dataclasses.replace(text, vocab_size=words) if padded_size(smaller) == larger else text


@contextmanager
def open_twig(folder: str | Path, text: TextConfig, twig: TwigConfig) -> Iterator[Source]:
    """The tensors of a twig, while the context is open.

    Raises FileNotFoundError for missing files, and one ValueError for all tensors that are missing,
    unexpected or misshaped. What is no part of a twig is ignored, and listed in `ignored`.
    """
    folder = Path(folder)
    tensors = twig_tensors(text, twig)
    if (folder / TREE).is_dir():
        yield from_orbax(tensors, folder / TREE)
        return
    with Weights(folder) as weights:
        names = {name: name for name in weights.shapes if _OF_TWIG.match(name)}
        ignored = [name for name in weights.shapes if name not in names]
        yield from_files(tensors, [(weights, names)], str(folder), ignored)


def read_twig(
    folder: str | Path,
    base: Params,
    config: LlavaConfig,
    dtype: Any = None,
    place: Place | None = None,
    allow_base_mismatch: bool = False,
) -> tuple[TwigConfig, Params]:
    """A twig folder: (configuration, parameters), checked against its base.

    base, config: the base it is to run on, whose vocabulary the twig's head gets where only padding
    sets them apart. `dtype` rounds every array, None keeps what is stored; `place` as in
    `Source.tree`. Warns where the twig does not say what base it grew on. Raises FileNotFoundError
    for missing files, ValueError for a twig of another base (unless `allow_base_mismatch`) or of a
    newer format, and one ValueError for all tensors that are missing, unexpected or misshaped.
    """
    twig, grown_on = read_notes(folder)
    twig.check(config.text.num_layers)
    if grown_on is None:
        warnings.warn(
            f"{Path(folder) / TWIG_FILE} does not say what base its twig grew on; not checked",
            stacklevel=2,
        )
    elif grown_on != fingerprint(config, base, twig.K) and not allow_base_mismatch:
        raise ValueError(
            f"the twig in {folder} grew on another base than this one; give it its own base, or "
            "allow the mismatch (allow_base_mismatch) and expect few accepted drafts"
        )
    stored = with_words(config.text, twig_sizes(folder)[1].vocab_size)
    with open_twig(folder, stored, twig) as source:
        source = resized(source, twig_tensors(config.text, twig))
        return twig, source.cast(dtype).tree(place)


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
    twig.check(config.text.num_layers)
    tensors = twig_tensors(config.text, twig)
    source = from_tree(tensors, params, "the tree to be written").cast(dtype)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_hf(folder, source)
    # Last: launch.ablate takes a folder with notes for a twig that is there.
    write_notes(folder, twig, fingerprint(config, base, twig.K))


def fingerprint(config: LlavaConfig, base: Params, K: int) -> str:
    """Names the base that a twig on layer K - 1 reads: hexadecimal sha256.

    Of the decoder's architecture and of samples, at fixed places, of what feeds the twig: word
    embeddings, projector and the first K layers (`feeds_twig`). Only the signs of the samples
    count: they survive any rounding, so float32, float16 and bfloat16 copies of one base agree.
    (Values do not: in 1 of 16 cases rounding to bfloat16 gives another result by way of float16.) A
    vocabulary padded with further tokens is the same base too.
    """
    text = dataclasses.asdict(config.text)
    irrelevant = ("vocab_size", "max_positions", "tied_head")
    shape = {k: float(v) for k, v in text.items() if k not in irrelevant}
    found = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
    flat = flatten({"projector": base["projector"]})
    for k in range(K):
        flat |= flatten({"text": {f"layers_{k}": base["text"][f"layers_{k}"]}})
    kernels = {path: leaf for path, leaf in flat.items() if path.endswith("/kernel")}
    # Rows that every vocabulary of the same tokens shares.
    kernels["text/embed_tokens/embedding"] = base["text"]["embed_tokens"]["embedding"][:1024]
    for path, leaf in sorted(kernels.items()):
        rows, columns = (max(1, size // 64) for size in leaf.shape)
        sample = gather(leaf[::rows, ::columns]).astype(np.float32)
        found.update(path.encode() + np.packbits(np.signbit(sample)).tobytes())
    return found.hexdigest()


def feeds_twig(K: int) -> str:
    """A regular expression for the paths of a base that `fingerprint` reads."""
    layers = "|".join(str(k) for k in range(K))
    return (
        rf"projector/|text/embed_tokens/|text/layers_({layers})/"
        if K
        else (r"projector/|text/embed_tokens/")
    )
