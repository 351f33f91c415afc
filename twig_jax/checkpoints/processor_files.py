"""The files of a folder that AutoTokenizer and AutoProcessor read."""

import shutil
from pathlib import Path

from twig_jax.checkpoints.config_files import PREPROCESSOR, PROCESSOR, has_original_layout
from twig_jax.checkpoints.storage import write_json
from twig_jax.config import LlavaConfig

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer's files."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def write_processor(
    folder: Path, config: LlavaConfig, source: Path | None, pad: bool = False
) -> None:
    """The files that AutoTokenizer and AutoProcessor need.

    The tokenizer's are copied from the folder `source`; the image processor's too where it has
    them and is of Hugging Face's layout, else they are written for CLIP's processor, or with `pad`
    for LLaVA's, which pads images to squares first. Raises FileNotFoundError for a source without a
    tokenizer.
    """
    copied = []
    if source is not None:
        # LLaVA does not read a processor's files.
        settings = () if has_original_layout(source) else (PROCESSOR, PREPROCESSOR)
        names = (*TOKENIZER_FILES, *settings)
        copied = [name for name in names if (source / name).is_file()]
        if not has_tokenizer(source):
            raise FileNotFoundError(
                f"{source} has no tokenizer: neither tokenizer.json nor tokenizer.model"
            )
        if source.resolve() != folder.resolve():
            for name in copied:
                shutil.copyfile(source / name, folder / name)
    if PROCESSOR in copied or PREPROCESSOR in copied:
        return
    vision = config.vision
    write_json(
        folder / PROCESSOR,
        {
            "image_processor": {
                "image_processor_type": "LlavaImageProcessor" if pad else "CLIPImageProcessor",
                "crop_size": {"height": vision.image_size, "width": vision.image_size},
                "size": {"shortest_edge": vision.image_size},
                "do_center_crop": True,
                "do_convert_rgb": True,
                "do_normalize": True,
                "do_pad": pad,
                "do_rescale": True,
                "do_resize": True,
                "image_mean": list(vision.image_mean),
                "image_std": list(vision.image_std),
                "resample": 3,  # bicubic
                "rescale_factor": 1 / 255,
            },
            "image_token": "<image>",
            "num_additional_image_tokens": 1,  # the class token, which "default" drops again
            "patch_size": vision.patch_size,
            "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": "full" if vision.class_token else "default",
        },
    )
