"""Attention as one kernel of a GPU, interpreted here, beside the attention that XLA makes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twig_jax.models import fused_attention
from twig_jax.models.attention import KV, Context, attend
from twig_jax.models.fused_attention import fused_attend

interpreted = jax.jit(functools.partial(fused_attend, interpret=True))


def case(rows, queries, heads, kv_heads, width, slots, seed=0, dtype="float32", seen=0.7):
    """Queries, and blocks of so many slots with random masks."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    def block(count):
        kv = KV(*(normal(rows, kv_heads, count, width) for _ in range(2)))
        return Context(kv, jnp.asarray(rng.random((rows, queries, count)) < seen))

    return normal(rows, queries, heads, width), [block(count) for count in slots]


@settings(max_examples=8, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 8),
    st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    st.sampled_from([16, 32]),
    st.lists(st.integers(1, 200), min_size=1, max_size=3),
    st.integers(0, 1000),
)
def test_it_is_the_same_attention(rows, queries, heads, width, slots, seed):
    """Sums in another order: float32 rounds to 6e-8 of values of about one."""
    q, context = case(rows, queries, *heads, width, slots, seed)
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(interpreted(q, context), attend(q, context), atol=2e-6)


@pytest.mark.parametrize("most", [1, 3, 16])
def test_parts_of_a_block_are_put_together(most, monkeypatch):
    """Long blocks in one part of many chunks, in a few, and a part for every chunk."""
    monkeypatch.setattr(fused_attention, "_PARTS", most)
    q, context = case(1, 2, 2, 2, 16, [700, 5])
    found = jax.jit(functools.partial(fused_attend, interpret=True))(q, context)
    np.testing.assert_allclose(found, attend(q, context), atol=2e-6)


@pytest.mark.parametrize(
    ("rows", "queries", "heads", "slots"),
    [(2, 65, (2, 2), [65]), (1, 130, (1, 1), [130, 7]), (2, 50, (6, 2), [50, 70])],
)
def test_whole_prompts(rows, queries, heads, slots):
    """More queries of a key head than one program takes, the last program's not all real."""
    q, context = case(rows, queries, *heads, 16, slots)
    causal = jnp.tril(jnp.ones((queries, slots[0]), bool))
    context[0] = context[0]._replace(mask=context[0].mask & causal)
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(interpreted(q, context), attend(q, context), atol=2e-6)


@pytest.mark.parametrize("queries", [6, 70])
def test_bfloat16_rounds_no_worse(queries):
    q, context = case(1, queries, 4, 4, 32, [150, 6], dtype="bfloat16")
    exact = attend(*jax.tree.map(lambda x: x.astype("float32"), (q, context)))
    mine, others = (
        np.abs(np.asarray(out, np.float32) - exact).max()
        for out in (interpreted(q, context), attend(q, context))
    )
    assert interpreted(q, context).dtype == q.dtype
    assert mine <= 1.5 * others < 0.02


def test_a_query_that_sees_nothing_is_zero():
    q, context = case(2, 3, 2, 2, 16, [70, 3])
    blind = [c._replace(mask=c.mask.at[1, 2].set(False)) for c in context]
    found = interpreted(q, blind)
    assert not found[1, 2].any() and found[1, 1].all() and found[0, 2].all()


def test_what_it_is_not_made_for_is_attended_as_elsewhere(monkeypatch):
    """Here a kernel that is not interpreted is an error."""
    q, context = case(1, 3, 2, 2, 24, [8])
    np.testing.assert_array_equal(fused_attend(q, context), attend(q, context))
    q, context = case(1, 3, 2, 2, 16, [8])
    with pytest.raises(ValueError, match="interpret mode"):
        fused_attend(q, context)
    monkeypatch.setattr(fused_attention, "triton", None)
    np.testing.assert_array_equal(fused_attend(q, context), attend(q, context))
