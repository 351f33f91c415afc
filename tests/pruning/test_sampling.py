"""Plackett-Luce draws, against everything that can be drawn."""

import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twig_jax.pruning.sampling import draw, log_probability


def by_definition(s, order):
    """Draw after draw, each from what is left."""
    left, p = 1.0, 1.0
    for a in order:
        p *= s[a] / left
        left -= s[a]
    return p


def of(s, visible, orders):
    logs = jnp.log(jnp.asarray(s, jnp.float32))
    orders = jnp.asarray(orders, jnp.int32)
    counts = jnp.full(orders.shape[:-1], orders.shape[-1])
    return np.exp(log_probability(logs[None], jnp.asarray(visible)[None], orders, counts))


@pytest.mark.parametrize("R", [1, 2, 4, 5])
def test_every_draw_of_few_tokens(R):
    """Slots 0 and 3 cannot be drawn; those that can have probability 1 together."""
    s = np.array([0.0, 0.5, 0.04, 0.0, 0.3, 0.15, 0.01])
    visible = s > 0
    orders = list(itertools.permutations(np.flatnonzero(visible), R))
    found = of(np.where(visible, s, 1e-20), visible, orders)
    np.testing.assert_allclose(found, [by_definition(s, o) for o in orders], rtol=1e-5)
    assert found.sum() == pytest.approx(1, abs=1e-5)


def test_draws_are_distributed_so():
    s = np.array([0.6, 0.25, 0.1, 0.05], np.float32)
    n = 40_000
    logs, visible = jnp.broadcast_to(jnp.log(s), (n, 4)), jnp.ones((n, 4), bool)
    drawn = np.asarray(draw(jax.random.key(0), logs, visible, 2))
    seen = Counter(map(tuple, drawn.tolist()))
    for order in itertools.permutations(range(4), 2):
        p = by_definition(s, order)
        # Five standard deviations of a share.
        assert abs(seen[order] / n - p) < 5 * np.sqrt(p * (1 - p) / n), order


def test_what_cannot_be_seen_is_not_drawn():
    logs = jnp.zeros((1, 50))
    visible = jnp.arange(50)[None] % 3 == 0
    drawn = draw(jax.random.key(1), logs, visible, 17)
    assert sorted(drawn[0].tolist()) == list(range(0, 50, 3))


@settings(deadline=None)  # each shape compiles
@given(st.sampled_from([2, 9, 40]), st.integers(0, 2**31), st.data())
def test_counts_and_tiny_probabilities(S, seed, data):
    """The first draws alone count; float32 stays by float64 where s spans many magnitudes."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=S) * 8
    s = np.exp(logits - np.logaddexp.reduce(logits))
    R = data.draw(st.sampled_from([1, S // 2, S]))
    count = data.draw(st.integers(0, R))
    order = rng.permutation(S)[:R]
    logs = jnp.asarray(np.log(s), jnp.float32)[None]
    found = log_probability(
        logs, jnp.ones((1, S), bool), jnp.asarray(order, jnp.int32)[None], jnp.array([count])
    )
    left = [np.logaddexp.reduce(np.delete(np.log(s), order[:j])) for j in range(count)]
    expected = np.log(s)[order[:count]].sum() - np.sum(left)
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-4)


def test_gradients_are_numbers():
    """Also with tokens that cannot be drawn, and where everything is drawn."""
    visible = jnp.array([[True, False, True, True]])

    def total(logs):
        drawn = jnp.array([[2, 0, 3]], jnp.int32)
        return log_probability(logs, visible, drawn, jnp.array([3])).sum()

    gradient = np.asarray(jax.grad(total)(jnp.log(jnp.array([[0.2, 1e-20, 0.5, 0.3]]))))
    assert np.isfinite(gradient).all() and gradient[0, 1] == 0
    # A shift of all logarithms changes nothing.
    assert gradient.sum() == pytest.approx(0, abs=1e-6)
