"""The roofline's bytes and arithmetic, against real trees and figures worked out by hand."""

import functools
import math
import re
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from twig_jax.decoding import cost
from twig_jax.decoding.buckets import Bucket, program_for
from twig_jax.decoding.cost import Drafting, Machine, Pass
from twig_jax.decoding.settings import Settings
from twig_jax.evaluation.calibration import LENGTHS
from twig_jax.evaluation.scoring import ceiling
from twig_jax.hardware import CHIPS
from twig_jax.presets import preset


@functools.cache
def weights(name, dtype, int8):
    return cost.shapes_of_weights(*preset(name), dtype, int8=int8)


@functools.cache  # of LLaVA-1.5-7B, tracing takes a second
def given(mode, rows=1, new=100, name="llava-1.5-7b", int8=None, dtype="bfloat16", **changes):
    config, twig = preset(name)
    average = config.vision.num_tokens / 9 if name != "toy" else 4
    settings = Settings(mode=mode, avg_retained=average, **changes)
    program = program_for(Bucket(rows, 40, 1, new), settings, config, twig)
    return cost.shapes(program, rows, weights(name, dtype, int8))


def size(tree):
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def read(passes):
    return sum(one.bytes * one.times for one in passes)


@pytest.mark.parametrize("int8", [None, "twig"])
@pytest.mark.parametrize("mode", ["plain", "ttp", "ssd", "ttp_ssd"])
def test_a_step_reads_all_weights_and_caches_once_and_drafting_trunk_and_twig_again(mode, int8):
    levels = 2.5
    x = given(mode, 3, name="toy", int8=int8, dtype="float32")
    text, caches = x.weights.base["text"], x.state.caches
    expected = size({k: v for k, v in text.items() if k != "embed_tokens"})
    expected += size((caches.trunk, caches.deep))
    if x.program.draft:
        expected += levels * size((text["layers_0"], caches.trunk))
        expected += levels * size((x.weights.drafter, caches.twig))
    assert read(cost.step(x, levels)) == pytest.approx(expected)


def test_the_vision_tower_reads_its_weights():
    x = given("plain", name="toy")
    # The last layer is behind the one whose features are read.
    tower = {k: v for k, v in x.weights.base["vision"].items() if k != "layers_1"}
    (found,) = cost.encoding(x)
    assert found.bytes == size((tower, x.weights.base["projector"]))


def test_a_pass_takes_what_takes_longer():
    machine = Machine(bandwidth=10, flops=100)
    assert Pass(flops=50, bytes=10).seconds(machine) == 1
    assert Pass(flops=300, bytes=10, times=2).seconds(machine) == 6


A100 = Machine(bandwidth=1.6e12, flops=230e12)  # what programs reach of 2 TB/s and 312 TFLOP/s


def predicted(mode, rows, drafting=None, new=100, machine=A100):
    slow = cost.answer(given("plain", rows), machine, new, Drafting())
    return slow / cost.answer(given(mode, rows), machine, new, drafting or Drafting())


def test_the_papers_speed_by_drafting_alone():
    """146.7 % on answers of about 100 tokens, which calibrated lengths of drafts are taken from."""
    _, twig = preset("llava-1.5-7b")
    levels = LENGTHS[0.574]
    decoding = ceiling(twig, 32, levels, 0.574 * levels)
    assert (100 + 2) / (100 / decoding + 2) == pytest.approx(1.467, abs=0.005)
    assert predicted("ssd", 1, Drafting(levels, 0.574 * levels)) == pytest.approx(1.467, abs=0.06)


def deepest(levels, rows, most=5):
    """Levels of a batch's iterations, which last until the last of its rows stops.

    A row goes on below every level with the same probability q.
    """
    below = np.arange(most)
    q = next(q for q in np.linspace(0, 1, 10001) if (q**below).sum() >= levels)
    return float((1 - (1 - q**below) ** rows).sum())


def test_large_batches_gain_by_pruning_and_lose_by_drafting():
    pruning = [predicted("ttp", rows) for rows in (1, 32)]
    assert pruning == sorted(pruning) and pruning[0] > 1
    drafting = [predicted("ssd", rows, Drafting(deepest(1.4, rows), 0.8)) for rows in (1, 32)]
    assert drafting == sorted(drafting, reverse=True)
    # Where arithmetic is all, drafts that are never accepted only cost.
    arithmetic = replace(A100, bandwidth=1e20)
    assert predicted("ssd", 32, Drafting(5, 0), new=3000, machine=arithmetic) < 0.2


def test_the_documentation_s_predictions():
    """The table in docs/performance.md."""
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()
    table = re.findall(r"^\| (\d+) \| (10|100|500) \| ([\d. |]+) \|$", page, re.MULTILINE)
    assert len(table) == 9
    machine = Machine(0.9 * CHIPS["h100"].bandwidth, 0.6 * CHIPS["h100"].flops)
    nothing, paper = Drafting(), Drafting(5, 2.87)

    def relspd(mode, drafting, rows, int8=None):
        one = given(mode, rows, **({"int8": int8} if int8 else {}))
        slow = cost.answer(given("plain", rows), machine, 100, nothing)
        return f"{slow / cost.answer(one, machine, 100, drafting):.2f}"

    # Answers of 100 tokens; the other lengths would only be traced once more.
    for rows, cells in [(int(r), c) for r, n, c in table if n == "100" and r != "8"]:
        assert cells.split(" | ") == [
            relspd("ttp", nothing, rows),
            relspd("ssd", paper, rows),
            relspd("ttp_ssd", paper, rows),
            relspd("ttp_ssd", paper, rows, "twig"),
            relspd("ttp_ssd", Drafting(deepest(1.4, rows), 0.8), rows),
        ]


def test_one_token_is_prefill_alone():
    x = given("plain")
    first = [*cost.encoding(x), *cost.prompt(x, 0)]
    assert cost.answer(x, A100, 1, Drafting()) == cost.seconds(first, A100)
