"""Attention over blocks against the textbook formula, and single rows of it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twig_jax.models.attention import (
    KV,
    Context,
    apply_rope,
    attend,
    attention_rows,
    rope_angles,
)

B, Q, S, H, K, D = 2, 5, 7, 4, 2, 6


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def textbook(q, k, v, mask):
    """Every head for itself, in float64: (output [B, Q, H, D], weights [B, H, Q, S])."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    weights = np.zeros((q.shape[0], q.shape[2], q.shape[1], k.shape[2]))
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        group = h // (q.shape[2] // k.shape[1])
        logits = q[b, :, h] @ k[b, group].T / np.sqrt(q.shape[3])
        logits[~np.asarray(mask[b])] = -np.inf
        w = np.exp(logits - logits.max(-1, keepdims=True))
        weights[b, h] = w / w.sum(-1, keepdims=True)
        out[b, :, h] = weights[b, h] @ v[b, group]
    return out, weights


@pytest.fixture
def case():
    mask = jax.random.bernoulli(jax.random.key(9), 0.6, (B, Q, S)).at[:, :, 0].set(True)
    return normal(0, B, Q, H, D), normal(1, B, K, S, D), normal(2, B, K, S, D), mask


def test_equals_textbook(case):
    q, k, v, mask = case
    expected, _ = textbook(q, k, v, mask)
    np.testing.assert_allclose(attend(q, [Context(KV(k, v), mask)]), expected, atol=1e-5)


@pytest.mark.parametrize("cut", [1, 3, 6])
def test_blocks_share_one_softmax(case, cut):
    q, k, v, mask = case
    blocks = [
        Context(KV(k[:, :, s], v[:, :, s]), mask[:, :, s])
        for s in (slice(0, cut), slice(cut, None))
    ]
    expected, _ = textbook(q, k, v, mask)
    np.testing.assert_allclose(attend(q, blocks), expected, atol=1e-5)


@pytest.mark.parametrize("earlier", [0, 20])
def test_causal_queries_leave_out_what_none_sees(earlier):
    """After a cache or without; the parts hold other numbers of queries."""
    long = 600
    q, k, v = normal(0, B, long, H, D), normal(1, B, K, long, D), normal(2, B, K, long, D)
    context = [
        Context(KV(k, v), jnp.tril(jax.random.bernoulli(jax.random.key(3), 0.5, (B, long, long))))
    ]
    if earlier:
        kv = KV(normal(4, B, K, earlier, D), normal(5, B, K, earlier, D))
        context.insert(
            0, Context(kv, jax.random.bernoulli(jax.random.key(6), 0.5, (B, long, earlier)))
        )
    whole, parts = (jax.jit(partial(attend, causal=causal)) for causal in (False, True))
    np.testing.assert_allclose(parts(q, context), whole(q, context), atol=1e-5)
    flops = [f.lower(q, context).compile().cost_analysis()["flops"] for f in (parts, whole)]
    assert flops[0] < 0.8 * flops[1]


def test_long_sequences_go_in_chunks():
    """Values and gradients are those of parts that are computed as a whole."""
    long, earlier = 1300, 20  # not a multiple of a chunk
    q, k, v = normal(0, 1, long, H, D), normal(1, 1, K, long, D), normal(2, 1, K, long, D)
    before = KV(normal(3, 1, K, earlier, D), normal(4, 1, K, earlier, D))
    causal = jnp.tril(jnp.ones((1, long, long), bool))
    masks = [jax.random.bernoulli(jax.random.key(9), 0.5, (1, long, earlier)), causal]
    weight = normal(5, 1, long, H, D)

    def loss(q, k, v, *, size):
        out = [
            attend(
                q[:, at : at + size],
                [
                    Context(kv, mask[:, at : at + size])
                    for kv, mask in zip((before, KV(k, v)), masks, strict=True)
                ],
            )
            for at in range(0, long, size)
        ]
        return (jnp.concatenate(out, axis=1) * weight).sum()

    def gradients(size):
        return jax.jit(jax.value_and_grad(partial(loss, size=size), (0, 1, 2)))

    # Only sums over queries (gradients of keys and values) come in another order.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        gradients(long)(q, k, v),
        gradients(650)(q, k, v),
    )


def test_scores_of_long_sequences_never_exist_as_a_whole():
    long = 8192
    x = jax.ShapeDtypeStruct((1, long, H, D), jnp.float32)

    def loss(x):
        kv = x.swapaxes(1, 2)
        return attend(x, [Context(KV(kv, kv), jnp.tril(jnp.ones((1, long, long), bool)))]).sum()

    memory = jax.jit(jax.grad(loss)).lower(x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < H * long * long * 4


def test_a_query_that_sees_nothing_is_zero_and_has_finite_gradients(case):
    q, k, v, mask = case
    mask = mask.at[0, 2].set(False)

    def total(q):
        return attend(q, [Context(KV(k, v), mask)]).sum()

    out = attend(q, [Context(KV(k, v), mask)])
    assert not out[0, 2].any() and out[0, 1].any()
    assert jnp.isfinite(jax.grad(total)(q)).all()


def test_bfloat16_accumulates_in_float32(case):
    q, k, v, mask = case
    half = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    out = attend(half[0], [Context(KV(*half[1:]), mask)])
    assert out.dtype == jnp.bfloat16
    expected, _ = textbook(*(x.astype(jnp.float32) for x in half), mask)
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.03)


def test_attention_rows_are_rows_of_the_whole(case):
    q, k, v, mask = case
    _, weights = textbook(q, k, v, mask)
    rows = attention_rows(q[:, 2:4], k, mask[:, 2:4])
    assert rows.dtype == jnp.float32
    np.testing.assert_allclose(rows, weights[:, :, 2:4], atol=1e-6)
    np.testing.assert_allclose(rows.sum(-1), 1, atol=1e-6)


def test_attention_over_nothing_is_nothing(case):
    q, k, _, _ = case
    mask = jnp.zeros((q.shape[0], 1, k.shape[2]), bool)

    def total(q):
        return attention_rows(q[:, :1], k, mask).sum()

    assert total(q) == 0
    assert jnp.isfinite(jax.grad(total)(q)).all()


def test_rope_depends_on_distances_only():
    q, k = normal(0, 1, 1, 1, D), normal(1, 1, 1, 1, D)

    def score(at, key_at):
        rotated = [
            apply_rope(x, rope_angles(jnp.array([[p]]), D, 100.0))
            for x, p in ((q, at), (k, key_at))
        ]
        return float((rotated[0] * rotated[1]).sum())

    assert score(9, 4) == pytest.approx(score(5, 0), abs=1e-5)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-3)
    np.testing.assert_allclose(apply_rope(q, rope_angles(jnp.array([[0]]), D, 100.0)), q)
