"""Digits, stage 3 of 4: the base at its full depth of sixteen layers.

    python -m launch.train --config configs/digits_base.py --export twig_jax/assets/digits/base

The six trained layers come first; the ten above start as the identity.
"""

from twig_jax.training.config import DataConfig, OptimConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        stage="base",
        base="runs/digits_base_shallow",
        out="runs/digits_base",
        deepen=(0, 1, 2, 3, 4, 5) + (None,) * 10,
        steps=1400,
        optim=OptimConfig(lr=8e-4, weight_decay=0.05, clip=1.0),
        content_weight=4.0,
        naming_weight=0.5,
        data=DataConfig(
            batch_size=16,
            row_tokens=340,
            mix=(
                ("cell", 0.14),
                ("find", 0.08),
                ("compare", 0.14),
                ("neighbour", 0.15),
                ("sum", 0.12),
                ("describe", 0.13),
                ("describe_find", 0.05),
                ("describe_neighbour", 0.09),
                ("neighbours", 0.06),
                ("transcribe", 0.04),
            ),
        ),
    )
