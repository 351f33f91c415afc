"""Pictures of measured speeds."""

from collections.abc import Sequence
from pathlib import Path

from twig_jax.evaluation.speed import Speed

# Apart in hue and lightness, and in their marks: readable without colour vision.
_STYLES = {
    "plain": ("#80868b", "o"),
    "ttp": ("#d6604d", "s"),
    "ssd": ("#5aae61", "^"),
    "ttp_ssd": ("#2166ac", "D"),
}


def relative_speed(path: str | Path, title: str, speeds: Sequence[Speed]) -> None:
    """Writes a PNG: a panel a batch size, answer length across, speed over plain's upwards."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    batches = sorted({s.batch for s in speeds})
    lengths = sorted({s.max_new_tokens for s in speeds})
    modes = [mode for mode in _STYLES if mode != "plain" and any(s.mode == mode for s in speeds)]
    figure, panels = plt.subplots(
        1,
        len(batches),
        figsize=(1.2 + 2.2 * len(batches), 3.2),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for batch, axes in zip(batches, panels[0], strict=True):
        axes.axhline(1, color=_STYLES["plain"][0], linewidth=1)
        for mode in modes:
            found = sorted(
                (s.max_new_tokens, s.relspd)
                for s in speeds
                if s.batch == batch and s.mode == mode and s.relspd is not None
            )
            color, marker = _STYLES[mode]
            axes.plot(*zip(*found, strict=True), color=color, marker=marker, label=mode)
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
    figure.legend(handles, labels, loc="outside lower center", ncols=len(modes), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
