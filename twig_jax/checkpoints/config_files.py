"""The JSON files beside the weights: config.json and generation settings, pixel statistics.

Two layouts are read: Hugging Face's (`text_config` and `vision_config` apart) and the original
LLaVA's (Llama's fields at the root, `mm_*` fields for the rest). One is written: Hugging Face's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twig_jax.checkpoints.storage import read_json, write_json
from twig_jax.config import CLIP_MEAN, CLIP_STD, LlavaConfig, TextConfig, VisionConfig

Json = Mapping[str, Any]

PROCESSOR, PREPROCESSOR = "processor_config.json", "preprocessor_config.json"
_GENERATION = "generation_config.json"

# What transformers assumes where config.json says nothing: for a vision part that is not there at
# all, and for single fields of one that is.
_WHOLE_VISION: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_VISION: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "layer_norm_eps": 1e-5,
}
_TEXT: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# The variants that the models here implement; also transformers' defaults for these fields.
_MODEL_MUST = {
    "model_type": "llava",
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
}
_VISION_MUST = {"model_type": "clip_vision_model", "hidden_act": "quick_gelu", "num_channels": 3}
_TEXT_MUST = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}
_ORIGINAL_MUST = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}
# What transformers assumes of Mistral's decoder; all else is as Llama's.
_MISTRAL: dict[str, Any] = {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
_ORIGINALS = {"LlavaLlamaForCausalLM", "LlavaMistralForCausalLM"}
# Whether the class token's feature is kept, by what either layout calls it.
_CLASS_TOKEN = {"default": False, "full": True, "patch": False, "cls_patch": True}
# Fields of the original layout that say how to prompt; they are kept beside Hugging Face's.
_NOTES = ("image_aspect_ratio", "conversation_template")
# The towers that original checkpoints name, as a hub id or a folder, where their own
# configuration is not at hand.
_TOWERS: dict[str, dict[str, Any]] = {
    "clip-vit-large-patch14-336": _WHOLE_VISION,
    "clip-vit-large-patch14": _WHOLE_VISION | {"image_size": 224},
}


def read_config(folder: Path, vision_source: Path | None = None) -> LlavaConfig:
    """The configuration in a folder's config.json, as its own code would read it.

    Missing fields take transformers' defaults. What ends an answer comes from
    generation_config.json, pixel mean and deviation from the processor's file, where there is one.
    vision_source: the folder of an original checkpoint's vision tower.
    Raises FileNotFoundError without config.json, ValueError that lists every setting the models
    here do not implement.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json")
    model = read_json(path)
    if is_original(model):
        return _original(path, model, vision_source)
    given_vision = model.get("vision_config")
    vision = _VISION | (_WHOLE_VISION if given_vision is None else given_vision)
    given_text = model.get("text_config") or {}
    mistral = given_text.get("model_type") == "mistral"
    text = _text(given_text, mistral)
    return _config(
        path,
        vision,
        text,
        feature=("vision_feature_layer", model.get("vision_feature_layer", -2)),
        strategy=(
            "vision_feature_select_strategy",
            model.get("vision_feature_select_strategy", "default"),
        ),
        image_token_id=model.get("image_token_index", model.get("image_token_id", 32000)),
        eos=_eos(folder, {"": model, "text_config.": text}),
        # transformers pads with eos where no id is given.
        pad=(model.get("pad_token_id"), text.get("pad_token_id")),
        # transformers ties where either says so.
        tied=text.get("tie_word_embeddings") or model.get("tie_word_embeddings"),
        pixels=_pixel_statistics(folder),
        prefixes=("vision_config.", "text_config."),
        problems=_problems(model, _MODEL_MUST),
        text_must=_TEXT_MUST | ({"model_type": "mistral"} if mistral else {}),
    )


def is_original(model: Json) -> bool:
    """Whether a config.json is of the original LLaVA layout; otherwise it is Hugging Face's."""
    classes = {*(model.get("architectures") or [])}
    if "LlavaForConditionalGeneration" in classes:
        return False
    return bool(classes & _ORIGINALS or {"mm_vision_tower", "mm_projector_type"} & {*model})


def has_original_layout(folder: Path) -> bool:
    """Whether a folder has a config.json, and of the original LLaVA layout."""
    path = folder / "config.json"
    return path.is_file() and is_original(read_json(path))


