"""Plots of pooled figures, as PNGs."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from twig_jax.evaluation.plots import STYLES
from twig_jax.evaluation.report.pooled import Pooled, by_kind, by_position, kept_shares

# Of selectors in turn: apart in hue and lightness, and in their marks, so readable without colour
# vision.
_MARKS = (
    ("#2166ac", "D"),
    ("#d6604d", "s"),
    ("#5aae61", "^"),
    ("#80868b", "o"),
    ("#762a83", "v"),
    ("#e69f00", "P"),
    ("#56b4e9", "X"),
    ("#8c510a", "<"),
    ("#4d4d4d", ">"),
    ("#c51b7d", "p"),
    ("#01665e", "h"),
    ("#b2182b", "*"),
    ("#a6761d", "d"),
    ("#35978f", "H"),
    ("#de77ae", "8"),
)
_UNPRUNED = ("#000000", "*")
_COLUMNS = 3  # panels side by side
_GROUPS = 4  # of as many lengths each, over which speeds are averaged


def accuracy(rows: Sequence[Pooled]) -> bytes | None:
    """A panel a benchmark: RelAcc against budget with its interval, a line a selector."""
    shown = [r for r in one_mode(rows) if r.relacc is not None]
    if not shown:
        return None
    marks = _marks(shown)
    figure, panels = _panels(list(dict.fromkeys(r.task for r in shown)))
    for task, axes in panels.items():
        axes.axhline(100, color=STYLES["plain"][0], linewidth=1)
        budgets = sorted({r.way.avg_retained or 0 for r in shown if r.task == task})
        selectors = list(dict.fromkeys(r.way.selector for r in shown if r.task == task))
        for i, selector in enumerate(selectors):
            found = sorted(
                (r for r in shown if (r.task, r.way.selector) == (task, selector)),
                key=lambda r: r.way.avg_retained or 0,
            )
            # A step aside, so that intervals do not lie on each other.
            aside = 0.02 * (i - (len(selectors) - 1) / 2)
            at = [budgets.index(r.way.avg_retained or 0) + aside for r in found]
            color, marker = marks[selector]
            values = 100 * np.array([[r.relacc, r.relacc_low, r.relacc_high] for r in found], float)
            axes.plot(at, values[:, 0], color=color, marker=marker, markersize=5, label=selector)
            axes.vlines(at, values[:, 1], values[:, 2], color=color, linewidth=1)
        axes.set_xticks(range(len(budgets)), [f"{b:g}" for b in budgets])
        axes.set_xlabel("visual tokens a layer sees (R̄)", fontsize=9)
        axes.set_ylabel("RelAcc %", fontsize=9)
    return _finish(figure, panels, "Accuracy left, plain decoding = 100 %")


def speed(rows: Sequence[Pooled]) -> bytes | None:
    """A panel a benchmark: each timed sample's speed over plain's against its length.

    Of each mode the smallest budget, by the twig where it is there; a line joins means of samples
    of similar length.
    """
    from matplotlib.ticker import MaxNLocator

    timed = [r for r in sharpest(rows) if r.timings and r.way.mode != "plain"]
    shown = list({(r.task, r.way.mode): r for r in sorted(timed, key=_twig_last)}.values())
    if not shown:
        return None
    figure, panels = _panels(list(dict.fromkeys(r.task for r in shown)))
    for row in shown:
        axes = panels[row.task]
        color, marker = STYLES[row.way.mode]
        timings = np.array(row.timings)
        length, relative = timings[:, 0], timings[:, 1] / timings[:, 3]
        axes.scatter(length, relative, s=16, color=color, marker=marker, alpha=0.45, linewidths=0)
        there = np.unique(length)
        groups = [np.isin(length, g) for g in np.array_split(there, min(_GROUPS, len(there)))]
        means = np.array([[length[g].mean(), relative[g].mean()] for g in groups])
        axes.plot(means[:, 0], means[:, 1], color=color, marker=marker, label=_label(row))
    for axes in panels.values():
        axes.axhline(1, color=STYLES["plain"][0], linewidth=1)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("new tokens of an answer", fontsize=9)
        axes.set_ylabel("speed, plain = 1", fontsize=9)
    return _finish(figure, panels, "Speed against answer length")


def acceptance(rows: Sequence[Pooled]) -> tuple[bytes, bytes] | None:
    """Panels a benchmark: acceptance by position in the draft, and by kind of piece."""
    from matplotlib.ticker import MaxNLocator

    shown = [r for r in sharpest(rows) if r.tokar is not None]
    if not shown:
        return None
    marks = _marks(shown)
    tasks = list(dict.fromkeys(r.task for r in shown))
    figure, panels = _panels(tasks)
    for row in shown:
        axes, (color, marker) = panels[row.task], marks[row.way.selector]
        shares = by_position(row.tally)
        axes.plot(
            list(shares),
            [100 * s for s in shares.values()],
            color=color,
            marker=marker,
            markersize=5,
            label=_label(row),
        )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("position in the draft", fontsize=9)
        axes.set_ylabel("accepted %", fontsize=9)
    positions = _finish(figure, panels, "Drafts accepted, by position")
    figure, panels = _panels(tasks)
    for task, axes in panels.items():
        found = [r for r in shown if r.task == task]
        names = sorted({kind for r in found for kind, _ in r.tally.kinds}, reverse=True)
        for i, row in enumerate(found):
            of_kind = by_kind(row.tally)
            color, marker = marks[row.way.selector]
            at = [names.index(kind) + 0.12 * ((len(found) - 1) / 2 - i) for kind in of_kind]
            axes.scatter(
                [100 * s for s in of_kind.values()],
                at,
                s=28,
                color=color,
                marker=marker,
                label=_label(row),
            )
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.set_xlim(-3, 103)
        axes.set_xlabel("emitted tokens that were drafts %", fontsize=9)
    return positions, _finish(figure, panels, "Tokens the twig wrote, by kind of text")


def kept(rows: Sequence[Pooled]) -> bytes | None:
    """Of one benchmark, selectors down and budgets across: how often each patch was kept."""
    shares = {
        (r.way.selector, r.way.avg_retained): (r, found)
        for r in one_mode(rows)
        if (found := kept_shares(r)) is not None
    }
    if not shares:
        return None
    selectors = list(dict.fromkeys(selector for selector, _ in shares))
    budgets = sorted({budget for _, budget in shares if budget is not None}, reverse=True)
    figure, panels = _subplots(len(selectors), len(budgets), 1.9, 1.8)
    for j, budget in enumerate(budgets):
        # One scale a budget: what is kept at all differs too much between them.
        there = [found for (_, b), (_, found) in shares.items() if b == budget]
        most = max(found.max() for found in there)
        for i, selector in enumerate(selectors):
            axes = panels[i][j]
            axes.set_xticks([])
            axes.set_yticks([])
            if (selector, budget) not in shares:
                axes.axis("off")
                continue
            found = 100 * shares[selector, budget][1]
            seen = axes.imshow(found, cmap="cividis", vmin=0, vmax=100 * most)
            if j == 0:
                axes.set_ylabel(selector, fontsize=9)
        panels[0][j].set_title(f"R̄ {budget:g}", fontsize=10)
        bar = figure.colorbar(seen, ax=list(panels[:, j]), location="bottom", shrink=0.9, pad=0.02)
        bar.set_label("kept in % of questions", fontsize=8)
        bar.ax.tick_params(labelsize=8)
    return _png(figure)


def one_mode(rows: Sequence[Pooled]) -> list[Pooled]:
    """Of pruned rows one mode a selector, ttp where it is there: ttp_ssd's answers are equal."""
    pruned = sorted((r for r in rows if r.way.selector), key=lambda r: r.way.mode, reverse=True)
    by_way = {(r.task, r.way.selector, r.way.avg_retained): r for r in pruned}
    return [r for r in rows if any(r is found for found in by_way.values())]


