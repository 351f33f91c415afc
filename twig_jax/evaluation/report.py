"""A self-contained HTML report: charts, overlays of kept tokens, answers with coloured drafts."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from twig_jax.decoding.settings import Result
from twig_jax.evaluation.compare import Row

# Blue for what is kept and gained, grey for what is compared with: readable without colour vision.
_BLUE, _GREY, _ORANGE = "#2166ac", "#9aa0a6", "#d6604d"

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:1080px;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;font-size:14px}td,th{padding:.25rem .6rem;text-align:right}
th{border-bottom:2px solid #444}td:first-child,th:first-child{text-align:left}
tr:nth-child(even){background:#f5f6f8}
.pair{display:flex;gap:1.5rem;flex-wrap:wrap;margin:1rem 0 2rem}.card{width:500px}
.card img{width:320px;image-rendering:pixelated;border:1px solid #ccc;display:block}
.draft{background:#cfe3f5;border-bottom:2px solid #2166ac}.own{border-bottom:2px solid #d6604d}
.note{color:#666;font-size:14px}svg{max-width:100%;height:auto}
"""


@dataclass(frozen=True)
class Shown:
    """One answered question to draw. `words` are the answer's tokens as text."""

    image: np.ndarray  # uint8 [H, W, 3]
    question: str
    words: list[str]
    result: Result
    first_visual: int  # prompt slot of the image's first visual token


def overlay(
    image: np.ndarray, kept: np.ndarray, patches_per_side: int, zoom: int = 4
) -> Image.Image:
    """The page with every patch that was not kept faded, and kept ones framed.

    kept: int [R], indices of visual tokens within the image.
    """
    side = image.shape[0] * zoom
    big = np.asarray(
        Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST), np.float32
    )
    size = side // patches_per_side
    out = 255 - (255 - big) * 0.22
    for patch in kept:
        y, x = divmod(int(patch), patches_per_side)
        area = (slice(y * size, (y + 1) * size), slice(x * size, (x + 1) * size))
        tile = big[area].copy()
        tile[[0, -1], :] = tile[:, [0, -1]] = (33, 102, 172)
        out[area] = tile
    return Image.fromarray(out.astype(np.uint8))


def chart(title: str, labels: Sequence[str], series: dict[str, Sequence[float | None]]) -> str:
    """Grouped bars as inline SVG; a None leaves its bar out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.2))
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
    plt.close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def coloured(words: Sequence[str], result: Result) -> str:
    """The answer as HTML: accepted drafts on blue, the base's own tokens underlined."""
    spans = [
        f'<span class="{"draft" if accepted else "own"}">{html.escape(word)}</span>'
        for word, accepted in zip(words, result.accepted, strict=True)
    ]
    return "".join(spans)


def _image(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _card(shown: Shown, patches_per_side: int) -> str:
    kept = shown.result.kept - shown.first_visual
    picture = _image(overlay(shown.image, kept, patches_per_side))
    return (
        f'<div class="card"><p><b>{html.escape(shown.question)}</b></p>'
        f'<img src="{picture}" alt="page with the kept patches in full colour">'
        f"<p>{coloured(shown.words, shown.result)}</p></div>"
    )


def table(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """An HTML table."""
    head = "".join(f"<th>{html.escape(h)}</th>" for h in headers)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>"
        for line in lines
    )
    return f"<table><tr>{head}</tr>{body}</table>"


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
    """Writes the report: one file, no other resources. `pairs` share a page each."""
    shown = "".join(
        '<div class="pair">' + "".join(_card(s, patches_per_side) for s in pair) + "</div>"
        for pair in pairs
    )
    text = (
        "<!doctype html><html lang=en><meta charset=utf-8><title>twig_jax on digits</title>"
        f"<style>{_STYLE}</style><h1>twig_jax on digits</h1><p>{html.escape(summary)}</p>"
        + "".join(drawings)
        + "".join(tables)
        + "<h2>What was kept, and who wrote the answer</h2><p class=note>Patches in full colour "
        "went on through the deep layers; faded ones were pruned after the trunk. Words on blue "
        "were drafted by the twig and accepted by the base; it wrote the others itself.</p>"
        + shown
        + "</html>"
    )
    Path(path).write_text(text)
