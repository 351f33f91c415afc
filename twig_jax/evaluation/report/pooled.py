"""Figures of each way to answer, pooled over the folders that have them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from typing import Any

import numpy as np

from twig_jax.evaluation.benchmarks.files import Key
from twig_jax.evaluation.judge import Way
from twig_jax.evaluation.report.runs import Answered, Evaluation, Tally
from twig_jax.evaluation.scoring import relacc


@dataclass(frozen=True)
class Pooled:
    """One way on one benchmark. Shares are fractions, None is not measured.

    figures: in the benchmark's own unit, means over folders. relacc and its interval: over the
    questions of all folders, and over their images; relacc_sd: of the folders' own values. The
    speeds are means over the timed samples of all folders, tokar to mean_accepted over all
    iterations.
    """

    task: str
    way: Way
    folders: int
    samples: int
    unanswered: int
    pruned: float
    retained: int
    figures: dict[str, float]
    exact: float | None
    relacc: float | None
    relacc_low: float | None
    relacc_high: float | None
    relacc_sd: float | None
    timed_samples: int
    tokens_per_s: float | None
    relspd: float | None
    first_token_s: float | None
    memory_bytes: int | None
    tokar: float | None
    mean_drafted: float | None
    mean_accepted: float | None
    timings: list[list[float]]  # [new tokens, tokens/s, plain's new tokens, plain's tokens/s]
    tally: Tally

    @property
    def method(self) -> str:
        """Mode and selector."""
        return (
            self.way.mode if self.way.selector is None else f"{self.way.mode} {self.way.selector}"
        )

    @property
    def tokens(self) -> int | None:
        """Visual tokens of an image; None where nothing was pruned, and so nothing tells."""
        if self.way.avg_retained is None:
            return None
        return round(self.way.avg_retained / (1 - self.pruned))

    def as_json(self) -> dict[str, Any]:
        """A row of a result file."""
        row = asdict(self)
        del row["tally"]
        return {"task": row.pop("task"), **row.pop("way"), **row}


def pool(evaluations: Sequence[Evaluation]) -> list[Pooled]:
    """A row for each benchmark and way, in the order in which they first appear."""
    by_task: dict[str, list[Evaluation]] = defaultdict(list)
    for evaluation in evaluations:
        by_task[evaluation.task].append(evaluation)
    return [
        _pooled(task, way, [e for e in found if way in e.ways])
        for task, found in by_task.items()
        for way in dict.fromkeys(way for e in found for way in e.ways)
    ]


def _pooled(task: str, way: Way, evaluations: Sequence[Evaluation]) -> Pooled:
    found = [e.ways[way] for e in evaluations]
    rows = [f.row for f in found]
    tally = reduce(add, (f.tally for f in found))
    drafted = sum(d * n for (d, _, _), n in tally.iterations.items())
    matched = sum(m * n for (_, _, m), n in tally.iterations.items())
    rounds = tally.iterations.total()
    timings = [timing for row in rows for timing in row.get("timings", ())]
    timed = [row for row in rows if "timings" in row]
    weights = [row["timed_samples"] for row in timed]
    speeds = np.array(timings).reshape(-1, 4)
    own = [row["relacc"] for row in rows if row.get("relacc") is not None]
    return Pooled(
        task=task,
        way=way,
        folders=len(found),
        samples=len({key for f in found for key in f.asked}),
        unanswered=len({key for f in found for key, answered in f.asked.items() if not answered}),
        pruned=rows[0]["pruned"],
        retained=max(row["retained"] for row in rows),
        figures=_means([row["figures"] for row in rows if "figures" in row]),
        **_accuracy(found, [e.ways[Way("plain")] for e in evaluations if Way("plain") in e.ways]),
        relacc_sd=float(np.std(own, ddof=1)) if len(own) > 1 else None,
        timed_samples=sum(weights),
        tokens_per_s=float(speeds[:, 1].mean()) if timings else None,
        relspd=float(speeds[:, 1].mean() / speeds[:, 3].mean()) if timings else None,
        first_token_s=float(np.average([row["first_token_s"] for row in timed], weights=weights))
        if timed
        else None,
        memory_bytes=max((row["memory_bytes"] for row in timed), default=None),
        tokar=matched / drafted if drafted else None,
        mean_drafted=drafted / rounds if drafted else None,
        mean_accepted=matched / rounds if drafted else None,
        timings=timings,
        tally=tally,
    )


def _accuracy(found: Sequence[Answered], plain: Sequence[Answered]) -> dict[str, Any]:
    """exact, relacc and its interval, of folders with their plain answers.

    A benchmark's own figure that is not the mean of what its questions add, as MME's sum, cannot be
    pooled: its relacc is the mean of the folders' ratios, and has no interval.
    """
    points, base = _by_question(found), _by_question(plain)
    exact = float(np.mean(list(points.values()))) if points else None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    if points and any(base.values()) and points.keys() == base.keys():
        if all(map(_is_mean, (*found, *plain))):
            groups = {key: group for f in found for key, group in f.groups.items()}
            together = [groups[k] for k in base]
            ratio, *ends = relacc([points[k] for k in base], list(base.values()), together)
            low, high = (None if np.isnan(end) else end for end in ends)
        else:
            own = [f.row["relacc"] for f in found if f.row.get("relacc") is not None]
            ratio = float(np.mean(own)) if own else None
    return {"exact": exact, "relacc": ratio, "relacc_low": low, "relacc_high": high}


def _by_question(found: Sequence[Answered]) -> dict[Key, float]:
    """What each question adds; the mean where several folders ask it, so that it counts once."""
    points: dict[Key, list[float]] = defaultdict(list)
    for answered in found:
        for key, value in (answered.points or {}).items():
            points[key].append(value)
    return {key: float(np.mean(values)) for key, values in points.items()}


def _is_mean(answered: Answered) -> bool:
    main = next(iter(answered.row["figures"].values()))
    return bool(np.isclose(main, 100 * answered.row["exact"]))


def _means(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of the figures that all folders have."""
    if not figures:
        return {}
    return {
        name: float(np.mean([f[name] for f in figures]))
        for name in figures[0]
        if all(name in f for f in figures)
    }


def by_position(tally: Tally) -> dict[int, float]:
    """Level of drafts, from 1 -> share of the iterations with drafts there that accepted one."""
    last = max((levels for _, levels, _ in tally.iterations), default=0)
    shares = {}
    for j in range(1, last + 1):
        there = sum(n for (_, levels, _), n in tally.iterations.items() if levels >= j)
        kept = sum(n for (_, _, matched), n in tally.iterations.items() if matched >= j)
        shares[j] = kept / there
    return shares


def by_kind(tally: Tally) -> dict[str, float]:
    """Kind of piece -> share of the emitted tokens of that kind that were accepted drafts."""
    names = dict.fromkeys(kind for kind, _ in tally.kinds)
    return {
        kind: tally.kinds[kind, True] / (tally.kinds[kind, True] + tally.kinds[kind, False])
        for kind in names
    }


def kept_shares(row: Pooled) -> np.ndarray | None:
    """Share of the questions with images that kept each patch of the first one, [side, side].

    None where nothing was pruned, or the visual tokens of an image are no square grid.
    """
    side = grid(row.tokens)
    if side is None or not row.tally.pictured:
        return None
    counts = np.array([row.tally.kept[i] for i in range(side * side)])
    return counts.reshape(side, side) / row.tally.pictured


def grid(tokens: int | None) -> int | None:
    """How many patches an image is wide; None where its visual tokens are no square."""
    side = round((tokens or 0) ** 0.5)
    return side if side and side * side == tokens else None
