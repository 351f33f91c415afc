"""The pieces of an HTML page in one file: tables, plots, pictures with their kept patches."""

import base64
import html
import io
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:1080px;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;font-size:14px}td,th{padding:.25rem .6rem;text-align:right}
th{border-bottom:2px solid #444;vertical-align:bottom}
td:first-child,th:first-child{text-align:left;white-space:nowrap}
tr:nth-child(even){background:#f5f6f8}.wide{overflow-x:auto}
.row{display:flex;gap:1.5rem;flex-wrap:wrap;margin:1rem 0 2rem}.card{width:500px}
.small{gap:1rem}.small .card{width:196px;font-size:14px;line-height:1.4}.small p{margin:.35rem 0}
.patches{width:320px;border:1px solid #ccc;display:block}.small .patches{width:100%}
.draft{background:#cfe3f5;border-bottom:2px solid #2166ac}.own{border-bottom:2px solid #d6604d}
h3,.card p{white-space:pre-line;overflow-wrap:anywhere}
.note{color:#666;font-size:14px}svg,img{max-width:100%;height:auto}
"""


def page(title: str, parts: Iterable[str]) -> str:
    """The whole page; `parts` are HTML."""
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>{''.join(parts)}</html>\n"
    )


def heading(text: str) -> str:
    """What a section is about."""
    return f"<h2>{html.escape(text)}</h2>"


def note(text: str) -> str:
    """How to read what follows."""
    return f"<p class=note>{html.escape(text)}</p>"


def table(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table, scrolling sideways where it is too wide."""
    head = "".join(f"<th>{html.escape(h)}</th>" for h in headers)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>"
        for line in lines
    )
    return f"<div class=wide><table><tr>{head}</tr>{body}</table></div>"


def plot(png: bytes, says: str) -> str:
    """A plot; `says` stands for it where it cannot be seen."""
    return f'<p><img src="{_data(png)}" alt="{html.escape(says)}"></p>'


def row(cards: Iterable[str], small: bool = False) -> str:
    """Cards side by side; small ones fit five in a line."""
    found = "".join(f'<div class="card">{card}</div>' for card in cards)
    return f'<div class="row{" small" if small else ""}">{found}</div>'


def picture(name: str, image: np.ndarray) -> str:
    """A square picture for `patches` to show, itself unseen. image: uint8 [S, S, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    crisp = ' style="image-rendering:pixelated"' if len(image) < 200 else ""
    return (
        f'<svg width="0" height="0" style="position:absolute"><symbol id="{name}" '
        f'viewBox="0 0 1 1"><image href="{_data(buffer.getvalue())}" width="1" height="1"{crisp}/>'
        "</symbol></svg>"
    )


def patches(name: str | None, kept: Iterable[int] | None, side: int) -> str:
    """A picture with every patch that was not kept faded, and kept ones framed.

    name: of the picture, None for an empty square. kept: patches of a grid `side` patches wide,
    line by line; None shows the picture as it is.
    """
    shown = f'<use href="#{name}" width="{side}" height="{side}"/>' if name else ""
    if kept is not None:
        squares = "".join(f"M{p % side} {p // side}h1v1h-1z" for p in kept)
        shown += (
            f'<path d="M0 0h{side}v{side}h-{side}z{squares}" fill="#fff" fill-opacity=".78" '
            f'fill-rule="evenodd"/><path d="{squares}" fill="none" stroke="#2166ac" '
            'stroke-width="1.2" vector-effect="non-scaling-stroke"/>'
        )
    says = "the picture" if kept is None else "the picture with the kept patches in full colour"
    return (
        f'<svg class="patches" viewBox="0 0 {side} {side}" role="img" aria-label="{says}">'
        f"{shown}</svg>"
    )


def coloured(words: Sequence[str], accepted: Sequence[bool]) -> str:
    """The answer: accepted drafts on blue, the base's own tokens underlined."""
    return "".join(
        f'<span class="{"draft" if drafted else "own"}">{html.escape(word)}</span>'
        for word, drafted in zip(words, accepted, strict=True)
    )


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
