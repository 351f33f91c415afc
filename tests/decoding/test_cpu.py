"""bfloat16 and int8 on CPUs: answers are right but for near ties, and weights are read in place."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoding.models import CALL, CONFIG, M, forced, request, weights
from twig_jax.config import TwigConfig
from twig_jax.decoding.buckets import Bucket
from twig_jax.decoding.cost import shapes
from twig_jax.decoding.generate import Generator, jitted_decode
from twig_jax.decoding.session import Session
from twig_jax.models.cpu import Transposed
from twig_jax.models.int8 import quantised
from twig_jax.models.twig import fresh_p_head, init_twig
from twig_jax.programs import Hlo
from twig_jax.sharding.mesh import make_mesh

# These name or call what is there.
KEEP = ("parameter", "tuple", "get-tuple-element", "while", "conditional", "call")
# Few layers, as compiling is what takes time.
SMALL = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, num_layers=3))
TWIG = TwigConfig(K=1, T=1, K_f=3)
ROWS = [request(99, 2, 8, 8), request(1, 1, 2, 5), request(2, 0, 3, 4)]
# Every visual token is kept, as which ones are best may be a near tie too.
WHOLE = dataclasses.replace(CALL, avg_retained=M, gamma=3)


def model(dtype=jnp.bfloat16, p_head=False, int8=None, **made):
    """Of the same values in either type; int8 as for `twig_jax.load`."""
    base = weights(config=SMALL)
    twig = init_twig(base, SMALL.text, TWIG)
    if p_head:
        twig["p_head"] = fresh_p_head(SMALL.text)
    base, twig = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(dtype), (base, twig))
    base = quantised(base) if int8 == "all" else base
    config = dataclasses.replace(TWIG, p_head=p_head)
    return Generator(SMALL, base, config, twig, int8_drafts=int8 is not None, **made)


@pytest.fixture(scope="module")
def exact():
    return model(jnp.float32)


def agrees(exact, one, answer):
    """Whether float32 has every token among the likeliest, by a thirtieth of the largest logit.

    Any other token is as likely to be as far away as half of it.
    """
    logits = forced(exact, one, answer, M * (0 if one.pixels is None else len(one.pixels))).logits
    logits = np.asarray(logits[0, : len(answer)])
    lost = logits.max(-1) - np.take_along_axis(logits, answer[:, None], axis=1)[:, 0]
    return (30 * lost < np.abs(logits).max()).all()


@pytest.mark.parametrize("mode", ["plain", "ttp_ssd", "tree"])
def test_answers_are_those_of_float32(exact, mode):
    tree = {"mode": "ssd", "children": 3, "expanded": 2, "nodes": 5}
    changes = tree if mode == "tree" else {"mode": mode}
    found = model().generate(ROWS, dataclasses.replace(WHOLE, **changes))
    assert all(agrees(exact, *pair) for pair in zip(ROWS, [r.tokens for r in found], strict=True))
    assert mode == "plain" or sum(r.matched.sum() for r in found) > 0


def test_a_mesh_splits_what_is_arranged(exact):
    ours = model(mesh=make_mesh(2, 2, 2))
    head = ours.weights.base["text"]["lm_head"]["kernel"]
    assert isinstance(head, Transposed)
    assert head.values.sharding.shard_shape(head.values.shape) == (37, 16)
    found = ours.generate(ROWS[:1], dataclasses.replace(WHOLE, mode="ssd"))
    assert agrees(exact, ROWS[0], found[0].tokens)


def test_turns(exact):
    """A second turn reads caches that are float32 by then; with a P-Head, and a twig in int8."""
    ours = model(p_head=True, int8="twig")
    assert ours.weights.cache_dtype == jnp.float32 and ours.weights.dtype == jnp.bfloat16
    session, first, turn = Session(ours, WHOLE), ROWS[1], ROWS[2]
    session.ask(first.ids, first.is_visual, first.pixels)
    whole = dataclasses.replace(
        first,
        ids=np.concatenate([session.ids, turn.ids]),
        is_visual=np.concatenate([session.is_visual, turn.is_visual]),
    )
    assert agrees(exact, whole, session.ask(turn.ids, turn.is_visual, turn.pixels).tokens)


@pytest.mark.parametrize(
    ("mode", "int8"), [("plain", None), ("ttp_ssd", None), ("plain", "all"), ("ttp_ssd", "all")]
)
def test_no_array_as_large_as_weights_or_caches_is_made(mode, int8):
    """But for caches that slots are written to, in place: these are float32."""
    # Sizes that nothing else in the program has.
    ours = model(int8=int8, buckets=(Bucket(1, text=101, images=1, new=53),))
    call = dataclasses.replace(CALL, mode=mode)
    program = ours.batches.prepare([request(1, 1, 2, 5)], call).program
    weights, _, _, cost, state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes(program, 1, ours.weights)[1:6]
    )
    stop = jax.ShapeDtypeStruct((1,), jnp.bool_)
    hlo = Hlo(jitted_decode.lower(program, weights, state, stop, cost, 1).compile().as_text())
    caches = {x.shape for x in jax.tree.leaves(state.caches)}
    kernels = {x.shape for x in jax.tree.leaves((weights.base["text"], weights.twig))}
    kernels = {tuple(sorted(shape)) for shape in kernels if len(shape) == 2}
    made = [
        (one.kind, array.kind, one.line)
        for _, one, _ in hlo.run(hlo.entry)
        if one.kind not in KEEP
        for array in one.results
        if array.dims in caches or tuple(sorted(array.dims)) in kernels
    ]
    assert made
    for kind, of, line in made:
        assert kind in ("fusion", "scatter") and of == "f32", line
        assert re.search("dynamic-update-slice|dynamic_update_slice|scatter", line), line
