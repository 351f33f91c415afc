"""The report of evaluations: tables, plots, and a page with all of it and single questions."""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from twig_jax.evaluation.judge import Way
from twig_jax.evaluation.report import drawings, page, runs, samples
from twig_jax.evaluation.report.pooled import Pooled, grid, pool
from twig_jax.evaluation.report.tables import Table, long_form, tables

_DRAWINGS = {
    "accuracy": "RelAcc by budget; upright lines are 95 % intervals of a paired bootstrap over "
    "images, with all questions about each.",
    "speed": "Samples timed one at a time, at each mode's smallest budget; a line joins the means "
    "of samples of similar length.",
    "positions": "Of the drafts at each place in a draft, those that the base accepted. Later "
    "places are reached only where the twig was sure of all before.",
    "kinds": "Of the emitted tokens of each kind, those that were accepted drafts; the base wrote "
    "the others itself.",
}


def make(
    folders: Sequence[Path], data: Mapping[str, Path], count: int
) -> tuple[dict[str, bytes], list[Table], dict[str, Any]]:
    """All files of a report by name, its tables, and the content of report.json.

    folders: see `runs.read`, which names the errors. data: benchmarks' folders, for the images of
    `count` questions. Nothing is written, so that an error leaves nothing behind.
    """
    evaluations = runs.read(folders)
    unknown = set(data) - {e.task for e in evaluations}
    if unknown:
        raise ValueError(f"folders of {', '.join(sorted(unknown))}, of which there are no runs")
    rows = pool(evaluations)
    drawn = tables(rows)
    plots = _plots(rows)
    first = evaluations[0]
    content = {
        "schema": 1,
        "device": ", ".join(dict.fromkeys(e.device for e in evaluations)),
        "versions": first.versions,
        "settings": {k: v for k, v in first.settings.items() if k not in ("seed", "limit")}
        | {"runs": [str(e.folder) for e in evaluations]},
        "results": [row.as_json() for row in rows],
    }
    text = _page(content, drawn, plots, _questions(evaluations, rows, data, count))
    files = {
        "tables.md": "\n".join(table.markdown() for table in drawn).encode(),
        "tables.csv": long_form(rows).encode(),
        "report.json": (json.dumps(content, indent=1) + "\n").encode(),
        "report.html": text.encode(),
        **{f"{name}.png": png for name, png in plots.items()},
    }
    return files, drawn, content


def _plots(rows: Sequence[Pooled]) -> dict[str, bytes]:
    """The plots there is something to draw for, by name."""
    positions, kinds = drawings.acceptance(rows) or (None, None)
    plots = {
        "accuracy": drawings.accuracy(rows),
        "speed": drawings.speed(rows),
        "positions": positions,
        "kinds": kinds,
    }
    for task in dict.fromkeys(row.task for row in rows):
        plots[f"kept-{task}"] = drawings.kept([row for row in rows if row.task == task])
    return {name: png for name, png in plots.items() if png is not None}


def _page(
    content: Mapping[str, Any],
    drawn: Sequence[Table],
    plots: Mapping[str, bytes],
    questions: Sequence[str],
) -> str:
    settings, device = content["settings"], content["device"]
    summary = ", ".join(f"{k} {v}" for k, v in settings.items() if v is not None and k != "runs")
    parts = [f"<p>{html.escape(f'{summary}; on {device}')}</p>"]
    for table in drawn:
        parts += [page.heading(table.title), page.note(table.says)]
        parts.append(page.table(table.headers, table.lines))
    for name, png in plots.items():
        says = _DRAWINGS.get(
            name,
            f"{name.removeprefix('kept-')}: how many of the questions with images kept each patch "
            "of the first one.",
        )
        parts += [page.plot(png, says), page.note(says)]
    tasks = dict.fromkeys(row["task"] for row in content["results"])
    return page.page(f"Evaluation: {', '.join(tasks)}", [*parts, *questions])


def _questions(
    evaluations: Sequence[runs.Evaluation],
    rows: Sequence[Pooled],
    data: Mapping[str, Path],
    count: int,
) -> list[str]:
    """The page's part about single questions; nothing where none is asked for."""
    tasks = dict.fromkeys(row.task for row in rows)
    ways = {task: _compared([row for row in rows if row.task == task]) for task in tasks}
    sides = {row.task: side for row in rows if (side := grid(row.tokens)) is not None}
    shown = samples.choose(evaluations, ways, data, count)
    if not shown:
        return []
    parts = [
        page.heading("What was kept, and who wrote the answer"),
        page.note(
            "Questions on which methods differ come first, so this is no fair sample. Each method "
            "at its smallest budget. Patches in full colour went on through the deep layers; faded "
            "ones were pruned. Images are shown as LLaVA-1.5 sees them, padded to a square. Words "
            "on blue were drafted by the twig and accepted by the base; it wrote the underlined "
            "others itself."
        ),
    ]
    unseen = sorted({one.task for one in shown} - {"digits", *data})
    if unseen:
        parts.append(page.note(f"No images of {', '.join(unseen)}: its folder was not given."))
    return parts + [
        samples.cards(f"sample{i}", one, sides.get(one.task)) for i, one in enumerate(shown)
    ]


def _compared(rows: Sequence[Pooled]) -> list[Way]:
    """plain and ssd, then each selector at its smallest budget, with drafts where it has some."""
    found: dict[str | None, Way] = {}
    for row in drawings.sharpest(rows):
        key = row.way.selector or row.way.mode
        if key not in found or row.way.mode == "ttp_ssd":
            found[key] = row.way
    return sorted(found.values(), key=lambda way: way.selector is not None)


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes the files of a report."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
