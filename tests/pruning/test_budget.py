"""The budget of Eq. 6 and its guard."""

import math

import pytest

from twig_jax.config import TwigConfig
from twig_jax.pruning.budget import retained

LLAVA = TwigConfig(K=2, T=3, K_f=24)
DIGITS = TwigConfig(K=1, T=2, K_f=12)


@pytest.mark.parametrize(("average", "R"), [(192, 227), (128, 134), (64, 41)])
def test_the_papers_budgets(average, R):
    assert retained(average, LLAVA, 32, 576) == R


@pytest.mark.parametrize(("average", "R"), [(48, 57), (32, 34), (16, 11)])
def test_the_digits_budgets(average, R):
    assert retained(average, DIGITS, 16, 144) == R


@pytest.mark.parametrize(("K", "R"), [(0, 86), (1, 64), (2, 41), (3, 16)])
def test_the_papers_ablation_of_k(K, R):
    """It prints 85, 64, 41, 15: rounded, where the code takes the ceiling."""
    assert retained(64, TwigConfig(K, 3, 24), 32, 576) == R


def test_images_share_one_budget():
    assert retained(16, DIGITS, 16, 144, images=3) == -(-3 * (256 - 144) // 11)
    assert retained(16, DIGITS, 16, 144, images=0) == 0


@pytest.mark.parametrize("average", [36, 1, 0, -5, 433, 576, math.inf, math.nan])
def test_a_budget_without_solution_says_what_is_possible(average):
    with pytest.raises(ValueError, match=r"more than 36 and at most 432"):
        retained(average, LLAVA, 32, 576)


def test_the_largest_budget_keeps_everything():
    assert retained(432, LLAVA, 32, 576) == 576


def test_rounding_errors_do_not_add_a_token():
    # (16·(144 + 10·11)/16 - 144) / 11 is 10 exactly, but not in floating point.
    for R in range(1, 145):
        assert retained((144 + R * 11) / 16, DIGITS, 16, 144) == R
