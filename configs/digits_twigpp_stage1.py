"""Digits, TwigVLM++: the twig with a P-Head learns from answers and from its base.

python -m launch.train --config configs/digits_twigpp_stage1.py --export runs/digits_twigpp/twig

Starts from the shipped twig; `--set distill.prediction=0` leaves out the base's next words,
`--set distill.layer=2` names another base layer whose attention is learned. Layer 3 is the one that
chooses best by itself: on 512 validation pages at R̄ = 16 its last token's attention keeps 96.7 % of
the base's accuracy, layers 2 and 4 93 and 94 %, those from 5 on 47 to 67 %.
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
        distill=DistillConfig(prediction=0.1, attention=1.0, layer=3),
    )
