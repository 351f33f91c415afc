"""From a conversation's text to token ids with image slots, as a checkpoint needs them."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np

from twig_jax.checkpoints.config_files import (
    differences,
    has_original_layout,
    image_processor,
    is_original,
)
from twig_jax.checkpoints.processor_files import has_tokenizer
from twig_jax.checkpoints.storage import read_json
from twig_jax.data import conversation
from twig_jax.data.conversation import IMAGE

# What a model's name says about its template, in the order of LLaVA's scripts.
_TEMPLATES = {"llama-2": "llava_llama_2", "mistral": "mistral_instruct", "v1": "vicuna_v1"}

# What transformers resizes to and cuts out where a processor's file does not say.
_CLIP_SIZE = 224


@dataclass(frozen=True)
class Conventions:
    """How a checkpoint was taught to read text and images.

    tokenize: the way from text to ids, see `prompt_ids`.
    pad: images are padded to a square; otherwise their middle is cut out, see `images.preprocess`.
    template: a name in `conversation.TEMPLATES`.
    shortest_edge: the side that an image's shorter one is resized to before the middle is cut out,
    None where it is the side of what is cut out.
    """

    tokenize: Literal["llava", "hf"]
    pad: bool
    template: str
    shortest_edge: int | None = None


AS_LLAVA = "llava"


def conventions(folder: str | Path, wanted: str | None = None) -> Conventions:
    """The conventions of a checkpoint folder, by its config.json and image processor's settings.

    LLaVA's own layout (mm_vision_tower, or LlavaLlamaForCausalLM): LLaVA's tokenising, padding
    where image_aspect_ratio is "pad", and the template that LLaVA infers from a model's name.
    Hugging Face layout: tokenising and images as transformers' processor does them (transparency
    apart, see `images.load_image`), template llava_hf; but where config.json has LLaVA's
    image_aspect_ratio, the weights were converted from LLaVA's layout and keep its conventions,
    with vicuna_v1. In both, `conversation_template` in config.json wins.

    wanted: "llava" for what the weights of LLaVA-1.5 were trained with, and the published twigs:
    a Hugging Face folder is then read as LLaVA's own code would, images padded, with vicuna_v1.

    Raises FileNotFoundError without config.json; ValueError, naming the file, for a model that is
    no LLaVA, an unknown template, or images to be prepared in a way that is not implemented, and
    for other conventions than "llava" asked for.
    """
    if wanted not in (None, AS_LLAVA):
        raise ValueError(f"no conventions {wanted!r}; there are: {AS_LLAVA}")
    folder = Path(folder).absolute()
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json")
    config = read_json(path)
    original = is_original(config)
    processor = _Processor() if original else _read_processor(folder)
    if original or "image_aspect_ratio" in config:
        name = _inferred_template(folder, config) if original else "vicuna_v1"
        found = Conventions("llava", _pads(path, config), name, processor.shortest_edge)
    else:
        found = Conventions("hf", processor.pad, "llava_hf", processor.shortest_edge)
        if wanted:
            found = Conventions("llava", True, "vicuna_v1")
    if "conversation_template" not in config:
        return found
    name = str(config["conversation_template"])
    try:
        conversation.template(name)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return replace(found, template=name)


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a checkpoint folder, by transformers.

    A folder with tokenizer.model alone, as LLaVA's own checkpoints are, gets Llama's tokenizer with
    sentencepiece's ids.
    Raises FileNotFoundError for a missing folder or one without tokenizer files, ImportError where
    a package to read them is missing, ValueError for a tokenizer.model of another kind.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder} to load a tokenizer from")
    if not has_tokenizer(folder):
        raise FileNotFoundError(
            f"folder {folder} has no tokenizer: neither tokenizer.json nor tokenizer.model"
        )
    if not (folder / "tokenizer.json").is_file():
        return _load_sentencepiece(folder)
    # It says that there is no PyTorch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers  # slow, and not needed where ids are given

    # AutoTokenizer imports PyTorch where there is one, which takes seconds. And of models that it
    # does not know, LLaVA's own among them, it builds Llama's tokenizer anew, with other ids.
    settings = folder / "tokenizer_config.json"
    named = read_json(settings).get("tokenizer_class") if settings.is_file() else None
    as_it_is = ["PreTrainedTokenizerFast", "TokenizersBackend"]  # of transformers 4 and 5
    if has_original_layout(folder):
        as_it_is += ["LlamaTokenizer", "LlamaTokenizerFast"]
    if named in as_it_is:
        return transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def prompt_ids(
    tokenizer: Any,
    text: str,
    image_token_id: int,
    tokens_per_image: int,
    images: int | None = None,
    *,
    tokenize: str = "llava",
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of a prompt, with one slot per visual token where the text has image markers.

    tokenize "llava": the text is split at the markers and each chunk tokenised by itself, one BOS
    leads (where the tokenizer puts one before a text), and slots filled with image_token_id lie
    between the chunks (LLaVA's tokenizer_image_token).
    tokenize "hf": every marker stands for as many as there are slots, and the whole text is
    tokenised at once (transformers' LlavaProcessor). Ids differ where a chunk begins, as Llama's
    tokenizer puts a space before a text.

    images: how many images come with the prompt, None to go by the markers.
    Returns (ids int32 [P], is_visual bool [P]). Raises ValueError where markers and images differ
    in number, for "hf" with a tokenizer that has no marker or another id for it, for another
    `tokenize`, or where the text is not Unicode.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON and command lines can have half a character
        raise ValueError(f"the prompt is not Unicode: {error}") from None
    markers = text.count(IMAGE)
    if images is not None and markers != images:
        raise ValueError(f"the prompt has {markers} {IMAGE} markers but {images} images are given")
    if tokenize == "hf":
        return _whole(tokenizer, text, image_token_id, tokens_per_image)
    if tokenize != "llava":
        raise ValueError(f"tokenize is {tokenize!r}, expected llava or hf")
    chunks = [tokenizer.encode(chunk, add_special_tokens=True) for chunk in text.split(IMAGE)]
    return _joined(tokenizer, chunks, chunks, image_token_id, tokens_per_image)[:2]


def answer_ids(
    tokenizer: Any,
    text: str,
    answers: Sequence[tuple[int, int]],
    image_token_id: int,
    tokens_per_image: int,
    *,
    tokenize: str = "llava",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ids of `prompt_ids`, and which of them belong to an answer.

    answers: where they lie in the text, in characters, as `conversation.answers` gives it. A token
    belongs to the answer that its last character lies in.
    Returns (ids int32 [P], is_visual bool [P], is_answer bool [P]). Raises ValueError as
    `prompt_ids` does, and for a tokenizer that does not say where in a text its tokens are.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not say where in a text its tokens are: "
            "load one that is saved as tokenizer.json"
        )
    if tokenize == "hf":
        ids, visual = prompt_ids(tokenizer, text, image_token_id, tokens_per_image, tokenize="hf")
        _, found = _located(tokenizer, text.replace(IMAGE, IMAGE * tokens_per_image), 0)
        grown = (tokens_per_image - 1) * len(IMAGE)  # characters, by every marker before
        ends = np.array(found) - np.cumsum(visual) // tokens_per_image * grown
    else:
        chunks, chunk_ends, begin = [], [], 0
        for chunk in text.split(IMAGE):
            chunk_ids, found = _located(tokenizer, chunk, begin)
            chunks.append(chunk_ids)
            chunk_ends.append(found)
            begin += len(chunk) + len(IMAGE)
        ids, visual, ends = _joined(tokenizer, chunks, chunk_ends, image_token_id, tokens_per_image)
    # Odd where begin < end of the token <= end of the answer.
    inside = np.searchsorted(np.array(answers).reshape(-1), ends) % 2 == 1
    return ids, visual, inside & ~visual


def _located(tokenizer: Any, text: str, begin: int) -> tuple[list[int], list[int]]:
    """Ids of a text, and where each ends, for a text that begins at that character."""
    encoded = tokenizer(text, add_special_tokens=True, return_offsets_mapping=True, verbose=False)
    return encoded["input_ids"], [begin + end for _, end in encoded["offset_mapping"]]


def _joined(
    tokenizer: Any,
    chunks: Sequence[list[int]],
    values: Sequence[list[int]],
    image_token_id: int,
    tokens_per_image: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Chunks of ids with image slots between and one BOS, which of them are slots, their values."""
    lead = int(chunks[0][:1] == [tokenizer.bos_token_id])
    ids, visual, joined = chunks[0], [False] * len(chunks[0]), values[0]
    for chunk, value in zip(chunks[1:], values[1:], strict=True):
        ids = ids + [image_token_id] * tokens_per_image + chunk[lead:]
        visual += [True] * tokens_per_image + [False] * (len(chunk) - lead)
        joined = joined + [0] * tokens_per_image + value[lead:]
    return np.array(ids, np.int32), np.array(visual, bool), np.array(joined, np.int64)


