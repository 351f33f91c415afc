"""One step: the same on any mesh, changing only what is trained, refusing what is not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from twig_jax.sharding.mesh import make_mesh
from twig_jax.sharding.rules import shardings
from twig_jax.training.config import OptimConfig, TrainConfig
from twig_jax.training.loop import stage_loss
from twig_jax.training.optim import optimizer
from twig_jax.training.step import batch_sharding, init_state, make_step

OPTIM = OptimConfig(lr=1e-3, weight_decay=0.01, clip=1.0)
REFERENCE = OptimConfig(lr=1e-3, b2=0.999, clip=1.0, weight_decay=0.01)
STEPS = 3


def tx():
    return optimizer(OPTIM, 50)


def stage_step(stage):
    return make_step(stage_loss(TrainConfig(stage, "", 50, preset="tiny")), tx())


def start(trained):
    """A first state; the step gives its buffers away, and the fixtures' must stay."""
    return jax.jit(init_state, static_argnums=1)(jax.tree.map(jnp.copy, trained), tx())


def train(step, trained, frozen, batch):
    """(state, metrics of each step)."""
    state, history = start(trained), []
    for _ in range(STEPS):
        state, metrics = step(state, frozen, batch)
        history.append(jax.device_get(metrics))
    return state, history


@pytest.fixture(scope="module")
def on_one_device(base, batch):
    return train(stage_step("base"), base, {}, batch)


@pytest.fixture(scope="module")
def twig_step():
    return stage_step("twig")


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_sharded_training_equals_one_device(on_one_device, base, batch, sizes):
    mesh = make_mesh(*sizes)
    with jax.set_mesh(mesh):
        placed = jax.device_put(base, shardings(base, mesh))
        rows = jax.device_put(batch, batch_sharding(mesh))
        first = start(placed)
        state, history = train(stage_step("base"), placed, {}, rows)
    expected, expected_history = on_one_device
    for found, wanted in zip(history, expected_history, strict=True):
        assert found["loss"] == pytest.approx(float(wanted["loss"]), rel=1e-5)
        assert found["grad_norm"] == pytest.approx(float(wanted["grad_norm"]), rel=1e-4)
        np.testing.assert_array_equal(found["accuracy"], wanted["accuracy"])
    assert float(history[-1]["loss"]) < float(history[0]["loss"])
    # Parameters stay where the rules put them, and so do their moments.
    for tree in (state.params, state.opt_state[1][0].mu, first.opt_state[1][0].nu):
        jax.tree.map(
            lambda x, s: s.is_equivalent_to(x.sharding, x.ndim) or pytest.fail(str(x.sharding)),
            tree,
            shardings(base, mesh),
        )
    # Adam divides by the gradient's size, so noise in tiny gradients shows up to the step's size.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=STEPS * OPTIM.lr),
        jax.device_get(state.params),
        jax.device_get(expected.params),
    )


def test_only_the_twig_changes(twig_step, base, twig, batch):
    before = jax.device_get((base, twig))
    state, history = train(twig_step, twig, base, batch)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(base), before[0])
    changed = jax.tree.map(
        lambda a, b: bool(np.any(a != b)), jax.device_get(state.params), before[1]
    )
    assert all(jax.tree.leaves(changed)), changed
    assert jax.tree.structure(state.params) == jax.tree.structure(twig)
    # No optimizer state for the base: two moments a leaf and the counts.
    leaves, kept = len(jax.tree.leaves(twig)), jax.tree.leaves(state.opt_state)
    assert len(kept) == 2 * leaves + 2 and sum(leaf.ndim == 0 for leaf in kept) == 2
    assert history[-1]["loss"] < history[0]["loss"]


@pytest.mark.parametrize("reference", [OptimConfig(lr=1e-3), REFERENCE])
def test_steps_are_those_of_torch(base, twig, batch, reference):
    """Three optimizer steps beside torch's AdamW, given the gradients of the same parameters."""
    loss = stage_loss(TrainConfig("twig", "", 50, preset="tiny"))
    step = make_step(loss, optimizer(reference, 3))
    grad = jax.jit(jax.grad(loss, has_aux=True))
    names, leaves = zip(*jax.tree_util.tree_leaves_with_path(twig), strict=True)
    theirs = [torch.nn.Parameter(torch.tensor(np.asarray(x))) for x in leaves]
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in theirs if p.ndim > 1], "weight_decay": reference.weight_decay},
            {"params": [p for p in theirs if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=reference.lr,
        betas=(reference.b1, reference.b2),
        eps=1e-8,
    )
    rates = get_cosine_schedule_with_warmup(adamw, 1, 3)
    state = init_state(jax.tree.map(jnp.copy, twig), optimizer(reference, 3))
    for _ in range(3):
        for p, g in zip(theirs, jax.tree.leaves(grad(state.params, base, batch)[0]), strict=True):
            p.grad = torch.tensor(np.asarray(g))
        if reference.clip is not None:
            torch.nn.utils.clip_grad_norm_(theirs, reference.clip)
        adamw.step()
        rates.step()
        state, _ = step(state, base, batch)
        for name, ours, p in zip(names, jax.tree.leaves(state.params), theirs, strict=True):
            expected = p.detach().numpy()
            np.testing.assert_allclose(ours, expected, atol=1e-6, err_msg=str(name))
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), twig, state.params)
    assert min(jax.tree.leaves(moved)) > 5e-4


@pytest.mark.parametrize("stage", ["base", "twig"])
def test_a_batch_in_parts_is_the_whole_batch(base, twig, batch, stage):
    """Parts with different numbers of answers; rounding alone may differ."""
    trained, frozen = (twig, base) if stage == "twig" else (base, {})
    few = jnp.arange(8)[:, None] % 4 == 0
    batch = batch | {"targets": jnp.where(few & (batch["positions"] > 170), -1, batch["targets"])}
    loss = stage_loss(TrainConfig(stage, "", 50, preset="tiny"))
    sgd = optax.sgd(1.0)  # the update is the gradient
    found = {}
    for parts in (1, 4):
        step = make_step(loss, sgd, parts)
        found[parts] = step(init_state(jax.tree.map(jnp.copy, trained), sgd), frozen, batch)
        # Where the data have ended there may be no answers at all.
        empty = batch | {"targets": jnp.full_like(batch["targets"], -1)}
        still, none = step(init_state(jax.tree.map(jnp.copy, trained), sgd), frozen, empty)
        assert (none["loss"], none["skipped"]) == (0, 0)
        jax.tree.map(np.testing.assert_array_equal, still.params, trained)
    (whole, metrics), (state, in_parts) = found[1], found[4]
    assert in_parts["loss"] == pytest.approx(float(metrics["loss"]), rel=1e-6)
    np.testing.assert_array_equal(in_parts["accuracy"], metrics["accuracy"])
    if stage == "base":
        for name in ("cross_entropy", "ink/digit"):
            np.testing.assert_allclose(in_parts[name], metrics[name], rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.params, whole.params
    )


def test_a_step_that_is_not_finite_changes_nothing(twig_step, base, twig, batch):
    state = start(twig)
    before = jax.device_get(state)
    state, metrics = twig_step(state, base, batch | {"pixels": batch["pixels"] * jnp.nan})
    assert (metrics["skipped"], metrics["update_norm"]) == (1, 0)
    assert state.step == 1
    after = jax.device_get(state)
    jax.tree.map(np.testing.assert_array_equal, after[:2], before[:2])
    state, metrics = twig_step(state, base, batch)
    assert metrics["skipped"] == 0 and state.step == 2
