"""The JSON files beside the weights: config.json, generation and processor settings."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twig_jax.checkpoints.storage import read_json, write_json
from twig_jax.config import CLIP_MEAN, CLIP_STD, LlavaConfig, TextConfig, VisionConfig

Json = Mapping[str, Any]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_PROCESSOR, _PREPROCESSOR = "processor_config.json", "preprocessor_config.json"

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
    "vision_feature_select_strategy": "default",
    "tie_word_embeddings": False,
}
_VISION_MUST = {"model_type": "clip_vision_model", "hidden_act": "quick_gelu", "num_channels": 3}
_TEXT_MUST = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}


def read_config(folder: Path) -> LlavaConfig:
    """The configuration in a folder's config.json, as transformers would read it.

    Missing fields take transformers' defaults. Pixel mean and deviation come from the processor's
    file where there is one. Raises FileNotFoundError without config.json, ValueError that lists
    every setting the models here do not implement.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json")
    model = read_json(path)
    given_vision = model.get("vision_config")
    vision = _VISION | (_WHOLE_VISION if given_vision is None else given_vision)
    text = _TEXT | (model.get("text_config") or {})
    rope = _rope(text)
    feature = model.get("vision_feature_layer", -2)
    bos, eos = _single(text["bos_token_id"]), _single(text["eos_token_id"])
    problems = [
        *_differences(model, _MODEL_MUST, ""),
        *_differences(vision, _VISION_MUST, "vision_config."),
        *_differences(text, _TEXT_MUST, "text_config."),
        *_differences(rope, {"rope_type": "default"}, "text_config.rope_parameters."),
    ]
    integers = {
        "vision_feature_layer": feature,
        "vision_config.image_size": vision["image_size"],
        "vision_config.patch_size": vision["patch_size"],
        "text_config.bos_token_id": bos,
        "text_config.eos_token_id": eos,
    }
    problems += [
        f"{name} is {value!r}, supported is one integer"
        for name, value in integers.items()
        if not isinstance(value, int)
    ]
    if problems:
        raise ValueError(f"{path} asks for what is not supported:\n  " + "\n  ".join(problems))

    pad = next(
        (p for p in (model.get("pad_token_id"), text.get("pad_token_id")) if p is not None),
        eos,  # as transformers pads where no id is given
    )
    mean, std = _pixel_statistics(folder)
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
            feature_layer=feature,
            image_mean=mean,
            image_std=std,
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
        ),
        image_token_id=model.get("image_token_index", model.get("image_token_id", 32000)),
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )


def _differences(found: Json, must: Json, prefix: str) -> list[str]:
    return [
        f"{prefix}{key} is {found[key]!r}, supported is {value!r}"
        for key, value in must.items()
        if found.get(key, value) != value
    ]


def _single(value: Any) -> Any:
    """The item of a list of one."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _rope(text: Json) -> dict[str, Any]:
    """rope_theta and rope_type, from rope_parameters or from the fields it replaced."""
    old = text.get("rope_scaling") or {}
    new = text.get("rope_parameters") or {}
    return {
        "rope_theta": new.get("rope_theta", text.get("rope_theta", 10000.0)),
        "rope_type": new.get("rope_type", old.get("rope_type", old.get("type", "default"))),
    }


def _pixel_statistics(folder: Path) -> tuple[Any, Any]:
    """Mean and deviation of the image processor, CLIP's where no file has them."""
    settings: Json = {}
    if (folder / _PREPROCESSOR).is_file():
        settings = read_json(folder / _PREPROCESSOR)
    if (folder / _PROCESSOR).is_file():  # newer, so it wins
        settings = read_json(folder / _PROCESSOR).get("image_processor") or settings
    return tuple(settings.get("image_mean", CLIP_MEAN)), tuple(settings.get("image_std", CLIP_STD))


def write_config(folder: Path, config: LlavaConfig, dtype: str) -> None:
    """config.json and generation_config.json for transformers' LlavaForConditionalGeneration."""
    text, vision = config.text, config.vision
    special = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    content = {
        "architectures": ["LlavaForConditionalGeneration"],
        "dtype": dtype,
        "image_seq_length": vision.num_patches,
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
        }
        | special
        | _TEXT_MUST,
    }
    write_json(folder / "config.json", content | _MODEL_MUST)
    write_json(folder / "generation_config.json", special)


def write_processor(folder: Path, config: LlavaConfig, source: Path | None) -> None:
    """The files that AutoTokenizer and AutoProcessor need.

    The tokenizer's are copied from the folder `source`; the image processor's too where it has
    them, else they are written for CLIP's processor. Raises FileNotFoundError for a source without
    a tokenizer.
    """
    copied = []
    if source is not None:
        names = (*_TOKENIZER_FILES, _PROCESSOR, _PREPROCESSOR)
        copied = [name for name in names if (source / name).is_file()]
        if not {"tokenizer.json", "tokenizer.model"} & set(copied):
            raise FileNotFoundError(
                f"{source} has no tokenizer: neither tokenizer.json nor tokenizer.model"
            )
        if source.resolve() != folder.resolve():
            for name in copied:
                shutil.copyfile(source / name, folder / name)
    if _PROCESSOR in copied or _PREPROCESSOR in copied:
        return
    vision = config.vision
    write_json(
        folder / _PROCESSOR,
        {
            "image_processor": {
                "image_processor_type": "CLIPImageProcessor",
                "crop_size": {"height": vision.image_size, "width": vision.image_size},
                "size": {"shortest_edge": vision.image_size},
                "do_center_crop": True,
                "do_convert_rgb": True,
                "do_normalize": True,
                "do_rescale": True,
                "do_resize": True,
                "image_mean": list(vision.image_mean),
                "image_std": list(vision.image_std),
                "resample": 3,  # bicubic
                "rescale_factor": 1 / 255,
            },
            "image_token": "<image>",
            "num_additional_image_tokens": 1,  # the class token, which LLaVA drops again
            "patch_size": vision.patch_size,
            "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": "default",
        },
    )