def notes(folder: Path) -> dict[str, Any]:
    """What config.json says about prompting, in the original layout's words; else nothing."""
    model = read_json(folder / "config.json")
    found = {key: model[key] for key in _NOTES if key in model}
    if is_original(model):
        found.setdefault("image_aspect_ratio", "square")  # what LLaVA does where nothing is said
    return found


def _original(path: Path, model: Json, vision_source: Path | None) -> LlavaConfig:
    tower = model.get("mm_vision_tower")
    if vision_source is not None:
        clip = read_json(vision_source / "config.json")
        vision, statistics = clip.get("vision_config", clip), _pixel_statistics(vision_source)
    elif (known := str(tower).rstrip("/").rsplit("/", 1)[-1]) in _TOWERS:
        vision, statistics = _TOWERS[known], (CLIP_MEAN, CLIP_STD)
    else:
        raise ValueError(
            f"{path} names the vision tower {tower!r}, whose shape is not known here; give its "
            "folder as the vision source"
        )
    text = _text(model, "LlavaMistralForCausalLM" in (model.get("architectures") or ()))
    vocabulary = text["vocab_size"]
    return _config(
        path,
        _VISION | dict(vision),
        text,
        feature=("mm_vision_select_layer", model.get("mm_vision_select_layer", -2)),
        strategy=("mm_vision_select_feature", model.get("mm_vision_select_feature", "patch")),
        image_token_id=vocabulary,  # the first id that means nothing else
        eos=_eos(path.parent, {"": text}),
        pad=(model.get("pad_token_id"),),
        tied=text.get("tie_word_embeddings"),
        pixels=statistics,
        prefixes=("vision tower: ", ""),
        problems=_problems(model, _ORIGINAL_MUST),
        text_must={},
    )


def _problems(model: Json, must: Json) -> list[str]:
    """What a config.json asks for, beside its parts, that is not supported."""
    problems = differences(model, must, "")
    if quantised := model.get("quantization_config"):
        method = quantised.get("quant_method")
        problems.append(f"quantization_config is {method!r}, supported is none")
    return problems


def _text(given: Json, mistral: bool) -> dict[str, Any]:
    """The decoder's settings, with what transformers assumes where nothing is said."""
    text = _TEXT | (_MISTRAL if mistral else {}) | dict(given)
    if mistral and text["sliding_window"]:
        # As long as a window of attention sees all tokens, there is none.
        window = min(text["max_position_embeddings"], text["sliding_window"])
        text["max_position_embeddings"] = window
    return text


