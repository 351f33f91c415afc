"""A TwigVLM++ twig on LLaVA-1.5-7B: the paper's first stage, with the base as its teacher.

    python -m launch.train --config configs/llava15_7b_twigpp_stage1.py --export twigpp

The attention of base layer 19 (0-based) is learned, as the published script has it; the paper's
pilot study found that depth telling. The base runs through all its layers, so that a step has about
three times the FLOPs of TwigVLM's.
"""

import dataclasses

from configs import llava15_7b_twig
from twig_jax.training.config import DistillConfig, TrainConfig


def get_config() -> TrainConfig:
    return dataclasses.replace(
        llava15_7b_twig.get_config(),
        out="runs/llava15_7b_twigpp",
        p_head=True,
        whole_base=True,
        distill=DistillConfig(prediction=0.1, attention=1.0),
    )
