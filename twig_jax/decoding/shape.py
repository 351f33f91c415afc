"""Which tree of drafts is fastest: what width and depth cost on this device, and what they win."""

import contextlib
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import jax
import numpy as np

from twig_jax.decoding.generate import Generator
from twig_jax.decoding.settings import Request, Result, Settings
from twig_jax.decoding.tree import Tree
from twig_jax.programs import device_bytes

_log = logging.getLogger(__name__)

RANKS = 10  # children that are tried at most
_SIZES = (1, 2, 3, 4, 6, RANKS)  # children, and nodes of a level
_KEPT = (0, 4, 8, 12, 16, 24, 32, 60)  # drafts that are verified; 0 for all
_DEEPEST = 8
# Costs are timed here, and interpolated between: every number is a program to compile.
_TIMED_WIDTHS = (1, 4, RANKS)
_TIMED_KEPT = (1, 8, 24, 60)
_ITERATIONS = 4  # of which a timing is the quickest


@dataclass(frozen=True)
class Costs:
    """Seconds, by the number of nodes; between the numbers they are interpolated.

    level: trunk and twig over a level. verification: all else that an iteration takes.
    """

    level: Mapping[int, float]
    verification: Mapping[int, float]

    def iteration(self, tree: Tree) -> float:
        """Seconds of an iteration that drafts such a tree."""
        levels = [1] + [tree.expanded] * (tree.depth - 1)
        return sum(_at(self.level, n) for n in levels) + _at(self.verification, 1 + tree.kept)


def _at(seconds: Mapping[int, float], nodes: int) -> float:
    """Beyond the last number as between the last two."""
    sizes, values = np.array(list(seconds)), np.array(list(seconds.values()))
    if nodes <= sizes[-1] or len(sizes) < 2:
        return float(np.interp(nodes, sizes, values))
    slope = (values[-1] - values[-2]) / (sizes[-1] - sizes[-2])
    return float(values[-1] + slope * (nodes - sizes[-1]))


def expected(tree: Tree, hits: np.ndarray) -> float:
    """Drafts that are accepted of a tree, on average.

    hits [R]: how probably the base's choice is the twig's r-th candidate; of every node alike, so
    that a node is accepted with the product over its path.
    """
    newest, found = np.ones(1), []
    for _ in range(tree.depth):
        newest = np.outer(newest, hits[: tree.children]).ravel()
        found.append(newest)
        newest = np.sort(newest)[::-1][: tree.expanded]
    return float(np.sort(np.concatenate(found))[::-1][: tree.kept].sum())


def choose_tree(costs: Costs, hits: np.ndarray) -> Tree:
    """The shape of most expected tokens a second; of equal ones that with the fewest nodes."""
    trees = {
        Tree.of(depth, children, expanded, kept)
        for depth, children, expanded, kept in product(
            range(1, _DEEPEST + 1), _SIZES, _SIZES, _KEPT
        )
        if children <= len(hits)
    }

    def speed(tree: Tree) -> float:
        return (1 + expected(tree, hits)) / costs.iteration(tree)

    return max(sorted(trees, key=lambda tree: (tree.kept, tree)), key=speed)


def fitted(
    generator: Generator, requests: Sequence[Request], settings: Settings, cache: Path
) -> Settings:
    """The settings with the tree that answers such requests fastest on this device.

    How often the twig is right is seen by answering the requests; costs are timed, once for a
    device, model and shape of batch, and kept in `cache`, a JSON file. Raises ValueError for a mode
    without drafts.
    """
    if not settings.draft:
        raise ValueError(f"mode {settings.mode} with gamma {settings.gamma} drafts nothing")
    ranked = replace(_with(settings, Tree.of(1, RANKS)), theta=0.0, adaptive=False)
    hits = hit_rates(generator.generate(requests, ranked))
    return _with(settings, choose_tree(measure(generator, requests, settings, cache), hits))


def _with(settings: Settings, tree: Tree) -> Settings:
    return replace(
        settings,
        gamma=tree.depth,
        children=tree.children,
        expanded=tree.expanded,
        nodes=tree.kept,
    )


def hit_rates(results: Sequence[Result]) -> np.ndarray:
    """How often the base's choice was the twig's r-th candidate, [RANKS].

    results: answers whose drafts are trees of one level with RANKS children.
    """
    counts, places = np.zeros(RANKS), 0
    for result in results:
        at = 0
        for drafts, matched in zip(result.drafts, result.matched, strict=True):
            if len(drafts) and at < len(result.tokens):
                places += 1
                counts[: len(drafts)] += drafts == result.tokens[at]
            at += int(matched) + 1
    return counts / max(places, 1)


def measure(
    generator: Generator, requests: Sequence[Request], settings: Settings, cache: Path
) -> Costs:
    """What iterations with trees of several sizes take, timed unless `cache` knows it."""
    program = generator.batches.prepare(requests, _with(settings, Tree.of(1))).program
    device = jax.devices()[0]
    key = str(
        {
            "device": f"{jax.device_count()} x {device.device_kind}",
            "jax": jax.__version__,
            "base": program.base.text,
            "twig": program.twig,
            "dtype": generator.weights.dtype,
            "bytes": [device_bytes(part) for part in generator.weights],
            "segments": program.segments,
            "slots": (len(requests), program.prompt_slots, program.max_new),
        }
    )
    known: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):  # it can be measured again
        known = json.loads(cache.read_text())
    if key not in known:
        _log.warning("timing trees of several sizes, which takes minutes and is kept in %s", cache)
        known[key] = _timed(generator, requests, settings)
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            part = cache.with_name(f"{cache.name}.{os.getpid()}")
            part.write_text(json.dumps(known, indent=1))
            os.replace(part, cache)  # whole, whatever ends this process, whoever reads beside it
        except OSError as error:
            _log.warning("what was timed is not kept: %s", error)
    return Costs(*({int(n): s for n, s in part.items()} for part in known[key]))


def _timed(
    generator: Generator, requests: Sequence[Request], settings: Settings
) -> tuple[dict[int, float], dict[int, float]]:
    """(level, verification) of `Costs`."""
    # Answers must not end before they are timed: they are as long as their program has room for.
    new = generator.batches.prepare(requests, _with(settings, Tree.of(1))).program.max_new
    unending = replace(settings, theta=0.0, adaptive=False, stop=())
    unending = replace(unending, max_new_tokens=new, min_new_tokens=new)

    def iteration(depth: int, width: int, kept: int = 0) -> float:
        forced = _with(unending, Tree.of(depth, width, width, kept))
        running, times = generator.start(requests, forced), []
        for _ in range(1 + _ITERATIONS):  # the first compiles
            if not running.alive:
                running = generator.start(requests, forced)
            if not running.alive:
                raise ValueError(f"answers of {new} tokens are too short to fit a tree to")
            began = time.perf_counter()
            running.run(1)
            times.append(time.perf_counter() - began)
        return min(times[1:])

    # Two levels more, and as many nodes to verify.
    one, kept = iteration(1, 3), 3
    level = {n: max(iteration(3, n, kept) - one, 0) / 2 for n in _TIMED_WIDTHS}
    verified = {1 + n: iteration(1, n) for n in _TIMED_KEPT}
    return level, {n: max(seconds - level[1], 0) for n, seconds in verified.items()}
