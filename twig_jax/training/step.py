"""One jitted training step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from twig_jax.models.llava import Params
from twig_jax.training.losses import Batch, Loss, Metrics


class TrainState(NamedTuple):
    """What a step changes: trained parameters, optimizer state, and the step number."""

    params: Params
    opt_state: Any
    step: jax.Array  # int32


def init_state(params: Params, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step. Moments take the parameters' shardings."""
    return TrainState(params, tx.init(params), jnp.zeros((), jnp.int32))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches are split over rows."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def make_step(loss: Loss, tx: optax.GradientTransformation) -> Any:
    """A jitted step(state, frozen, batch) -> (state, metrics); the state's buffers are reused.

    A step whose loss or gradient is not finite changes nothing but the step number, and is counted
    in the metric `skipped`.
    """

    def step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(
            state.params, frozen, batch
        )
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(value) & jnp.isfinite(norm)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        new = (optax.apply_updates(state.params, updates), opt_state)
        params, opt_state = jax.tree.map(
            lambda a, b: jnp.where(good, a, b), new, (state.params, state.opt_state)
        )
        metrics |= {"loss": value, "grad_norm": norm, "skipped": 1 - good}
        return TrainState(params, opt_state, state.step + 1), metrics

    return jax.jit(step, donate_argnums=0)
