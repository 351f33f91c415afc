"""Reading a folder of reference vectors (tests/golden, or any of the same format)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from twig_jax.config import LlavaConfig, TextConfig, TwigConfig, VisionConfig
from twig_jax.decoding.generate import Generator
from twig_jax.decoding.settings import Request, Settings

MODES = {"plain": "ar", "ttp": "ar_ttp", "ssd": "ssd", "ttp_ssd": "ssd_ttp"}
LAYER = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class Case:
    """One recorded model and prompt, in our types."""

    config: LlavaConfig
    twig_config: TwigConfig
    base: dict[str, Any]
    twig: dict[str, Any]
    facts: dict[str, Any]
    request: Request
    outputs: dict[str, np.ndarray]

    def settings(self, mode: str) -> Settings:
        """The call that the recording was made with."""
        f = self.facts
        return Settings(
            mode=mode,
            avg_retained=f["avg_retained"],
            max_new_tokens=f["max_new_tokens"],
            gamma=f["gamma"],
            theta=f["theta"],
        )

    def generator(self) -> Generator:
        """Base and twig, ready to answer."""
        return Generator(self.config, self.base, self.twig_config, self.twig)


def _decoder(tensors: dict[str, np.ndarray], layers: int) -> dict[str, Any]:
    t = {name: x.astype(np.float32) for name, x in tensors.items()}
    tree: dict[str, Any] = {}
    for i in range(layers):
        at = f"model.layers.{i}."
        tree[f"layers_{i}"] = {
            name: {"kernel": t[f"{at}{part}.{name}.weight"].T}
            for part, names in LAYER.items()
            for name in names
        } | {name: {"scale": t[f"{at}{name}.weight"]} for name in NORMS}
    tree["norm"] = {"scale": t["model.norm.weight"]}
    tree["lm_head"] = {"kernel": t["lm_head.weight"].T}
    if "model.embed_tokens.weight" in t:
        tree["embed_tokens"] = {"embedding": t["model.embed_tokens.weight"]}
    return tree


def load(folder: Path) -> Case:
    """Reads one case."""
    facts = json.loads((folder / "case.json").read_text())
    c = facts["config"]
    side = round(facts["M"] ** 0.5)
    config = LlavaConfig(
        # Only M matters here: the recorded inputs are visual embeddings.
        vision=VisionConfig(image_size=max(side, 1), patch_size=1),
        text=TextConfig(
            vocab_size=c["vocab_size"],
            hidden_size=c["hidden_size"],
            intermediate_size=c["intermediate_size"],
            num_layers=c["num_hidden_layers"],
            num_heads=c["num_attention_heads"],
            num_kv_heads=c["num_key_value_heads"],
            head_dim=c["head_dim"],
            rope_theta=c["rope_theta"],
            rms_norm_eps=c["rms_norm_eps"],
            max_positions=c["max_position_embeddings"],
        ),
        eos_token_id=facts["eos_token_id"],
    )
    assert side * side == facts["M"]
    with np.load(folder / "inputs.npz") as inputs:
        before, after, visual = (inputs[k] for k in ("ids_before", "ids_after", "visual_embeds"))
    M = len(visual)
    request = Request(
        ids=np.concatenate([before, np.zeros(M, np.int32), after]).astype(np.int32),
        is_visual=np.repeat([False, True, False], [len(before), M, len(after)]),
        visual=visual if M else None,
    )
    with np.load(folder / "outputs.npz") as outputs:
        recorded = dict(outputs)
    return Case(
        config,
        TwigConfig(facts["K"], facts["T"], facts["K_f"]),
        {"text": _decoder(load_file(folder / "weights.safetensors"), c["num_hidden_layers"])},
        _decoder(load_file(folder / "twig.safetensors"), facts["T"]),
        facts,
        request,
        recorded,
    )
