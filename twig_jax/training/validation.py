"""The loss on what is held out."""

import contextlib
import itertools
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

    loss: jitted, of trained and frozen parameters and a batch on the mesh -> (loss, metrics). It
    gets as many rows as a step takes at a time, one part of a batch after the other. They are read
    here, and kept in the host's memory. Raises what the data raise.
    """
    base, _ = config.model()
    shard = row_shard(mesh, config.data.batch_size)
    parts = config.accumulate(mesh.shape)
    with contextlib.closing(open_batches(config, base, shard, validation=True)) as batches:
        held_out = [
            {name: x[i::parts].copy() for name, x in batch.items()}
            for batch in itertools.islice(batches, _BATCHES)
            for i in range(parts)
        ]

    def measure(params: Params, frozen: Params) -> float:
        total = weight = 0.0
        for local in held_out:
            value, metrics = jax.device_get(loss(params, frozen, on_mesh(local, mesh)))
            total += float(value * metrics["weight"])
            weight += float(metrics["weight"])
        return total / max(weight, 1.0)

    return measure
