"""The optimizer of a run."""

import math

import jax
import jax.numpy as jnp
import optax

from twig_jax.models.llava import Params
from twig_jax.training.config import OptimConfig


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up over a share of `steps`, then a cosine.

    As transformers' "cosine" schedule, which the reference trains with.
    """
    warmup = math.ceil(config.warmup * steps)
    return optax.warmup_cosine_decay_schedule(
        0.0, config.lr, warmup, max(steps, warmup + 1), config.end_lr
    )


def optimizer(
    config: OptimConfig, steps: int, only: str | None = None
) -> optax.GradientTransformation:
    """AdamW on the schedule, after clipping; only matrices decay.

    only: the one entry of the parameters that is trained; the others have no moments.
    """
    adamw = optax.adamw(
        schedule(config, steps),
        config.b1,
        config.b2,
        weight_decay=config.weight_decay,
        mask=lambda tree: jax.tree.map(lambda x: jnp.ndim(x) > 1, tree),
    )
    # A link where nothing is clipped too, so that checkpoints of both fit.
    clip = optax.identity() if config.clip is None else optax.clip_by_global_norm(config.clip)
    tx = optax.chain(clip, adamw)
    if only is None:
        return tx

    def labels(params: Params) -> Params:
        return {
            name: jax.tree.map(lambda _, name=name: name == only, part)
            for name, part in params.items()
        }

    return optax.partition({True: tx, False: optax.set_to_zero()}, labels)
