"""A picture of a run's curves."""

import io
from collections.abc import Sequence

from etils import epath

# Panels: a title, and figures with their colours; a name that ends with _ stands for all that begin
# with it.
_PANELS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("loss", (("loss", "#2166ac"), ("validation/loss", "#d6604d"))),
    (
        "share of tokens",
        (
            ("accuracy", "#80868b"),
            ("agreement", "#2166ac"),
            ("validation/tokar", "#d6604d"),
        ),
    ),
    (
        "exact answers, and what pruning leaves",
        (("validation/exact", "#80868b"), ("validation/relacc_", "#2166ac")),
    ),
    ("norms", (("grad_norm", "#2166ac"), ("update_norm", "#d6604d"))),
)
_DASHES = ("-", "--", ":", "-.")


def curves(path: epath.Path, lines: Sequence[dict[str, float]]) -> None:
    """Writes a PNG of the figures of a run, as `Log` notes them, over its steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 3.2), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, 4), _PANELS, strict=True):
        for name, color in names:
            for dash, found in zip(_DASHES, _found(lines, name), strict=False):
                points = [(line["step"], line[found]) for line in lines if found in line]
                marker = "o" if len(points) < 40 else ""
                axes.plot(
                    *zip(*points, strict=True),
                    dash,
                    color=color,
                    marker=marker,
                    markersize=3,
                    linewidth=1.2,
                    label=found,
                )
        if "norms" in title and any(min(line.get_ydata()) > 0 for line in axes.lines):
            axes.set_yscale("log")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.grid(axis="y", color="#e4e6e8", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(fontsize=8, frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110)
    path.write_bytes(picture.getvalue())


def _found(lines: Sequence[dict[str, float]], name: str) -> list[str]:
    """The figures there are of that name, or that begin with it where it ends with _."""
    names = {key: None for line in lines for key in line}
    if name.endswith("_"):
        return [key for key in names if key.startswith(name)]
    return [name] if name in names else []