def _config(
    path: Path,
    vision: Json,
    text: Json,
    *,
    feature: tuple[str, Any],
    strategy: tuple[str, Any],
    image_token_id: int,
    eos: tuple[str, Any],
    pad: tuple[Any, ...],
    tied: bool | None,
    pixels: tuple[Any, Any],
    prefixes: tuple[str, str],
    problems: list[str],
    text_must: Json,
) -> LlavaConfig:
    """What both layouts share. What comes with its name does so for messages."""
    of_vision, of_text = prefixes
    rope = _rope(text)
    bos, end = _single(text["bos_token_id"]), _single(eos[1])
    problems = [
        *problems,
        *differences(vision, _VISION_MUST, of_vision),
        *differences(text, text_must, of_text),
        *differences(rope, {"rope_type": "default"}, f"{of_text}rope_parameters."),
    ]
    if strategy[1] not in _CLASS_TOKEN:
        problems.append(f"{strategy[0]} is {strategy[1]!r}, supported: {', '.join(_CLASS_TOKEN)}")
    integers = {
        feature[0]: feature[1],
        f"{of_vision}image_size": vision["image_size"],
        f"{of_vision}patch_size": vision["patch_size"],
        f"{of_text}bos_token_id": bos,
        eos[0]: end,
    }
    problems += [
        f"{name} is {value!r}, supported is one integer"
        for name, value in integers.items()
        if not isinstance(value, int)
    ]
    if not problems and vision["image_size"] % vision["patch_size"]:
        problems.append(
            f"{of_vision}image_size is {vision['image_size']}, supported are multiples of "
            f"patch_size, {vision['patch_size']}"
        )
    states = vision["num_hidden_layers"] + 1
    if isinstance(feature[1], int) and not -states <= feature[1] < states:
        problems.append(f"{feature[0]} is {feature[1]}, the tower has {states - 1} layers")
    if problems:
        raise ValueError(f"{path} asks for what is not supported:\n  " + "\n  ".join(problems))
    heads = text["num_attention_heads"]
    return LlavaConfig(
        vision=VisionConfig(
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            hidden_size=vision["hidden_size"],
            intermediate_size=vision["intermediate_size"],
            num_layers=vision["num_hidden_layers"],
            num_heads=vision["num_attention_heads"],
            layer_norm_eps=vision["layer_norm_eps"],
            feature_layer=feature[1],
            class_token=_CLASS_TOKEN[strategy[1]],
            image_mean=pixels[0],
            image_std=pixels[1],
        ),
        text=TextConfig(
            vocab_size=text["vocab_size"],
            hidden_size=text["hidden_size"],
            intermediate_size=text["intermediate_size"],
            num_layers=text["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=text.get("num_key_value_heads") or heads,
            head_dim=text.get("head_dim") or text["hidden_size"] // heads,
            rope_theta=float(rope["rope_theta"]),
            rms_norm_eps=text["rms_norm_eps"],
            max_positions=text["max_position_embeddings"],
            tied_head=bool(tied),
        ),
        image_token_id=image_token_id,
        bos_token_id=bos,
        eos_token_id=end,
        pad_token_id=next((p for p in pad if p is not None), end),
    )


def differences(found: Json, must: Json, prefix: str) -> list[str]:
    """A line for each setting that is there and not what it must be; prefix: before its name."""
    return [
        f"{prefix}{key} is {found[key]!r}, supported is {value!r}"
        for key, value in must.items()
        if found.get(key, value) != value
    ]


def _single(value: Any) -> Any:
    """The item of a list of one."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _eos(folder: Path, parts: Mapping[str, Json]) -> tuple[str, Any]:
    """What ends an answer, as transformers' generate has it, with the name of the setting.

    parts: of config.json, by what is before the names of their settings; the first that has one.
    """
    path = folder / _GENERATION
    generation = {f"{_GENERATION}: ": read_json(path)} if path.is_file() else {}
    found = {
        f"{prefix}eos_token_id": part.get("eos_token_id")
        for prefix, part in {**generation, **parts}.items()
    }
    return next((one for one in found.items() if one[1] is not None), ("eos_token_id", None))


def _rope(text: Json) -> dict[str, Any]:
    """rope_theta and rope_type, from rope_parameters or from the fields it replaced."""
    found = text.get("rope_scaling") or text.get("rope_parameters") or {}  # as transformers has it
    return {
        "rope_theta": found.get("rope_theta", text.get("rope_theta", 10000.0)),
        "rope_type": found.get("rope_type", found.get("type", "default")),
    }


def image_processor(folder: Path) -> tuple[Path, Json]:
    """(file, settings) of a folder's image processor; the folder and none where no file has any."""
    path, settings = folder, dict[str, Any]()
    for name in (PREPROCESSOR, PROCESSOR):  # newer, so it wins
        if (folder / name).is_file():
            content = read_json(folder / name)
            found = content.get("image_processor") if name == PROCESSOR else content
            if found:
                path, settings = folder / name, found
    return path, settings


def _pixel_statistics(folder: Path) -> tuple[Any, Any]:
    """Mean and deviation of the image processor, CLIP's where no file has them."""
    _, settings = image_processor(folder)
    return tuple(settings.get("image_mean") or CLIP_MEAN), tuple(
        settings.get("image_std") or CLIP_STD
    )


def write_config(folder: Path, config: LlavaConfig, dtype: str, notes: Json | None = None) -> None:
    """config.json and generation_config.json for transformers' LlavaForConditionalGeneration.

    notes: further fields, as `notes` finds them; transformers carries them along.
    """
    text, vision = config.text, config.vision
    special = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    content = {
        "architectures": ["LlavaForConditionalGeneration"],
        "dtype": dtype,
        "image_seq_length": vision.num_tokens,
        "tie_word_embeddings": text.tied_head,
        "vision_feature_select_strategy": "full" if vision.class_token else "default",
        "image_token_index": config.image_token_id,
        "vision_feature_layer": vision.feature_layer,
        "vision_config": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "layer_norm_eps": vision.layer_norm_eps,
        }
        | _VISION_MUST,
        "text_config": {
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
            "head_dim": text.head_dim,
            "rms_norm_eps": text.rms_norm_eps,
            "max_position_embeddings": text.max_positions,
            "rope_parameters": {"rope_theta": text.rope_theta, "rope_type": "default"},
            "tie_word_embeddings": text.tied_head,
        }
        | special
        | _TEXT_MUST,
    }
    write_json(folder / "config.json", content | _MODEL_MUST | dict(notes or {}))
    write_json(folder / _GENERATION, special)
