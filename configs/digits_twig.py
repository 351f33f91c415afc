"""Digits, stage 4 of 4: the twig grows on the frozen base.

python -m launch.train --config configs/digits_twig.py --export twig_jax/assets/digits/twig
"""

from twig_jax.training.config import DataConfig, OptimConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        stage="twig",
        base="twig_jax/assets/digits/base",
        out="runs/digits_twig",
        steps=1500,
        optim=OptimConfig(lr=1e-3, clip=1.0),
        data=DataConfig(batch_size=32, blocks=3),
    )
