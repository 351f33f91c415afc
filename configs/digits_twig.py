"""Digits, stage 4 of 4: the twig grows on the frozen base.

python -m launch.train --config configs/digits_twig.py --export runs/digits_twig/twig
"""

from twig_jax.training.config import DataConfig, OptimConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        stage="twig",
        base="twig_jax/assets/digits/base",
        out="runs/digits_twig",
        steps=2400,
        optim=OptimConfig(lr=1e-3, warmup=0.02, clip=1.0),
        data=DataConfig(
            batch_size=16,
            row_tokens=340,
            mix=(
                ("cell", 0.18),
                ("find", 0.14),
                ("neighbour", 0.16),
                ("compare", 0.1),
                ("sum", 0.1),
                ("describe", 0.14),
                ("describe_find", 0.06),
                ("describe_neighbour", 0.08),
                ("locate", 0.04),
            ),
        ),
    )
