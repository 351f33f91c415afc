"""Digits, TwigVLM++: the P-Head learns from what prunings do to answers.

    python -m launch.train --config configs/digits_twigpp_stage2.py --export runs/twigpp2/twig

Starts from the first stage's twig. The budgets are those of 66.7 to 88.9 % pruned, as the paper's;
`--set "reinforce.budgets=(16.0,)"` stays at the lowest.
"""

import dataclasses

from configs import digits_twig
from twig_jax.training.config import OptimConfig, ReinforceConfig, TrainConfig


def get_config() -> TrainConfig:
    config = digits_twig.get_config()
    return dataclasses.replace(
        config,
        out="runs/digits_twigpp2",
        twig_init="runs/digits_twigpp/twig",
        p_head=True,
        steps=200,
        optim=OptimConfig(lr=1e-3, warmup=0.02, clip=1.0),
        reinforce=ReinforceConfig(
            actions=8,
            at_a_time=8,
            budgets=(16.0, 21.0, 27.0, 32.0, 37.0, 43.0, 48.0),
            questions=4,
            text_tokens=40,
        ),
        data=dataclasses.replace(config.data, batch_size=8, row_tokens=276),
        head_chunk=64,
    )
