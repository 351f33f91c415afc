"""Tables of pooled figures: methods down, benchmarks and budgets across."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from twig_jax.evaluation.report.pooled import Pooled

# Title, how to read it, a row's figure, its format.
_METRICS: tuple[tuple[str, str, Callable[[Pooled], float | None], str], ...] = (
    (
        "RelAcc %",
        "Score over plain decoding's, by visual tokens a layer sees (R̄).",
        lambda row: None if row.relacc is None else 100 * row.relacc,
        ".1f",
    ),
    (
        "RelSpd",
        "New tokens/s, prefill included, over plain decoding's right beside it; means of samples.",
        lambda row: row.relspd,
        ".2f",
    ),
    (
        "TokAR %",
        "Drafted tokens that the base accepted.",
        lambda row: None if row.tokar is None else 100 * row.tokar,
        ".1f",
    ),
    (
        "Accepted length",
        "Drafts accepted an iteration; the base's own token comes on top.",
        lambda row: row.mean_accepted,
        ".2f",
    ),
    (
        "Time to first token, ms",
        "At batch 1, images and prompt included.",
        lambda row: None if row.first_token_s is None else 1e3 * row.first_token_s,
        ".1f",
    ),
    (
        "Memory, MiB",
        "Parameters, and one row's caches and largest intermediates.",
        lambda row: None if row.memory_bytes is None else row.memory_bytes / 2**20,
        ".1f",
    ),
)


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names what a line is of."""

    title: str
    says: str
    headers: list[str]
    lines: list[list[str]]

    def markdown(self) -> str:
        """With its title and what it says."""
        rows = [self.headers, ["---"] + ["---:"] * (len(self.headers) - 1), *self.lines]
        body = "\n".join("| " + " | ".join(row) + " |" for row in rows)
        return f"## {self.title}\n\n{self.says}\n\n{body}\n"


def tables(rows: Sequence[Pooled]) -> list[Table]:
    """A table a figure, over all benchmarks, and one a benchmark; figures nobody has are left out.

    A method's mean over benchmarks stands where it has a figure of each that anybody has one of.
    """
    return [
        _across(rows, *metric) for metric in _METRICS if any(metric[2](r) is not None for r in rows)
    ] + [_scores(task, [r for r in rows if r.task == task]) for task in _unique(rows, "task")]


def _across(
    rows: Sequence[Pooled],
    title: str,
    says: str,
    value: Callable[[Pooled], float | None],
    form: str,
) -> Table:
    found = {(r.method, r.task, r.way.avg_retained): x for r in rows if (x := value(r)) is not None}
    methods = [m for m in _unique(rows, "method") if any(m == key[0] for key in found)]
    tasks = [t for t in _unique(rows, "task") if any(t == key[1] for key in found)]
    budgets = sorted({key[2] for key in found}, key=lambda b: -(b or float("inf")))
    columns = {
        (task, budget): [found.get((m, task, budget)) for m in methods]
        for task in tasks
        for budget in budgets
    }
    if len(tasks) > 1:
        for budget in budgets:
            of_tasks = zip(*(columns[task, budget] for task in tasks), strict=True)
            columns["mean", budget] = [_mean(values) for values in of_tasks]
    lines = [
        [method, *("" if x is None else format(x, form) for x in line)]
        for method, *line in zip(methods, *columns.values(), strict=True)
    ]
    headers = ["method", *(f"{task} {_budget(budget)}" for task, budget in columns)]
    return Table(title, says, headers, lines)


def _scores(task: str, rows: Sequence[Pooled]) -> Table:
    """Everything about a benchmark's accuracy."""
    headers = ["method", "R̄", "kept", "score", "RelAcc %", "95 % interval", "sd over folders"]
    headers += ["folders", "questions", "unanswered"]
    lines = []
    for row in rows:
        main = next(iter(row.figures.items()), None)
        low, high = row.relacc_low, row.relacc_high
        lines.append(
            [
                row.method,
                _budget(row.way.avg_retained).removeprefix("R̄ "),
                str(row.retained),
                "" if main is None else f"{main[0]} {main[1]:.1f}",
                _percent(row.relacc),
                "" if low is None or high is None else f"{_percent(low)} to {_percent(high)}",
                _percent(row.relacc_sd, 2),
                str(row.folders),
                str(row.samples),
                str(row.unanswered),
            ]
        )
    says = (
        "The interval is a paired bootstrap over the images of all folders, whose questions are "
        "drawn together; there is none where the score is not the mean of what they add. "
        "Kept is the most visual tokens that went on through the deep layers."
    )
    return Table(f"Scores: {task}", says, headers, lines)


def long_form(rows: Sequence[Pooled]) -> str:
    """CSV, one line a row, all its figures but lists; the score is the benchmark's first figure."""
    text = io.StringIO()
    lines = []
    for row in rows:
        line = {k: v for k, v in row.as_json().items() if k not in ("figures", "timings")}
        name, value = next(iter(row.figures.items()), (None, None))
        lines.append({**line, "figure": name, "score": value})
    writer = csv.DictWriter(text, lines[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _unique(rows: Sequence[Pooled], name: str) -> list[str]:
    return list(dict.fromkeys(getattr(row, name) for row in rows))


def _mean(values: Sequence[float | None]) -> float | None:
    there = [v for v in values if v is not None]
    return float(np.mean(there)) if len(there) == len(values) else None


def _budget(budget: float | None) -> str:
    return "all" if budget is None else f"R̄ {budget:g}"


def _percent(x: float | None, digits: int = 1) -> str:
    return "" if x is None else f"{100 * x:.{digits}f}"
