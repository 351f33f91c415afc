"""A twig on LLaVA-1.5-13B, trained as that of 7B.

python -m launch.train --config configs/llava15_13b_twig.py --export twig
"""

import dataclasses

from configs import llava15_7b_twig
from twig_jax.training.config import TrainConfig


def get_config() -> TrainConfig:
    return dataclasses.replace(
        llava15_7b_twig.get_config(),
        preset="llava-1.5-13b",
        base="llava-hf/llava-1.5-13b-hf",
        out="runs/llava15_13b_twig",
        device_rows=1,
    )
