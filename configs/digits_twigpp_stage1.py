"""Digits, TwigVLM++: the twig with a P-Head learns from answers and from its base.

python -m launch.train --config configs/digits_twigpp_stage1.py --export runs/digits_twigpp/twig

Starts from the shipped twig; `--set distill.prediction=0` leaves out the base's next words,
`--set distill.layer=8` names the base layer whose attention is learned.
"""

import dataclasses

from configs import digits_twig
from twig_jax.training.config import DistillConfig, TrainConfig


def get_config() -> TrainConfig:
    return dataclasses.replace(
        digits_twig.get_config(),
        out="runs/digits_twigpp",
        twig_init="twig_jax/assets/digits/twig",
        p_head=True,
        distill=DistillConfig(prediction=0.1, attention=1.0),
    )
