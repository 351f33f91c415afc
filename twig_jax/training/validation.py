"""The loss on what is held out."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from twig_jax.models.llava import Params
from twig_jax.training.config import TrainConfig
from twig_jax.training.data import on_mesh, open_batches, row_shard

_BATCHES = 4  # that it is a mean over


def validation_loss(
    config: TrainConfig, loss: Callable[..., Any], mesh: Mesh
) -> Callable[[Params, Params], float]:
    """A function of trained and frozen parameters: the mean of `loss` over a few held-out batches.

    loss: jitted, of trained and frozen parameters and a batch on the mesh -> (loss, metrics).
    """
    base, _ = config.model()
    shard = row_shard(mesh, config.data.batch_size)

    def measure(params: Params, frozen: Params) -> float:
        batches = open_batches(config, base, shard, validation=True)
        total = weight = 0.0
        for _, local in zip(range(_BATCHES), batches, strict=False):
            value, metrics = jax.device_get(loss(params, frozen, on_mesh(local, mesh)))
            total += float(value * metrics["weight"])
            weight += float(metrics["weight"])
        batches.close()
        return total / max(weight, 1.0)

    return measure
