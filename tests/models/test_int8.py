"""Int8 kernels: how far they are off, and what becomes one."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.decoding.models import CONFIG, TWIG
from twig_jax.models.int8 import Int8, quantise, quantised
from twig_jax.models.llava import init_base
from twig_jax.models.twig import fresh_p_head, init_twig, twig_decoder
from twig_jax.sharding.rules import path_string


def floats(tree):
    """The float kernels that int8 ones stand for."""
    return jax.tree.map(
        lambda x: x.values.T.astype(np.float32) * x.scale if isinstance(x, Int8) else x,
        tree,
        is_leaf=lambda x: isinstance(x, Int8),
    )


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 1000),
    st.lists(st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e4]), min_size=5, max_size=5),
    st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_no_entry_is_off_by_more_than_half_a_step(seed, sizes, dtype):
    """A step is 1/127 of the column's largest entry, whatever the other columns are."""
    w = np.random.default_rng(seed).normal(size=(7, 5)) * sizes
    w = jax.numpy.asarray(w, dtype)
    values, scale = quantise(w)
    w = np.asarray(w, np.float64)
    assert values.dtype == np.int8 and scale.dtype == np.float32
    step = np.abs(w).max(0) / 127
    off = np.abs(np.asarray(values.T, np.float64) * np.asarray(scale) - w)
    assert (off <= 0.5001 * step).all()
    assert (np.abs(np.asarray(values)).max(1) == np.where(step > 0, 127, 0)).all()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 1000),
    st.sampled_from([(1,), (1, 1), (2, 3), (21,), (5, 13)]),
    st.sampled_from([0.0, 1e-30, 1.0, 1e30]),
    st.sampled_from([("float32", 254.0**-3, 24), ("bfloat16", 254.0**-2, 8)]),
)
def test_a_product_of_few_or_many_vectors(seed, rows, size, kind):
    """Of vectors whose entries are of unlike sizes, on CPUs: off by digits, sums and rounding.

    Digits leave out up to `digits` of a vector's largest entry.
    """
    dtype, digits, bits = kind
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(*rows, 48)) * size * 10.0 ** rng.integers(-4, 1, 48)
    x = jax.numpy.asarray(x, dtype)
    kernel = quantise(rng.normal(size=(48, 40)))
    y = jax.jit(kernel.after)(x)
    assert y.dtype == dtype and y.shape == (*rows, 40)
    x, values, scale = (np.asarray(a, np.float64) for a in (x, *kernel))
    w = values.T * scale
    error = np.abs(np.asarray(y, np.float64) - x @ w)
    left_out = digits * np.abs(x).max(-1, keepdims=True) * np.abs(w).sum(0)
    sums = 48 * 2.0**-23 * (np.abs(x) @ np.abs(w))
    assert (error <= left_out + sums + 2.0**-bits * np.abs(x @ w)).all()


@pytest.fixture(scope="module")
def base(draw):
    return draw(jax.eval_shape(lambda key: init_base(CONFIG, key), jax.random.key(0)))


@pytest.fixture(scope="module")
def twig(base):
    return init_twig(base, CONFIG.text, TWIG)


def test_a_decoder_s_kernels_and_nothing_else(base, twig):
    """Not the tower's, the projector's, the word embeddings, norms or a P-Head's gates."""
    twig = {**twig, "p_head": fresh_p_head(CONFIG.text)}
    for tree, layers, before in ((base, CONFIG.text.num_layers, "text/"), (twig, TWIG.T, "")):
        found = jax.tree_util.tree_leaves_with_path(
            quantised(tree), is_leaf=lambda x: isinstance(x, Int8)
        )
        paths = {path_string(path) for path, x in found if isinstance(x, Int8)}
        names = [f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")]
        assert paths == {f"{before}lm_head/kernel"} | {
            f"{before}layers_{i}/{name}/kernel" for i in range(layers) for name in names
        }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_decoder_computes_with_what_the_kernels_stand_for(twig, dtype):
    small = quantised(jax.tree.map(lambda x: x.astype(dtype), twig))
    meant = jax.tree.map(lambda x: x.astype(np.float32), floats(small))
    x = jax.random.normal(jax.random.key(0), (2, 3, CONFIG.text.hidden_size), dtype)
    logits = jax.jit(twig_decoder(CONFIG.text, TWIG).apply)
    with jax.default_matmul_precision("highest"):
        found = logits({"params": small}, x)
        wide, exact = (logits({"params": p}, x.astype(np.float32)) for p in (meant, twig))
    size = np.abs(exact).max()
    assert np.abs(found - wide).max() < (1e-5 if dtype == "float32" else 0.03) * size
    assert 1e-3 * size < np.abs(wide - exact).max() < 0.05 * size
