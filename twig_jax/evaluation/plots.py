"""Pictures of measured speeds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from twig_jax.evaluation.ablations import spread
from twig_jax.evaluation.speed import Speed

# Apart in hue and lightness, and in their marks: readable without colour vision.
STYLES = {
    "plain": ("#80868b", "o"),
    "ttp": ("#d6604d", "s"),
    "ssd": ("#5aae61", "^"),
    "ttp_ssd": ("#2166ac", "D"),
    "tree": ("#762a83", "v"),
}
_DASHES = ("-", "--", ":", "-.")  # of the budgets of one mode


def relative_speed(path: str | Path, title: str, speeds: Sequence[Speed]) -> None:
    """Writes a PNG: a panel a batch size, answer length across, speed over plain's upwards."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    batches = sorted({s.batch for s in speeds})
    lengths = sorted({s.max_new_tokens for s in speeds})
    ways = list(dict.fromkeys(s.way for s in speeds if s.way != "plain"))
    # A way is named "MODE BUDGET", or by its mode alone.
    alike = {way: [w for w in ways if w.split()[0] == way.split()[0]] for way in ways}
    figure = Figure(figsize=(1.2 + 2.2 * len(batches), 3.2), layout="constrained")
    panels = figure.subplots(1, len(batches), sharey=True, squeeze=False)
    for batch, axes in zip(batches, panels[0], strict=True):
        axes.axhline(1, color=STYLES["plain"][0], linewidth=1)
        for way in ways:
            found = sorted(
                (s.max_new_tokens, s.relspd)
                for s in speeds
                if s.batch == batch and s.way == way and s.relspd is not None
            )
            color, marker = STYLES[way.split()[0]]
            dashes = _DASHES[alike[way].index(way) % len(_DASHES)]
            style = {"color": color, "marker": marker, "linestyle": dashes}
            axes.plot(*zip(*found, strict=True), label=way, **style)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(FixedLocator(lengths))
        axes.yaxis.set_major_locator(FixedLocator([0.25, 0.35, 0.5, 0.7, 1, 1.4, 2, 2.8, 4]))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_title(f"batch {batch}", fontsize=10)
        axes.set_xlabel("tokens of an answer", fontsize=9)
        axes.grid(axis="y", color="#e4e6e8", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("speed, plain = 1")
    figure.suptitle(title, fontsize=11)
    handles, labels = panels[0][0].get_legend_handles_labels()
    columns = max(1, min(len(ways), 2 * len(batches)))
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8
    )
    figure.savefig(path, dpi=110)


def plot_ablations(path: str | Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes a PNG: a row an ablation, RelAcc, RelSpd and TokAR of its variants side by side.

    lines: of `over_seeds`; bars are means over seeds, whiskers their standard deviation.
    """
    from matplotlib.figure import Figure

    shown = [("relacc", "RelAcc", "#2166ac"), ("relspd", "RelSpd", "#d6604d")]
    shown.append(("tokar", "TokAR", "#5aae61"))
    kinds = list(dict.fromkeys(line["ablation"] for line in lines))
    of = {kind: [line for line in lines if line["ablation"] == kind] for kind in kinds}
    height = 0.5 + sum(0.5 + 0.26 * len(of[kind]) for kind in kinds)
    figure = Figure(figsize=(10, height), layout="constrained")
    panels = figure.subplots(
        len(kinds),
        len(shown),
        height_ratios=[1 + 0.55 * len(of[kind]) for kind in kinds],
        sharex="col",
        squeeze=False,
    )
    for row, kind in zip(panels, kinds, strict=True):
        for axes, (name, title, color) in zip(row, shown, strict=True):
            for i, line in enumerate(of[kind]):
                if line[name] is not None:
                    axes.barh(i, line[name], 0.7, xerr=spread(line, name), color=color, alpha=0.85)
                    axes.text(0, i, f" {line[name]:.3g}", va="center", fontsize=7, color="white")
            axes.set_yticks(range(len(of[kind])), [line["variant"] for line in of[kind]])
            axes.tick_params(labelsize=8, labelleft=axes is row[0], left=False)
            axes.set_ylim(len(of[kind]) - 0.5, -0.5)
            axes.spines[["top", "right"]].set_visible(False)
            if kind == kinds[0]:
                axes.set_title(title, fontsize=10)
        row[0].set_ylabel(kind, fontsize=9)
    figure.savefig(path, dpi=110)
