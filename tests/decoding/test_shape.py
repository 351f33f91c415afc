"""Shapes of trees that hand-made costs ask for."""

import pytest

from twig_jax.decoding.shape import Costs, accepted, choose_tree
from twig_jax.decoding.tree import Tree

HITS = [0.5, 0.2, 0.1, 0.05]


def costs(level: float, node: float) -> Costs:
    """A pass over a level costs the same for any width, verification so much more for each node."""
    return Costs({1: level, 10: level}, {1: 1.0, 101: 1.0 + 100 * node}, 1.0)


def test_expected_drafts_by_hand() -> None:
    assert accepted(Tree.of(3), HITS) == pytest.approx(0.5 + 0.25 + 0.125)
    # Two children of the root and of the better of them.
    assert accepted(Tree.of(2, 2, 1), HITS) == pytest.approx(0.7 + 0.5 * 0.7)
    assert accepted(Tree.of(2, 2, 2), HITS) == pytest.approx(0.7 + 0.7 * 0.7)
    # The three best of these: 0.5, 0.25 and 0.2.
    assert accepted(Tree.of(2, 2, 2, 3), HITS) == pytest.approx(0.95)
    assert accepted(Tree.of(0), HITS) == 0


def test_free_verification_asks_for_a_wide_tree() -> None:
    wide = choose_tree(costs(level=0.1, node=0.0), HITS)
    assert wide.children == 4 and wide.expanded == 10 and wide.kept > 60
    assert wide.depth > 2


def test_costly_nodes_ask_for_a_chain() -> None:
    """A level costs next to nothing, every node as much as three tenths of an iteration."""
    assert choose_tree(costs(level=0.0, node=0.6), HITS) == Tree.of(1)
    chain = choose_tree(costs(level=0.0, node=0.6), [0.9, 0.05])
    assert chain.children == 1 and chain.kept == chain.depth > 2


def test_costly_levels_ask_for_none() -> None:
    assert choose_tree(costs(level=9.0, node=0.0), HITS) == Tree.of(0)
