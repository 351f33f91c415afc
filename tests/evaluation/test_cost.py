"""The roofline's bytes and arithmetic, against real trees and figures worked out by hand."""

import math
from dataclasses import replace

import jax
import numpy as np
import pytest

from tests.tools.memory import shapes
from twig_jax.decoding.buckets import Bucket, program_for
from twig_jax.decoding.settings import Settings
from twig_jax.evaluation import cost
from twig_jax.evaluation.calibration import LENGTHS
from twig_jax.evaluation.cost import Drafting, Machine, Pass
from twig_jax.evaluation.scoring import ceiling
from twig_jax.presets import preset


def program(mode, rows=1, new=100, name="llava-1.5-7b", **changes):
    config, twig = preset(name)
    average = config.vision.num_tokens / 9 if name != "toy" else 4
    settings = Settings(mode=mode, avg_retained=average, **changes)
    return program_for(Bucket(rows, 40, 1, new), settings, config, twig)


def matrices(tree):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree) if x.ndim > 1)


@pytest.mark.parametrize("mode", ["plain", "ttp", "ssd", "ttp_ssd"])
def test_a_step_reads_all_matrices_and_caches_once_and_drafting_trunk_and_twig_again(mode):
    p, rows, levels = program(mode, 3, name="toy"), 3, 2.5
    weights, state = shapes(p, rows, np.float32)
    text, caches = weights.base["text"], state.caches
    size = {k: 4 * matrices(v) for k, v in text.items() if k != "embed_tokens"}
    kept = {
        k: sum(4 * math.prod(x.shape) for x in jax.tree.leaves(v))
        for k, v in caches._asdict().items()
    }
    expected = sum(size.values()) + kept["trunk"] + kept["deep"]
    if p.draft:
        expected += levels * (size["layers_0"] + kept["trunk"])
        expected += levels * (4 * matrices(weights.twig) + kept["twig"])
    found = sum(one.bytes * one.times for one in cost.step(p, rows, 4, levels))
    assert found == pytest.approx(expected)


def test_the_vision_tower_reads_its_weights():
    p = program("plain", name="toy")
    weights, _ = shapes(p, 1, np.float32)
    tower = {k: v for k, v in weights.base["vision"].items() if k.startswith("layers")}
    # The last layer is behind the one whose features are read.
    used = [tower[f"layers_{i}"] for i in range(p.base.vision.layers_used)]
    expected = 4 * (matrices(used) + matrices(weights.base["projector"]))
    (found,) = cost.encoding(p, 1, 4)
    assert found.bytes == expected


def test_a_pass_takes_what_takes_longer():
    machine = Machine(bandwidth=10, flops=100)
    assert Pass(flops=50, bytes=10).seconds(machine) == 1
    assert Pass(flops=300, bytes=10, times=2).seconds(machine) == 6


A100 = Machine(bandwidth=1.6e12, flops=230e12)  # what programs reach of 2 TB/s and 312 TFLOP/s


def predicted(mode, rows, drafting=None, new=100, machine=A100):
    slow = cost.answer(program("plain", rows), rows, 2, machine, new, Drafting())
    return slow / cost.answer(program(mode, rows), rows, 2, machine, new, drafting or Drafting())


def test_the_papers_speed_by_drafting_alone():
    """146.7 % on answers of about 100 tokens, which calibrated lengths of drafts are taken from."""
    _, twig = preset("llava-1.5-7b")
    levels = LENGTHS[0.574]
    decoding = ceiling(twig, 32, levels, 0.574 * levels)
    assert (100 + 2) / (100 / decoding + 2) == pytest.approx(1.467, abs=0.005)
    assert predicted("ssd", 1, Drafting(levels, 0.574 * levels)) == pytest.approx(1.467, abs=0.06)


def test_large_batches_gain_by_pruning_and_lose_by_drafting():
    pruning = [predicted("ttp", rows) for rows in (1, 8, 32)]
    assert pruning == sorted(pruning) and pruning[0] > 1
    drafting = [
        predicted("ssd", rows, Drafting(cost.deepest(1.4, 5, rows), 0.8)) for rows in (1, 8, 32)
    ]
    assert drafting == sorted(drafting, reverse=True)
    # Where arithmetic is all, drafts that are never accepted only cost.
    arithmetic = replace(A100, bandwidth=1e20)
    assert predicted("ssd", 64, Drafting(5, 0), new=3000, machine=arithmetic) < 0.2


def test_one_token_is_prefill_alone():
    p = program("plain")
    first = [*cost.encoding(p, 1, 2), *cost.prompt(p, 1, 2, 0)]
    assert cost.answer(p, 1, 2, A100, 1, Drafting()) == cost.seconds(first, A100)


@pytest.mark.parametrize("levels", [1.3, 2.2, 4.0])
def test_a_batch_drafts_as_deep_as_its_deepest_row(levels):
    assert cost.deepest(levels, 5, 1) == pytest.approx(levels)
    assert cost.deepest(1, 5, 9) == 1 and cost.deepest(5, 5, 9) == 5
    rng = np.random.default_rng(0)
    q = next(q for q in np.linspace(0, 1, 10001) if sum(q**i for i in range(5)) >= levels)
    rows = np.minimum(rng.geometric(1 - q, (40000, 8)), 5)
    assert rows.mean() == pytest.approx(levels, rel=0.01)
    assert cost.deepest(levels, 5, 8) == pytest.approx(rows.max(1).mean(), rel=0.01)
