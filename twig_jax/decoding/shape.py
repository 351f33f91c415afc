"""Which tree of drafts is worth its time: expected tokens a second of every shape of a grid."""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from twig_jax.decoding.tree import Tree

DEPTHS = range(11)
CHILDREN = EXPANDED = (1, 2, 3, 4, 6, 8, 10)
NODES = (4, 6, 8, 12, 16, 24, 32, 48, 60)


class Costs(NamedTuple):
    """Seconds of an iteration's parts. Between the numbers of nodes given they are interpolated,
    beyond them they stay what they are at the ends.
    """

    level: Mapping[int, float]  # of trunk and twig over so many nodes of a level
    verification: Mapping[int, float]  # of the trunk over the leaves, and the deep layers over all
    rest: float  # of what every iteration pays, drafts or not

    def iteration(self, tree: Tree) -> float:
        """Of an iteration that drafts all levels."""
        levels = [1, *[tree.expanded] * (tree.depth - 1)] if tree.depth else []
        drafting = sum(_at(self.level, nodes) for nodes in levels)
        return self.rest + drafting + _at(self.verification, 1 + tree.kept)


def choose_tree(costs: Costs, hits: Sequence[float]) -> Tree:
    """The tree with the most tokens a second; of equals the smallest.

    hits[r]: how probably the base's choice is the twig's candidate r, from 0, after tokens that are
    the base's own.
    """
    best, most = Tree.of(0), 0.0
    for shape in itertools.product(DEPTHS, CHILDREN, EXPANDED, (*NODES, 0)):
        tree = Tree.of(*shape)
        speed = (1 + accepted(tree, hits)) / costs.iteration(tree)
        if speed > most:
            best, most = tree, speed
    return best


def accepted(tree: Tree, hits: Sequence[float]) -> float:
    """Expected drafts accepted an iteration, if candidates hit independently of those before them.

    The tree grows as in `draft`, by the probability of paths. A node is accepted where its whole
    path hits, so that their probabilities add up.
    """
    if not tree.depth:
        return 0.0
    offered = np.sort(hits)[::-1][: tree.children]
    levels = [offered]
    for _ in range(tree.depth - 1):
        expanded = np.sort(levels[-1])[::-1][: tree.expanded]
        levels.append(np.outer(expanded, offered).ravel())
    return float(np.sort(np.concatenate(levels))[::-1][: tree.kept].sum())


def _at(seconds: Mapping[int, float], nodes: int) -> float:
    known = sorted(seconds)
    return float(np.interp(nodes, known, [seconds[k] for k in known]))
