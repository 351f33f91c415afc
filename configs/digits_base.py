"""Digits, stage 3 of 4: the base at its full depth of sixteen layers.

    python -m launch.train --config configs/digits_base.py --export twig_jax/assets/digits/base

The six trained layers are spread over the depth; the ten between start as the identity.
"""

from twig_jax.training.config import DataConfig, OptimConfig, TrainConfig

_: int | None = None


def get_config() -> TrainConfig:
    return TrainConfig(
        stage="base",
        base="runs/digits_base_shallow",
        out="runs/digits_base",
        deepen=(0, 1, 2, _, 3, _, 4, _, 5, _, _, _, _, _, _, _),
        steps=800,
        optim=OptimConfig(lr=5e-4, weight_decay=0.05, clip=1.0),
        content_weight=4.0,
        naming_weight=0.2,
        data=DataConfig(batch_size=32, blocks=3),
    )
