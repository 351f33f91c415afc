"""Full-size models by shape, in seconds and without memory."""

import math

import jax
import pytest

from twig_jax.checkpoints.tables import llava_tensors, twig_tensors
from twig_jax.models.llava import Llava, init_base
from twig_jax.models.twig import init_twig
from twig_jax.presets import PRESETS, preset


def base_shapes(name):
    config, _ = preset(name)
    return jax.eval_shape(lambda key: init_base(config, key), jax.random.key(0))


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def paths(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(key.key for key in path): leaf.shape for path, leaf in leaves}


def test_published_size():
    assert count(base_shapes("llava-1.5-7b")) == 7_063_427_072


@pytest.mark.parametrize("name", PRESETS)
def test_trees_are_what_checkpoints_hold(name):
    config, twig = preset(name)
    base = base_shapes(name)
    assert paths(base) == {t.path: t.our_shape for t in llava_tensors(config)}
    grown = jax.eval_shape(lambda p: init_twig(p, config.text, twig), base)
    assert paths(grown) == {t.path: t.our_shape for t in twig_tensors(config.text, twig)}


def test_a_whole_7b_forward_pass():
    config, _ = preset("llava-1.5-7b")
    size, M = config.vision.image_size, config.vision.num_tokens

    def forward(params, pixels):
        return Llava(config).apply({"params": params}, pixels)

    pixels = jax.ShapeDtypeStruct((2, 1, size, size, 3), "float32")
    assert M == 576
    out = jax.eval_shape(forward, base_shapes("llava-1.5-7b"), pixels)
    assert (out.shape, out.dtype.name) == ((2, M, 32064), "float32")


def test_unknown_preset():
    with pytest.raises(ValueError, match=r"llava-1\.5-7b"):
        preset("llava-1.5-8b")
