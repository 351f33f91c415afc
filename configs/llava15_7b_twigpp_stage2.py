"""A TwigVLM++ twig on LLaVA-1.5-7B: the paper's second stage, reinforcement of its P-Head.

    python -m launch.train --config configs/llava15_7b_twigpp_stage2.py --export twigpp2

Starts from the first stage's twig. A batch holds about 140 conversations, where the paper has 128;
350 steps see 50,000 of them. Conversations are cut off behind 384 text tokens.
"""

import dataclasses

from configs import llava15_7b_twig
from twig_jax.training.config import OptimConfig, ReinforceConfig, TrainConfig


def get_config() -> TrainConfig:
    return dataclasses.replace(
        llava15_7b_twig.get_config(),
        out="runs/llava15_7b_twigpp2",
        twig_init="twigpp",
        p_head=True,
        steps=350,
        optim=OptimConfig(lr=2e-5),
        reinforce=ReinforceConfig(
            actions=32,
            at_a_time=4,
            budgets=(64.0, 85.0, 107.0, 128.0, 149.0, 171.0, 192.0),
            least_spread=1e-3,  # what bfloat16 does to a mean log-probability stays below
            questions=5,
            text_tokens=384,
        ),
    )
