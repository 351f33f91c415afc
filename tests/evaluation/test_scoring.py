"""Scores on examples worked out by hand."""

import dataclasses
import math

import numpy as np
import pytest

from twig_jax.config import TwigConfig
from twig_jax.decoding.settings import Result
from twig_jax.evaluation.scoring import acceptance, ceiling, relacc, tokens_per_s

RESULT = Result(
    text=None,
    tokens=np.arange(7),
    stopped_by="eos",
    accepted=np.zeros(7, bool),
    drafts=[np.array([0, 1, 9]), np.array([3, 4, 5])],
    parents=[np.array([0, 1, 2])] * 2,
    probs=[],
    matched=np.array([2, 3]),
    kept=np.zeros(0),
    scores=np.zeros(0),
    prefill_s=0.5,
    decode_s=1.5,
)


def test_acceptance_by_kind_of_word():
    # Places 0, 1, 2 were drafted first (0 and 1 accepted), then 3, 4, 5 (all accepted).
    flags = [True, False, True, False, True, True, False]
    a = acceptance([RESULT], [flags])
    assert a.tokar == 5 / 6
    assert a.content == 3 / 4  # places 0, 2, 4, 5, of which 2 was rejected
    assert a.wording == 2 / 2
    assert (a.drafted, a.levels, a.accepted) == (3.0, 3.0, 2.5)
    # What is past the known answer counts as wording.
    known = acceptance([RESULT], [flags[:3]])
    assert (known.content, known.wording) == (1 / 2, 4 / 4)


def test_acceptance_of_trees():
    # Two drafts for place 0, three for place 1 and one for place 2, two accepted; then one of two.
    tree = dataclasses.replace(
        RESULT,
        drafts=[np.array([8, 0, 9, 1, 7, 2]), np.array([3, 4])],
        parents=[np.array([0, 0, 2, 2, 1, 4]), np.array([0, 0])],
        matched=np.array([2, 1]),
    )
    a = acceptance([tree], [[True, False, True, False, False]])
    assert (a.drafted, a.levels, a.accepted) == (8 / 2, (3 + 1) / 2, 3 / 2)
    assert a.tokar == 3 / 8
    assert a.content == 1 / 3  # two drafts for place 0, one accepted, and one for place 2
    assert a.wording == 2 / 5


def test_acceptance_without_drafts_is_not_a_number():
    nothing = dataclasses.replace(
        RESULT, drafts=[np.array([], int)], parents=[np.array([], int)], matched=np.array([0])
    )
    assert math.isnan(acceptance([nothing], [[True]]).tokar)


def test_speed_counts_eos_and_prefill():
    assert tokens_per_s(RESULT) == 4.0
    assert tokens_per_s(dataclasses.replace(RESULT, stopped_by="length")) == 3.5


def test_relacc_is_a_ratio_with_an_interval_around_it():
    base = [True] * 80 + [False] * 20
    ours = [True] * 72 + [False] * 28
    ratio, low, high = relacc(ours, base)
    assert ratio == pytest.approx(0.9)
    assert low < ratio < high
    assert (low, high) == pytest.approx((0.825, 0.961), abs=0.005)
    assert relacc(base, base) == (1.0, 1.0, 1.0)


def test_samples_of_one_group_are_drawn_together():
    """Asked four times each, twenty questions tell as much as asked once."""
    base, ours = [1] * 16 + [0] * 4, [1] * 12 + [0] * 8
    once = relacc(ours, base)
    assert relacc(ours, base, range(20)) == once
    several = relacc(ours * 4, base * 4, [*range(20)] * 4)
    assert several == pytest.approx(once)
    apart = relacc(ours * 4, base * 4)
    assert apart[2] - apart[1] < 0.6 * (once[2] - once[1])
    uneven = relacc([1, 1, 0], [1, 1, 1], "aab")
    assert uneven == (pytest.approx(2 / 3), 0, 1)
    ratio, *interval = relacc([1, 1, 0], [1, 1, 1], "aaa")
    assert ratio == pytest.approx(2 / 3) and np.isnan(interval).all()


def test_relacc_of_few_right_answers() -> None:
    """Draws in which the base has no right answer have no ratio; without any there is none."""
    ratio, low, high = relacc([1, 1, 0, 0], [1, 0, 0, 0])
    assert ratio == 2 and 0 < low < high
    assert np.isnan(relacc([1, 0, 0], [0, 0, 0])).all()


def test_the_ceiling_follows_from_layer_counts():
    # Nothing drafted: an iteration is one pass over all layers for one token.
    assert ceiling(TwigConfig(1, 2, 12), 16, 0, 0) == 1.0
    # Five drafts, all accepted: 6 tokens for 1·6 + 2·5 + 15 = 31 layers.
    assert ceiling(TwigConfig(1, 2, 12), 16, 5, 5) == pytest.approx(6 * 16 / 31)
