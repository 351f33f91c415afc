"""One jitted training step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from twig_jax.models.llava import Params
from twig_jax.sharding.rules import shardings
from twig_jax.training.losses import Batch, Loss, Metrics


class TrainState(NamedTuple):
    """What a step changes. `ema`: the parameters' moving average, None where none is kept."""

    params: Params
    opt_state: Any
    step: jax.Array  # int32
    ema: Params | None = None

    @property
    def result(self) -> Params:
        """The parameters to be used: averaged ones where there are."""
        return self.params if self.ema is None else self.ema


def init_state(
    params: Params, tx: optax.GradientTransformation, averaged: bool = False
) -> TrainState:
    """The state before the first step. Moments and averages lie where their parameters lie."""
    ema = jax.tree.map(jnp.copy, params) if averaged else None
    return _placed(TrainState(params, tx.init(params), jnp.zeros((), jnp.int32), ema))


def _placed(state: TrainState) -> TrainState:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return state
    return jax.lax.with_sharding_constraint(state, shardings(state, mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches are split over rows."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def make_step(
    loss: Loss,
    tx: optax.GradientTransformation,
    accumulate: int = 1,
    decay: float | None = None,
) -> Any:
    """A jitted step(state, frozen, batch) -> (state, metrics); the state's buffers are reused.

    The rows of a batch are taken in `accumulate` equal parts, one after the other, to save memory;
    parts count by the weight of their targets, so the step is that of the whole batch (but where a
    loss has a further mean in it, over other things: naming in the base stage, and distillation's).
    decay: of the moving average, in a state that has one.
    Metrics are those of the loss, `loss`, the norms of gradient and update, `padding` (of all
    tokens), and `skipped`: a step whose loss or gradient is not finite changes nothing but the
    step number, and counts there.
    """
    value_and_grad = jax.value_and_grad(loss, has_aux=True)

    def whole(params: Params, frozen: Params, batch: Batch) -> Any:
        (value, metrics), grads = value_and_grad(params, frozen, batch)
        return (value, grads), metrics

    def in_parts(params: Params, frozen: Params, batch: Batch) -> Any:
        # Neighbouring rows go to different parts, so that each device keeps the rows it has.
        parts = jax.tree.map(lambda x: rearrange(x, "(b a) ... -> a b ...", a=accumulate), batch)

        def add(total: Any, part: Batch) -> tuple[Any, None]:
            found, metrics = whole(params, frozen, part)
            weighed = jax.tree.map(lambda x: x * metrics["weight"], found)
            return jax.tree.map(jnp.add, total, (weighed, metrics)), None

        shapes = jax.eval_shape(whole, params, frozen, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (weighed, metrics), _ = jax.lax.scan(add, zeros, parts)
        weight = jnp.maximum(metrics["weight"], 1.0)
        return jax.tree.map(lambda x: x / weight, weighed), metrics

    def step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        gradients = whole if accumulate == 1 else in_parts
        (value, grads), metrics = gradients(state.params, frozen, batch)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(value) & jnp.isfinite(norm)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params, ema = optax.apply_updates(state.params, updates), state.ema
        if decay is not None:
            ema = optax.incremental_update(params, ema, 1 - decay)
        new = TrainState(params, opt_state, state.step, ema)
        new = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, state)
        metrics |= {
            "loss": value,
            "grad_norm": norm,
            "update_norm": jnp.where(good, optax.tree.norm(updates), 0.0),
            "skipped": 1 - good,
            "padding": jnp.stack([(batch["segments"] == 0).sum(), batch["segments"].size]),
        }
        return _placed(new._replace(step=state.step + 1)), metrics

    return jax.jit(step, donate_argnums=0)


def of_a_part(function: Callable[[Params, Params, Batch], Any], accumulate: int) -> Any:
    """A jitted function(trained, frozen, batch) of as many rows as `make_step` takes at a time."""
    return jax.jit(
        lambda trained, frozen, batch: function(
            trained, frozen, {name: x[::accumulate] for name, x in batch.items()}
        )
    )
