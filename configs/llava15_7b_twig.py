"""A twig on LLaVA-1.5-7B, with the paper's settings.

    python -m launch.train --config configs/llava15_7b_twig.py --export twig

reads the base from the hub or its cache, and LLaVA-665K from data/ (see docs/training.md), as LLaVA
read it: images padded to squares, the prompts of vicuna_v1. A batch holds about 140 conversations,
where the paper has 128; the steps are one epoch.
"""

from twig_jax.training.config import DataConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        stage="twig",
        preset="llava-1.5-7b",
        base="llava-hf/llava-1.5-7b-hf",
        base_dtype="bfloat16",
        out="runs/llava15_7b_twig",
        steps=4650,
        data=DataConfig(
            source="data/llava_v1_5_mix665k.json",
            images="data/images",
            conventions="llava",
            batch_size=32,
            row_tokens=4096,
            row_images=5,
            max_tokens=2048,
            workers=8,
        ),
        device_rows=2,
        head_chunk=2048,
        remat=True,
        mesh=(1, 0, 1),
    )
