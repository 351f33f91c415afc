"""The programs that GPUs are given, on this machine: their kernel is interpreted.

Answers must be those of the programs for other devices, token for token; with drafts, those that
have none there.
"""

import contextlib
import dataclasses
import functools

import jax
import numpy as np
import pytest

from tests.decoding.models import CONFIG, generator, mixed, run, tokens
from twig_jax.decoding import batch, images, network
from twig_jax.models import fused_attention
from twig_jax.sharding.mesh import make_mesh

# Heads as wide as the kernel needs.
TEXT = dataclasses.replace(CONFIG.text, head_dim=16)

interpreted = functools.partial(fused_attention.fused_attend, interpret=True)


@pytest.fixture(scope="module")
def known():
    """Answers of other devices' programs, by mode and rows."""
    model = generator(text=TEXT)
    asked = ("plain", 1), ("ttp", 1), ("ttp", 4)
    return {
        (mode, rows): tokens(run(mixed()[:rows], model=model, mode=mode)) for mode, rows in asked
    }


@pytest.fixture
def used(known, monkeypatch):
    """Makes programs for GPUs; counts what is traced: kernels, and tokens run as two."""
    counts = {"kernels": 0, "images": 0, "twofold": 0}

    def counted(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(network, "fused_attend", counted("kernels", interpreted))
    monkeypatch.setattr(images, "fused_attend", counted("images", interpreted))
    monkeypatch.setattr(network, "_run_twofold", counted("twofold", network._run_twofold))
    for module in (batch, images):
        monkeypatch.setattr(module, "runs_triton", lambda device: True)
    return counts


def test_a_single_row(used, known):
    found = run(mixed()[:1], model=generator(text=TEXT), mode="plain")
    assert tokens(found) == known["plain", 1]
    assert used["kernels"] > 0 < used["twofold"]


def test_a_batch(used, known):
    """The kernel takes single tokens of several rows as they are."""
    found = run(mixed(), model=generator(text=TEXT), mode="ttp")
    assert tokens(found) == known["ttp", 4]
    assert used["kernels"] > 0 == used["twofold"]


def test_a_tree_that_is_not_always_drafted(used, known):
    model = generator(text=TEXT, made={"draft_cost": 0.1})
    tree = {"children": 2, "expanded": 2, "nodes": 5, "adaptive": True}
    assert tokens(run(mixed()[:1], model=model, mode="ttp_ssd", **tree)) == known["ttp", 1]
    assert used["kernels"] > 0 < used["twofold"]


def test_rows_and_heads_of_a_mesh(used, known):
    """Every device has its own, here a row and half of the heads; a row alone is run as two."""
    model = generator(text=TEXT, made={"mesh": make_mesh(4, 1, 2)})
    assert tokens(run(mixed(), model=model, mode="ttp_ssd")) == known["ttp", 4]
    assert used["kernels"] > 0 < used["twofold"]


@pytest.mark.parametrize("mesh", [None, (4, 1, 2)])
def test_images(used, mesh):
    vision = dataclasses.replace(CONFIG.vision, hidden_size=32)
    model = generator(vision=vision, made={"mesh": mesh and make_mesh(*mesh)})
    base, dtype, pixels = model.weights.base, model.weights.dtype, list(mixed()[0].pixels)
    with jax.set_mesh(model.mesh) if mesh else contextlib.nullcontext():
        found = model.images(pixels)
        elsewhere = images.encode(model.config, base, np.stack(pixels), dtype, False)
    assert used["images"] == vision.layers_used
    for one, other in zip(found, elsewhere, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
