"""A twig on LLaVA-1.5-7B as the published script trains it, which differs from the paper.

    python -m launch.train --config configs/llava15_7b_twig_reference.py --export twig

It leaves transformers' b2 of 0.999, and rows are grouped into those with images and those without.
Nothing is clipped: its settings of DeepSpeed, which go before transformers' norm of 1, name none.
"""

import dataclasses

from configs import llava15_7b_twig
from twig_jax.training.config import OptimConfig, TrainConfig


def get_config() -> TrainConfig:
    config = llava15_7b_twig.get_config()
    return dataclasses.replace(
        config,
        out="runs/llava15_7b_twig_reference",
        optim=OptimConfig(b2=0.999),
        data=dataclasses.replace(config.data, by_modality=True),
    )