def sharpest(rows: Sequence[Pooled]) -> list[Pooled]:
    """Of each benchmark and method the row with the smallest budget."""
    found: dict[tuple[str, str], Pooled] = {}
    for row in sorted(rows, key=lambda r: -(r.way.avg_retained or 0)):
        found[row.task, row.method] = row
    return [r for r in rows if found[r.task, r.method] is r]


def _twig_last(row: Pooled) -> bool:
    return row.way.selector == "twig"


def _label(row: Pooled) -> str:
    budget = row.way.avg_retained
    return row.method if budget is None else f"{row.method}, R̄ {budget:g}"


def _marks(rows: Sequence[Pooled]) -> dict[str | None, tuple[str, str]]:
    """Colour and mark by selector."""
    selectors = dict.fromkeys(r.way.selector for r in rows if r.way.selector)
    return {None: _UNPRUNED} | {s: _MARKS[i % len(_MARKS)] for i, s in enumerate(selectors)}


def _subplots(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    size = (0.6 + width * columns, 0.9 + height * rows)
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _panels(tasks: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """A figure and the axes of each benchmark."""
    columns = min(_COLUMNS, len(tasks))
    width, height = (6.4, 3.6) if columns == 1 else (3.3, 2.5)
    figure, panels = _subplots(-(-len(tasks) // columns), columns, width, height)
    for axes in panels.flat[len(tasks) :]:
        axes.axis("off")
    return figure, dict(zip(tasks, panels.flat, strict=False))


def _finish(figure: Any, panels: dict[str, Any], title: str) -> bytes:
    labels: dict[str, Any] = {}
    for task, axes in panels.items():
        axes.set_title(task, fontsize=10)
        axes.grid(color="#e4e6e8", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        handles, names = axes.get_legend_handles_labels()
        labels |= dict(zip(names, handles, strict=True))
    figure.suptitle(title, fontsize=11)
    figure.legend(
        labels.values(),
        labels,
        loc="outside lower center",
        ncols=min(len(labels), 2 if len(panels) == 1 and max(map(len, labels)) > 12 else 4),
        frameon=False,
        fontsize=9,
    )
    return _png(figure)


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
