"""Digits, stage 1 of 4: the vision tower learns to name what each visual token shows.

python -m launch.train --config configs/digits_vision.py
"""

from twig_jax.training.config import DataConfig, OptimConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        stage="vision",
        out="runs/digits_vision",
        layers=1,  # the decoder does not run in this stage
        steps=2500,
        optim=OptimConfig(lr=1e-3, weight_decay=0.05, clip=1.0),
        data=DataConfig(batch_size=32, row_tokens=228),
    )