def _whole(
    tokenizer: Any, text: str, image_token_id: int, tokens_per_image: int
) -> tuple[np.ndarray, np.ndarray]:
    known = tokenizer.get_vocab().get(IMAGE)
    if IMAGE in text and known != image_token_id:
        raise ValueError(
            f"the model's image token is {image_token_id}, but the tokenizer has "
            + (f"no {IMAGE}" if known is None else f"{known} for {IMAGE}")
        )
    expanded = text.replace(IMAGE, IMAGE * tokens_per_image)
    ids = np.array(tokenizer.encode(expanded, add_special_tokens=True), np.int32)
    return ids, ids == image_token_id


def _load_sentencepiece(folder: Path) -> Any:
    """Llama's tokenizer from tokenizer.model.

    transformers 5 differs from sentencepiece, and from its own version 4 that LLaVA runs on, in
    what tokenizer_config.json leaves out, and in runs of spaces and those before a text. (One
    behind a special token counts as a text's first one here, which with `legacy: false` it does
    not in version 4; no template has one there.)
    """
    try:
        for package in ("sentencepiece", "google.protobuf"):
            import_module(package)
    except ImportError as error:
        raise ImportError(
            f"reading {folder / 'tokenizer.model'} needs sentencepiece and protobuf: "
            "pip install sentencepiece protobuf"
        ) from error
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
    from tokenizers import Regex, models, normalizers
    from transformers import LlamaTokenizer

    file = folder / "tokenizer.model"
    settings: dict[str, Any] = {"add_bos_token": True, "legacy": True}  # version 4's defaults
    path = folder / "tokenizer_config.json"
    if path.is_file():
        given = read_json(path)
        settings |= {key: given[key] for key in settings if given.get(key) is not None}
        # Old conversions of Llama name none, and mean its own.
        named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        settings |= {name: own for name, own in named.items() if given.get(name) == ""}
    model = ModelProto.FromString(file.read_bytes())
    if model.trainer_spec.model_type != model.trainer_spec.BPE:
        raise ValueError(f"{file} is no tokenizer of Llama's kind, which merges pairs (BPE)")
    if settings["legacy"] and not model.normalizer_spec.add_dummy_prefix:
        raise ValueError(
            f"{file} puts no space before a text (add_dummy_prefix), which is supported where "
            "tokenizer_config.json has `legacy: false`"
        )
    tokenizer = LlamaTokenizer.from_pretrained(folder, **settings)
    # Sentencepiece puts a space before every text, this tokenizer only before one without.
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex(r"\A[ ▁]"), "  ")
    # It merges in the order of pieces' scores, this tokenizer in that of their ids. Llama's runs of
    # spaces have the first ids and the lowest scores.
    scores = {piece.piece: piece.score for piece in model.pieces}
    found = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokenizer.backend_tokenizer.model = models.BPE(
        vocab=found["vocab"],
        merges=sorted(map(tuple, found["merges"]), key=lambda pair: -scores["".join(pair)]),
        unk_token=found["unk_token"],
        fuse_unk=found["fuse_unk"],
        byte_fallback=found["byte_fallback"],
    )
    return tokenizer


