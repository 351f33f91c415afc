"""Every parameter of every preset has exactly one rule, and lands where the rule says."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from twig_jax.models.int8 import quantised
from twig_jax.models.llava import init_base
from twig_jax.models.twig import init_twig
from twig_jax.presets import PRESETS, preset
from twig_jax.sharding import rules
from twig_jax.sharding.mesh import make_mesh
from twig_jax.sharding.rules import path_string, shardings, spec


def shapes(name):
    """(base, twig) of a preset, by shape."""
    config, twig = preset(name)
    base = jax.eval_shape(lambda key: init_base(config, key), jax.random.key(0))
    return base, jax.eval_shape(lambda p: init_twig(p, config.text, twig), base)


@pytest.mark.parametrize("name", PRESETS)
def test_exactly_one_rule_for_every_parameter(name):
    for tree in (*shapes(name), *(jax.eval_shape(quantised, tree) for tree in shapes(name))):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            assert len(spec(path_string(path))) <= leaf.ndim


@pytest.mark.parametrize(
    "path",
    [
        "text/layers_0/q_proj/kernels",
        "text/layers_0/xq_proj/kernel",
        "projector/linear_3/kernel",
        "",
    ],
)
def test_unknown_path(path):
    with pytest.raises(ValueError, match="0 sharding rules match"):
        spec(path)


def test_two_rules(monkeypatch):
    monkeypatch.setattr(rules, "RULES", (*rules.RULES, (r"q_proj/kernel", P())))
    with pytest.raises(ValueError, match="2 sharding rules match"):
        spec("text/layers_0/q_proj/kernel")


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2)])
def test_a_7b_base_is_spread_evenly(sizes):
    base, _ = shapes("llava-1.5-7b")
    _, fsdp, tensor = sizes
    placed = shardings(base, make_mesh(*sizes))
    one = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)), base, placed)
    total = sum(math.prod(x.shape) for x in jax.tree.leaves(base))
    assert sum(jax.tree.leaves(one)) == pytest.approx(total / (fsdp * tensor), rel=2e-3)


def test_scales_lie_beside_their_columns():
    kernels = {"q_proj": {"kernel": jnp.zeros((8, 12))}, "o_proj": {"kernel": jnp.zeros((12, 8))}}
    tree = quantised({"layers_0": kernels, "lm_head": {"kernel": jnp.zeros((8, 6))}})
    for mesh in (make_mesh(1, 4, 2), make_mesh(2, 2, 2)):
        placed = shardings(tree, mesh)
        for part in (*placed["layers_0"].values(), placed["lm_head"]):
            values, scale = part["kernel"]
            assert tuple(scale.spec) == tuple(values.spec)[:1]
            assert None not in values.spec


def test_an_axis_that_does_not_divide_is_left_out():
    mesh = make_mesh(1, 4, 2)
    tree = {"q_proj": {"kernel": jnp.zeros((6, 10))}, "lm_head": {"kernel": jnp.zeros((8, 7))}}
    placed = shardings(tree, mesh)
    assert placed["q_proj"]["kernel"].spec == P(None, "tensor")
    assert placed["lm_head"]["kernel"].spec == P("fsdp", None)
    moved = jax.device_put(tree, placed)
    assert moved["q_proj"]["kernel"].sharding.shard_shape((6, 10)) == (6, 5)
    np.testing.assert_array_equal(moved["q_proj"]["kernel"], tree["q_proj"]["kernel"])


def test_optimizer_paths_end_in_the_same_names():
    """Moments have their parameter's path behind their own, so one table serves both."""
    tree = {"opt": ({"mu": {"text": {"norm": {"scale": jnp.zeros(4)}}}},)}
    [(path, _)] = jax.tree_util.tree_leaves_with_path(tree)
    assert path_string(path) == "opt/0/mu/text/norm/scale"
    assert spec(path_string(path)) == P()


@pytest.mark.parametrize(
    ("asked", "found"), [((0, 1, 1), (8, 1, 1)), ((0, 2, 2), (2, 2, 2)), ((1, 4, 2), (1, 4, 2))]
)
def test_mesh_sizes(asked, found):
    mesh = make_mesh(*asked)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == found


def test_a_mesh_that_splits_an_axis_of_a_torus(monkeypatch):
    """As (1, 32, 2) of v6e:8x8, which jax makes only where it is told that it may."""

    def refused(*_, **__):
        raise NotImplementedError("Failed to find assignment for logical_axis_index 1")

    monkeypatch.setattr(jax, "make_mesh", refused)
    mesh = make_mesh(1, 4, 2)
    assert mesh.axis_names == ("data", "fsdp", "tensor") and mesh.devices.shape == (1, 4, 2)
    assert set(mesh.devices.flat) == set(jax.devices())
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (0, 3, 1), (0, 16, 1), (2, 2, 1), (0, 0, 8)])
def test_a_mesh_that_does_not_use_all_devices(sizes):
    with pytest.raises(ValueError, match="8 devices"):
        make_mesh(*sizes)
