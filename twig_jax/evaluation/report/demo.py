"""The demo's page: charts, kept patches, answers with coloured drafts."""

import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from twig_jax.decoding.settings import Result
from twig_jax.evaluation.compare import Row
from twig_jax.evaluation.report import page

# Blue for what is kept and gained, grey for what is compared with: readable without colour vision.
_BLUE, _GREY, _ORANGE = "#2166ac", "#9aa0a6", "#d6604d"


@dataclass(frozen=True)
class Shown:
    """One answered question to draw. `words` are the answer's tokens as text."""

    image: np.ndarray  # uint8 [H, W, 3]
    question: str
    words: list[str]
    result: Result
    first_visual: int  # prompt slot of the image's first visual token


def chart(title: str, labels: Sequence[str], series: dict[str, Sequence[float | None]]) -> str:
    """Grouped bars as inline SVG; a None leaves its bar out."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2))
    axes = figure.subplots()
    width = 0.8 / len(series)
    palette = (_BLUE, _ORANGE, _GREY, "#5aae61", "#762a83")
    for i, (name, values) in enumerate(series.items()):
        at = [k + (i - (len(series) - 1) / 2) * width for k in range(len(labels))]
        points = [(x, v) for x, v in zip(at, values, strict=True) if v is not None]
        bars = axes.bar(
            [x for x, _ in points], [v for _, v in points], width, label=name, color=palette[i % 5]
        )
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_title(title, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        frameon=False,
        fontsize=8,
        ncols=len(series),
        loc="upper center",
        bbox_to_anchor=(0.5, -0.08),
    )
    figure.tight_layout()
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def _budgets(rows: Sequence[Row]) -> list[float]:
    return sorted({r.pruned for r in rows if r.pruned})


def charts(accuracy: Sequence[Row], speed: Sequence[Row]) -> list[str]:
    """RelAcc by selector, and RelSpd by mode, over the budgets."""
    budgets = _budgets(accuracy)
    labels = [f"{b:.1%} pruned" for b in budgets]

    def value(rows: Sequence[Row], field: str, **wanted: object) -> float | None:
        found = [r for r in rows if all(getattr(r, k) == v for k, v in wanted.items())]
        return getattr(found[0], field) if found else None

    selectors = list(dict.fromkeys(r.selector for r in accuracy if r.selector))
    drawn = [
        chart(
            "RelAcc: accuracy over the unpruned base's",
            labels,
            {
                s: [value(accuracy, "relacc", task="all", pruned=b, selector=s) for b in budgets]
                for s in selectors
            },
        )
    ]
    modes = [m for m in ("ttp", "ttp_ssd") if any(r.mode == m for r in speed)]
    for task in ("short", "long"):
        if any(r.task == task for r in speed):
            drawn.append(
                chart(
                    f"RelSpd on {task} answers (plain decoding = 1, ssd = "
                    f"{value(speed, 'relspd', task=task, mode='ssd') or float('nan'):.2f})",
                    labels,
                    {
                        m: [value(speed, "relspd", task=task, pruned=b, mode=m) for b in budgets]
                        for m in modes
                    },
                )
            )
    return drawn


def write(
    path: str | Path,
    summary: str,
    tables: Sequence[str],
    drawings: Sequence[str],
    pairs: Sequence[Sequence[Shown]],
    patches_per_side: int,
) -> None:
    """Writes the report, in a folder that is made: one file, no other resources.

    Those of `pairs` share a page each.
    """
    shown = [
        page.picture(f"page{i}", pair[0].image)
        + page.row(_card(f"page{i}", one, patches_per_side) for one in pair)
        for i, pair in enumerate(pairs)
    ]
    parts = [
        f"<p>{html.escape(summary)}</p>",
        *drawings,
        *tables,
        page.heading("What was kept, and who wrote the answer"),
        page.note(
            "Patches in full colour went on through the deep layers; faded ones were pruned after "
            "the trunk. Words on blue were drafted by the twig and accepted by the base; it wrote "
            "the others itself."
        ),
        *shown,
    ]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(page.page("twig_jax on digits", parts))


def _card(name: str, shown: Shown, patches_per_side: int) -> str:
    kept = (shown.result.kept - shown.first_visual).tolist()
    return (
        f"<p><b>{html.escape(shown.question)}</b></p>"
        f"{page.patches(name, kept, patches_per_side)}"
        f"<p>{page.coloured(shown.words, shown.result.accepted.tolist())}</p>"
    )
