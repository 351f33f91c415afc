"""Decoding in int8: a twig that drafts in it changes no answer, a base in it is another model."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest

from tests.decoding.models import CALL, CONFIG, mixed, request, run, tokens, weights
from twig_jax.config import TwigConfig
from twig_jax.decoding.buckets import Bucket, program_for
from twig_jax.decoding.cost import shapes, shapes_of_weights
from twig_jax.decoding.generate import Generator
from twig_jax.decoding.loop import iterate
from twig_jax.decoding.session import Session
from twig_jax.models.int8 import Int8, quantised
from twig_jax.models.twig import fresh_p_head, init_twig
from twig_jax.programs import device_bytes
from twig_jax.sharding.mesh import make_mesh

TREE = {"gamma": 3, "children": 3, "expanded": 2, "nodes": 5}
# Few layers, as compiling is what takes time.
SMALL = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, num_layers=3))
TWIG = TwigConfig(K=1, T=2, K_f=2)
BASE = weights(config=SMALL)


def model(*, base=BASE, p_head=False, int8=True, **made):
    """A base and its twig, with a P-Head drawn at random."""
    twig = init_twig(BASE, SMALL.text, TWIG)
    if p_head:
        rng = np.random.default_rng(0)
        draw = lambda x: np.asarray(rng.normal(size=x.shape), np.float32)  # noqa: E731
        twig["p_head"] = jax.tree.map(draw, fresh_p_head(SMALL.text))
    config = dataclasses.replace(TWIG, p_head=p_head)
    return Generator(SMALL, base, config, twig, int8_drafts=int8, **made)


def test_drafts_in_int8_change_no_answer():
    """And nothing that is kept, by a P-Head, in this turn or the next."""
    shape = {"p_head": True, "buckets": (Bucket(1, text=64, images=2, new=32),)}
    ours, exact = model(**shape), model(**shape, int8=False)
    settings = dataclasses.replace(CALL, max_new_tokens=9)
    session = Session(ours, settings)
    first = request(1, 1, 3, 4)
    for turn in (first, request(2, 0, 2, 3)):
        whole = dataclasses.replace(
            first,
            ids=np.concatenate([session.ids, turn.ids]),
            is_visual=np.concatenate([session.is_visual, turn.is_visual]),
        )
        small = session.ask(turn.ids, turn.is_visual, turn.pixels)
        (plain,) = exact.generate([whole], dataclasses.replace(settings, mode="ttp"))
        assert small.matched.any() and small.tokens.tolist() == plain.tokens.tolist()
        np.testing.assert_allclose(small.scores, plain.scores, atol=1e-6)


@pytest.fixture(scope="module")
def coarse():
    """A base in int8, with a twig that drafts in it."""
    return model(base=quantised(BASE))


def test_drafts_and_a_mesh_change_no_answer_of_a_base_in_int8(coarse):
    """Drafts are a tree here; the mesh splits kernels and scales."""
    spread = model(base=coarse.weights.base, mesh=make_mesh(2, 2, 2))
    scale = spread.weights.base["text"]["layers_0"]["q_proj"]["kernel"].scale
    assert scale.sharding.shard_shape(scale.shape) == (scale.size // 2,)
    plain = run(mixed(), model=coarse, mode="ttp")
    assert tokens(run(mixed(), model=spread, **TREE)) == tokens(plain)


def test_footprint(coarse):
    """A byte a weight and four a column; the twig that reads prompts has no head of its own."""
    exact = model(int8=False).weights

    def smaller(tree):
        found = jax.tree.leaves(quantised(tree), is_leaf=lambda x: isinstance(x, Int8))
        saved = sum(3 * x.values.size - 4 * x.scale.size for x in found if isinstance(x, Int8))
        return device_bytes(tree) - saved

    assert device_bytes(coarse.weights.base) == smaller(exact.base)
    assert device_bytes(coarse.weights.drafter) == smaller(exact.twig)
    assert device_bytes(coarse.weights.twig) == device_bytes(exact.twig) - device_bytes(
        exact.twig["lm_head"]
    )


@pytest.mark.parametrize(
    ("int8", "kernels"),
    [("twig", 7 * TWIG.T + 1), ("all", 7 * (SMALL.text.num_layers + TWIG.T) + 2)],
)
def test_kernels_become_floats_only_where_a_product_reads_them(int8, kernels):
    """In an iteration as it is traced, for CPUs and for others.

    What compilers make of it, decoding/plan.py reads off.
    """
    program = program_for(Bucket(2, text=64, images=1, new=32), CALL, SMALL, TWIG)
    given = shapes(program, 2, shapes_of_weights(SMALL, TWIG, "float32", int8=int8))
    read = given.weights, given.state, given.cost
    shapes_of_kernels = {x.shape for x in jax.tree.leaves(given.weights) if x.dtype == np.int8}
    seen = 0

    def walk(jaxpr):
        nonlocal seen
        for equation in jaxpr.eqns:
            parts = jax.tree.leaves(list(equation.params.values()), is_leaf=is_program)
            inside = [part for part in parts if is_program(part)]
            for part in inside:
                walk(part.jaxpr)
            if not inside and any(is_kernel(x) for x in equation.invars):
                seen += 1
                [made] = equation.outvars
                if equation.primitive.name == "dot_general":  # for CPUs, with vectors of int8
                    assert made.aval.dtype == np.int32
                    continue
                assert equation.primitive.name == "convert_element_type"
                readers = [e.primitive.name for e in jaxpr.eqns if made in e.invars]
                assert readers == ["dot_general"]

    def is_program(part):
        return hasattr(part, "jaxpr")

    def is_kernel(x):
        return x.aval.dtype == np.int8 and x.aval.shape in shapes_of_kernels

    walk(jax.make_jaxpr(partial(iterate, program))(*read).jaxpr)
    assert seen >= 2 * kernels


def test_there_must_be_a_twig():
    with pytest.raises(ValueError, match="no twig to draft in int8"):
        Generator(SMALL, BASE, int8_drafts=True)
