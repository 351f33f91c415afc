"""A twig's first parameters, and growing in depth."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twig_jax.config import TwigConfig
from twig_jax.models.grow import deepen
from twig_jax.models.llava import Llava
from twig_jax.models.twig import init_twig, twig_decoder


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    ("how", "K", "T", "layers"),
    [
        ("next", 1, 2, [1, 2]),
        ("next", 0, 1, [0]),
        ("next", 2, 2, [2, 3]),
        ("last", 1, 3, [1, 2, 3]),
    ],
)
def test_twig_starts_as_layers_of_the_base(base, config, how, K, T, layers):
    twig = init_twig(base, config.text, TwigConfig(K=K, T=T, K_f=4), how)
    text = base["text"]
    expected = {f"layers_{t}": text[f"layers_{i}"] for t, i in enumerate(layers)}
    equal(twig, {**expected, "norm": text["norm"], "lm_head": text["lm_head"]})


def test_twig_may_start_at_random(base, config):
    shape = TwigConfig(K=1, T=2, K_f=4)
    twig = init_twig(base, config.text, shape, "random", seed=1)
    assert jax.tree.map(jnp.shape, twig) == jax.tree.map(
        jnp.shape, init_twig(base, config.text, shape)
    )
    equal(twig["lm_head"], base["text"]["lm_head"])
    equal(twig, init_twig(base, config.text, shape, "random", seed=1))
    other = init_twig(base, config.text, shape, "random", seed=2)
    assert (twig["layers_0"]["q_proj"]["kernel"] != other["layers_0"]["q_proj"]["kernel"]).any()
    with pytest.raises(ValueError, match="next, last, random"):
        init_twig(base, config.text, shape, "first")


def test_twig_does_not_share_buffers_with_the_base(base, config):
    """Training donates the twig's buffers; the base's must stay."""
    twig = init_twig(base, config.text, TwigConfig(K=1, T=2, K_f=4))
    jax.tree.map(lambda x: x.delete(), twig)
    assert np.isfinite(base["text"]["layers_1"]["q_proj"]["kernel"]).all()


@pytest.mark.parametrize("p_head", [False, True])
@pytest.mark.parametrize("how", ["next", "random"])
def test_twig_tree_is_what_its_module_reads(base, config, how, p_head):
    twig = TwigConfig(K=1, T=2, K_f=4, p_head=p_head)
    decoder = twig_decoder(config.text, twig)
    x = jnp.zeros((1, 2, config.text.hidden_size))
    shapes = jax.eval_shape(decoder.init, jax.random.key(0), x)["params"]
    found = init_twig(base, config.text, twig, how)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(lambda s: s.shape, shapes)


@pytest.mark.parametrize(
    "twig", [TwigConfig(K=3, T=2, K_f=4), TwigConfig(K=2, T=1, K_f=2), TwigConfig(K=1, T=1, K_f=5)]
)
def test_a_twig_that_does_not_fit_raises(base, config, twig):
    with pytest.raises(ValueError, match=r"K|layers"):
        init_twig(base, config.text, twig)


def test_the_last_layers_of_fewer_raise(base, config):
    with pytest.raises(ValueError, match=r"a base of 4 layers has no layers -1 \+ 5"):
        init_twig(base, config.text, TwigConfig(K=1, T=5, K_f=4), "last")


@functools.partial(jax.jit, static_argnums=0)
def logits(config, params):
    """Of a page and some text."""
    model, apply = Llava(config), {"params": params}
    pixels = jax.random.normal(jax.random.key(2), (2, 1, 24, 24, 3))
    tokens = jnp.array([[1] + [3] * 9 + [8, 9, 30], [1, 4] + [3] * 9 + [11, 12]])
    x = model.apply(apply, pixels, method="encode")
    x = model.apply(apply, tokens, tokens == 3, x, method="merge")
    positions = jnp.broadcast_to(jnp.arange(13), (2, 13))
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((13, 13), bool)), (2, 13, 13))
    x, _ = model.apply(apply, x, positions, causal, method="run")
    return model.apply(apply, x, method="logits")


@pytest.mark.parametrize("source", [(0, None, 1, None, 2, 3), (0, 1, 2, 3, None)])
def test_deepening_keeps_the_logits_exactly(base, config, source):
    text = dataclasses.replace(config.text, num_layers=len(source))
    deeper = deepen(base, source)
    np.testing.assert_array_equal(
        logits(dataclasses.replace(config, text=text), deeper), logits(config, base)
    )
    for i, s in enumerate(source):
        if s is not None:
            equal(deeper["text"][f"layers_{i}"], base["text"][f"layers_{s}"])


def test_new_layers_can_learn(base, config):
    """Zero output projections, but not zero inputs to them: gradients reach the projections."""
    deeper = deepen(base, (0, None, 1, 2, 3))
    text = dataclasses.replace(config.text, num_layers=5)

    def loss(params):
        return jnp.square(logits(dataclasses.replace(config, text=text), params)).mean()

    grads = jax.jit(jax.grad(loss))(deeper)["text"]["layers_1"]
    assert grads["o_proj"]["kernel"].any() and grads["down_proj"]["kernel"].any()


@pytest.mark.parametrize("source", [(0, 1, 2), (1, 0, 2, 3), (0, 0, 1, 2, 3), (0, 1, 2, 3, 4), ()])
def test_every_old_layer_once_in_order(base, source):
    with pytest.raises(ValueError, match="4 old layers once, in order"):
        deepen(base, source)
