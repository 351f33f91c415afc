"""The original layout of LLaVA, made from a Hugging Face folder."""

import json
import shutil

import torch
from safetensors.torch import load_file

NAMES = {
    "language_model.": "",
    "multi_modal_projector.linear_1": "model.mm_projector.0",
    "multi_modal_projector.linear_2": "model.mm_projector.2",
    "vision_tower.": "model.vision_tower.vision_tower.vision_model.",
}


def original_name(name):
    """A tensor's name where the tower is embedded."""
    old = next(old for old in NAMES if name.startswith(old))
    return name.replace(old, NAMES[old])


def original(folder, hf, tower=None, **fields):
    """The same base in the original layout; `tower` is a folder for the vision part.

    fields: further ones for config.json.
    """
    folder.mkdir(exist_ok=True)
    config = json.loads((hf / "config.json").read_text())
    tensors, vision = {}, {}
    for name, x in load_file(hf / "model.safetensors").items():
        if tower is not None and name.startswith("vision_tower."):
            vision[name.replace("vision_tower.", "vision_model.")] = x
        else:
            tensors[original_name(name)] = x
    torch.save(tensors, folder / "pytorch_model.bin")
    if tower is not None:
        tower.mkdir()
        vision["text_model.embeddings.token_embedding.weight"] = torch.zeros(3, 3)
        vision["logit_scale"] = torch.zeros(())
        torch.save(vision, tower / "pytorch_model.bin")
        clip = {"model_type": "clip", "vision_config": config["vision_config"]}
        (tower / "config.json").write_text(json.dumps(clip))
        shutil.copy(hf / "processor_config.json", tower)
    text = config["text_config"] | {"model_type": "llava_llama"}
    mm = {
        "mm_vision_tower": "openai/clip-vit-tiny",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
    }
    (folder / "config.json").write_text(json.dumps(text | mm | fields))
    return folder
