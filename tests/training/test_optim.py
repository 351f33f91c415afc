"""The learning rate by step, and what the optimizer decays and clips."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from twig_jax.training.config import OptimConfig
from twig_jax.training.optim import optimizer, schedule


def test_schedule_values():
    """Warm-up of 3 % of 1000 steps, then half a cosine down to the end."""
    rate = schedule(OptimConfig(lr=2e-3, end_lr=2e-4, warmup=0.03), 1000)
    values = {0: 0.0, 15: 1e-3, 30: 2e-3, 1000: 2e-4, 1200: 2e-4}
    for step in (100, 515, 900):
        cosine = (1 + math.cos(math.pi * (step - 30) / 970)) / 2
        values[step] = 2e-4 + (2e-3 - 2e-4) * cosine
    for step, value in values.items():
        assert float(rate(step)) == pytest.approx(value, rel=1e-5, abs=1e-12), step


@pytest.mark.parametrize(("steps", "warmup"), [(100, 0.03), (150, 0.03), (40, 0.0), (7, 0.5)])
def test_the_schedule_is_the_references(steps, warmup):
    """Step by step what transformers' Trainer sets for its "cosine" schedule and warmup_ratio."""
    weight = torch.nn.Parameter(torch.zeros(1))
    theirs = get_cosine_schedule_with_warmup(
        torch.optim.AdamW([weight], lr=1e-4), math.ceil(warmup * steps), steps
    )
    ours = schedule(OptimConfig(lr=1e-4, warmup=warmup), steps)
    for step in range(steps):
        assert float(ours(step)) == pytest.approx(theirs.get_last_lr()[0], rel=1e-5, abs=1e-10)
        theirs.optimizer.step()
        theirs.step()


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_few_steps_have_a_schedule_too(steps):
    rate = schedule(OptimConfig(lr=1.0), steps)
    assert all(math.isfinite(float(rate(step))) for step in range(steps + 1))


def first_update(config, grads):
    params = jax.tree.map(jnp.ones_like, grads)
    tx = optimizer(config, 1)  # at full rate from its second step on
    _, state = tx.update(jax.tree.map(jnp.zeros_like, grads), tx.init(params), params)
    return tx.update(grads, state, params)[0]


def test_only_matrices_decay():
    nothing = {"kernel": jnp.zeros((2, 3)), "scale": jnp.zeros(3)}
    update = first_update(OptimConfig(lr=0.5, weight_decay=0.1), nothing)
    np.testing.assert_allclose(update["kernel"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(update["scale"], 0)


def test_clipping_is_by_the_norm_of_all():
    grads = {"a": jnp.full((2, 2), 30.0), "b": jnp.full(4, 40.0)}  # norm 100
    small = jax.tree.map(lambda g: g / 100, grads)
    # Adam forgets the scale of gradients up to its epsilon, so a large one is needed to see it.
    config = OptimConfig(lr=1.0, clip=1.0, b1=0.0, b2=0.0)
    for clipped, expected in zip(
        jax.tree.leaves(first_update(config, grads)),
        jax.tree.leaves(first_update(config, small)),
        strict=True,
    ):
        np.testing.assert_allclose(clipped, expected, rtol=1e-6)
