"""Digits, stage 2 of 4: a base of six decoder layers learns to read pages and answer.

    python -m launch.train --config configs/digits_base_shallow.py

Few layers make many cheap steps: finding the named cell takes many, and little depth.
"""

from twig_jax.training.config import DataConfig, OptimConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        stage="base",
        base="runs/digits_vision",
        out="runs/digits_base_shallow",
        layers=6,
        steps=6000,
        optim=OptimConfig(lr=1e-3, end_lr=3e-4, weight_decay=0.05, clip=1.0),
        content_weight=4.0,
        naming_weight=0.5,
        data=DataConfig(
            batch_size=16,
            row_tokens=340,
            mix=(
                ("cell", 0.14),
                ("find", 0.12),
                ("compare", 0.1),
                ("neighbour", 0.14),
                ("sum", 0.07),
                ("describe", 0.07),
                ("describe_find", 0.03),
                ("describe_neighbour", 0.05),
                ("transcribe", 0.08),
                ("locate", 0.07),
                ("neighbours", 0.07),
                ("beside", 0.06),
            ),
        ),
    )
