"""Parameters arranged for CPUs: the same values, and products that are summed in float32."""

import dataclasses
import mmap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from tests.decoding.models import CONFIG, TWIG
from twig_jax.models.cpu import Transposed, arrange, arranged, restored
from twig_jax.models.int8 import quantised
from twig_jax.models.llava import Llava, init_base
from twig_jax.models.twig import fresh_p_head, init_twig
from twig_jax.sharding.mesh import make_mesh
from twig_jax.sharding.rules import path_string


def half(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tree)


def equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture(scope="module")
def base(draw):
    return half(draw(jax.eval_shape(lambda key: init_base(CONFIG, key), jax.random.key(0))))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 1000),
    st.sampled_from([(), (1,), (3,), (1, 1), (2, 3), (1, 7), (64,), (5, 13)]),
    st.sampled_from([(jnp.bfloat16, 8), (jnp.float32, 24)]),
)
def test_a_product_is_rounded_once(seed, rows, kind):
    """Of few and of many vectors: half a unit of its type beyond the error of float32's sums."""
    dtype, bits = kind
    rng = np.random.default_rng(seed)
    x, w = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((*rows, 48), (48, 40)))
    y = Transposed(w.T).after(x)
    assert y.dtype == dtype and y.shape == (*rows, 40)
    x, w = (np.asarray(a, np.float64) for a in (x, w))
    error = np.abs(np.asarray(y, np.float64) - x @ w)
    assert (error <= 2.0**-bits * np.abs(x @ w) + 48 * 2.0**-23 * (np.abs(x) @ np.abs(w))).all()


def test_what_is_arranged(base):
    """Every kernel and the words, to be had back; twice is once; nothing small of other types."""
    found = arrange(base)
    leaves = jax.tree_util.tree_leaves_with_path(found, is_leaf=lambda x: isinstance(x, Transposed))
    kernels = {path_string(path) for path, x in leaves if isinstance(x, Transposed)}
    every = {path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(base)}
    assert kernels == {path for path in every if path.endswith("/kernel")}
    assert found["text"]["embed_tokens"]["embedding"].dtype == jnp.uint16
    equal(arrange(found), found)
    equal(restored(found), base)
    equal(restored(base), base)
    for dtype in (jnp.float32, jnp.float16):
        other = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), base)
        equal(arrange(other), other)


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="Linux has huge pages")
def test_large_ones_lie_in_huge_pages():
    """Of every type, as arrays of both kinds; small and spread ones stay, and what lies there."""
    small, large = np.ones((3, 5), np.float32), np.arange(1 << 20, dtype=np.float32)
    spread = jax.device_put(large, NamedSharding(make_mesh(8, 1, 1), PartitionSpec("data")))
    assert arranged("a", small) is small and arranged("a", spread) is spread
    for x in (large, jnp.asarray(large), half(large)):
        found = arranged("a", x)
        assert found.unsafe_buffer_pointer() % (2 << 20) == 0 and found.dtype == x.dtype
        np.testing.assert_array_equal(found, x)
        assert arranged("a", found) is found


def test_large_kernels_of_float32_are_transposed():
    made = {"large": jnp.ones((512, 1024)), "small": jnp.ones((512, 1023))}
    made = {name: {"kernel": x, "embedding": x} for name, x in made.items()}
    found = arrange(made)
    assert isinstance(found["large"]["kernel"], Transposed)
    equal({**found, "large": restored(found["large"])}, made)
    equal(arrange(found), found)


def test_a_twig_becomes_int8_from_either(base):
    twig = half({**init_twig(base, CONFIG.text, TWIG), "p_head": fresh_p_head(CONFIG.text)})
    equal(quantised(arrange(twig)), arrange(quantised(twig)))


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_computes_the_same(base, tied):
    """Images, words, layers and head; to a hundredth of the largest, as of bfloat16."""
    config = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, tied_head=tied))
    if tied:
        base = {**base, "text": {k: x for k, x in base["text"].items() if k != "lm_head"}}
    pixels = half(np.random.default_rng(0).normal(size=(1, 1, 12, 12, 3)))
    tokens = jnp.arange(4)[None]

    @jax.jit
    def logits(params):
        llava, params = Llava(config), {"params": params}
        x = llava.apply(params, pixels, method="encode")
        words = llava.apply(params, tokens, method="embed")
        x = jnp.concatenate([x, words], axis=1)
        mask = jnp.tril(jnp.ones((1, x.shape[1], x.shape[1]), bool))
        at = jnp.arange(x.shape[1])[None]
        x, _ = llava.apply(params, x, at, mask, method="run")
        return llava.apply(params, x[:, -1:], method="logits"), words

    ours, words = logits(arrange(base))
    theirs, exact = logits(base)
    np.testing.assert_array_equal(words, exact)
    assert ours.dtype == jnp.float32 and jnp.abs(ours - theirs).max() < 0.01 * jnp.abs(ours).max()