@dataclass(frozen=True)
class _Processor:
    """What a Hugging Face image processor does to an image's shape."""

    pad: bool = False
    shortest_edge: int | None = None


def _inferred_template(folder: Path, config: Mapping[str, Any]) -> str:
    """The template that LLaVA's scripts choose by the model's name (llava/eval/run_llava.py).

    They know the folder's name alone. config.json keeps the name after a folder was renamed, but
    for a newly trained model it has the decoder's that training began with, which says nothing.
    """
    name = folder.name
    if name.startswith("checkpoint-"):
        name = folder.parent.name
    named = str(config.get("_name_or_path", "")).rstrip("/").rsplit("/", 1)[-1]
    for said in (name.lower(), named.lower() if "llava" in named.lower() else ""):
        for part, template in _TEMPLATES.items():
            if part in said:
                return template
    return "vicuna_v1"


def _pads(path: Path, config: Mapping[str, Any]) -> bool:
    """Whether LLaVA's process_images pads; without the key it does not.

    Raises ValueError for prompts or images with parts that are not implemented.
    """
    ratio = config.get("image_aspect_ratio")
    if str(ratio).startswith("anyres"):
        raise ValueError(
            f"{path}: image_aspect_ratio {ratio!r} cuts an image into tiles; supported is one view "
            'of it, padded ("pad") or not ("square")'
        )
    if config.get("mm_use_im_start_end"):
        raise ValueError(
            f"{path}: mm_use_im_start_end puts tokens around every image, supported is none"
        )
    return ratio == "pad"


def _read_processor(folder: Path) -> _Processor:
    """The settings of a folder's image processor; transformers' defaults where no file has them.

    Raises ValueError that lists all settings which `images.preprocess` does not implement.
    """
    path, settings = image_processor(folder)
    must = {
        "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "pad_size": None,
    }
    problems = differences(settings, must, "")
    edge = settings.get("size", _CLIP_SIZE)
    if isinstance(edge, Mapping):
        others = {name for name, side in edge.items() if side is not None} - {"shortest_edge"}
        edge = edge.get("shortest_edge")
        if edge is None or others:
            problems.append(f"size is {settings['size']!r}, supported is shortest_edge alone")
    crop = settings.get("crop_size", _CLIP_SIZE)
    sides = set(crop.values()) if isinstance(crop, Mapping) else {crop}
    if len(sides) > 1:
        problems.append(f"crop_size is {crop!r}, supported is a square")
    if problems:
        raise ValueError(f"{path} asks for what is not supported:\n  " + "\n  ".join(problems))
    return _Processor(
        # Elsewhere the key means that images of a batch are padded to one size.
        pad=bool(settings.get("do_pad"))
        and str(settings.get("image_processor_type")).startswith("LlavaImageProcessor"),
        shortest_edge=None if edge in sides else edge,
    )
