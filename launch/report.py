"""Tables, plots and a page of what launch.evaluate measured; folders of one task are pooled.

python -m launch.report --runs runs/evaluation --out runs/report
python -m launch.report --runs runs/evaluation/seed0,runs/evaluation/seed1 --out runs/report
python -m launch.report --runs runs/evaluation --data textvqa=playground/data/eval/textvqa
"""

import sys
from pathlib import Path

from absl import app, flags

from launch import run
from launch.output import aligned, write_json

_RUNS = flags.DEFINE_list("runs", [], "folders that launch.evaluate was given as --out")
_DATA = flags.DEFINE_list(
    "data", [], "TASK=FOLDER of benchmarks, for the images of their questions"
)
_SHOWN = flags.DEFINE_integer("samples_shown", 12, "questions on the page", lower_bound=0)
_OUT = flags.DEFINE_string("out", "runs/report", "where the report goes")
_JSON = flags.DEFINE_string("json", None, "write the figures here too; - is standard output")


def main(argv: list[str]) -> None:
    if len(argv) > 1 or not _RUNS.value:
        raise app.UsageError("give --runs, and flags alone")
    try:
        report()
    except (OSError, ValueError) as error:
        sys.exit(f"report: {error}")


def report() -> None:
    """Reads, draws, prints and writes."""
    pairs = [item.partition("=") for item in _DATA.value]
    for task, _, folder in pairs:
        if not folder:
            raise ValueError(f"--data takes TASK=FOLDER, not {task}")
    data = {task: Path(folder) for task, _, folder in pairs}
    folders = [Path(folder) for folder in _RUNS.value]

    from twig_jax.evaluation.report import evaluation

    files, tables, content = evaluation.make(folders, data, _SHOWN.value)
    evaluation.write(Path(_OUT.value), files)
    write_json(_JSON.value, content)
    screen = sys.stderr if _JSON.value == "-" else sys.stdout
    for table in tables:
        print(f"{table.title}\n{aligned(table.headers, table.lines)}\n", file=screen)
    print(f"report: {Path(_OUT.value) / 'report.html'}", file=screen)


if __name__ == "__main__":
    run(main)
