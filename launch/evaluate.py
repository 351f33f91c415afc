"""Scores a model on a benchmark: what is lost and what is gained, by the twig and its rivals.

python -m launch.evaluate --task digits --limit 64 --out runs/evaluation
python -m launch.evaluate --task textvqa --data playground/data/eval/textvqa \\
    --checkpoint llava-hf/llava-1.5-7b-hf --twig models/twig --avg_retained 192,128,64 \\
    --selector twig,fastv,visionzip --modes plain,ttp --out runs/evaluation

Each run has a folder OUT/TASK/RUN with answers.jsonl, as LLaVA's scripts write it, and where an
official judge wants another file, that. OUT/TASK/results.json has the figures, also those of
earlier calls with the same settings. Runs go on where they were stopped.
"""

import json
import sys
from pathlib import Path
from typing import Any

from absl import app, flags

from launch import numbers, run, stop_at_sigterm
from launch.output import aligned, check_writable, write_json
from twig_jax.config import DTYPES, MODES

_TASK = flags.DEFINE_string("task", None, "a benchmark; --task help lists them")
_DATA = flags.DEFINE_string("data", "", "its folder, as LLaVA's evaluation guide lays it out")
_LIMIT = flags.DEFINE_integer("limit", None, "only the first so many questions", lower_bound=1)
_TRAINED_ON = flags.DEFINE_string(
    "trained_on", None, "training data, as data.source of launch.train: none of it may be asked"
)
_TRAINED_IMAGES = flags.DEFINE_string("trained_images", None, "its image folder; else beside it")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "digits", "folder or hub id of a base, or digits")
_TWIG = flags.DEFINE_string("twig", None, "folder or hub id of its twig")
_DTYPE = flags.DEFINE_enum("dtype", None, DTYPES, "default float32 on CPUs, bfloat16 elsewhere")
_CONVENTIONS = flags.DEFINE_enum(
    "conventions", None, ["llava"], "read text and images as LLaVA does, whatever the folder says"
)
_TEMPLATE = flags.DEFINE_string("template", None, "conversation template other than the base's own")
_MODES = flags.DEFINE_list("modes", ["plain", "ttp"], f"of {', '.join(MODES)}")
_SELECTOR = flags.DEFINE_list("selector", ["twig"], "what prunes; --selector help lists them")
_RETAINED = flags.DEFINE_list(
    "avg_retained", [], "visual tokens a layer sees; default a third, two ninths and one ninth"
)
_MAX_NEW = flags.DEFINE_integer(
    "max_new_tokens", None, "of an answer; default the benchmark's own", lower_bound=1
)
_GAMMA = flags.DEFINE_integer("gamma", 5, "tokens ahead that are drafted at most")
_THETA = flags.DEFINE_float("theta", 0.6, "drafting stops after a token less probable than this")
_CHILDREN = flags.DEFINE_integer("children", 1, "drafts tried after each; 1 is a chain")
_EXPANDED = flags.DEFINE_integer("expanded", 1, "drafts of a level that have children")
_NODES = flags.DEFINE_integer("nodes", 0, "most drafts an iteration; 0 for all of the tree")
_TIMED = flags.DEFINE_integer(
    "timed_samples", 12, "questions for speed, one at a time; 0 measures none", lower_bound=0
)
_REPEATS = flags.DEFINE_integer("repeats", 3, "interleaved timings of each", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "of the digits pages")
_BATCH = flags.DEFINE_integer("batch", 16, "questions answered at once", lower_bound=1)
_SHARE = flags.DEFINE_string("share", "0/1", "i/n: this process answers every n-th question")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "shares over the processes of a cluster")
_OUT = flags.DEFINE_string("out", "runs/evaluation", "where answers and figures go")
_JSON = flags.DEFINE_string("json", None, "write the figures here too; - is standard output")


def main(argv: list[str]) -> None:
    if len(argv) > 1 or not _TASK.value:
        raise app.UsageError("give --task, and flags alone")
    try:
        evaluate()
    except (ImportError, MemoryError, OSError, ValueError) as error:
        sys.exit(f"evaluate: {error}")


def evaluate() -> None:
    """Answers, scores, times, prints and writes."""
    from twig_jax.evaluation.benchmarks import BENCHMARKS, open_benchmark
    from twig_jax.evaluation.pruners import PRUNERS

    task = _TASK.value or ""
    for flag, asked, known in (
        (_TASK.name, [task], BENCHMARKS),
        (_SELECTOR.name, _SELECTOR.value, PRUNERS),
        (_MODES.name, _MODES.value, MODES),
    ):
        for name in asked:
            if name not in known:
                raise ValueError(f"no --{flag} {name}; there are: {', '.join(known)}")
    if task != "digits" and not _DATA.value:
        raise ValueError(f"--task {task} needs --data, the folder that its questions lie in")
    asked_budgets = _RETAINED.value and numbers(_RETAINED.name, _RETAINED.value)
    check_writable(_JSON.value)
    share = _share()
    benchmark = open_benchmark(task, Path(_DATA.value), _LIMIT.value, _SEED.value)
    questions = benchmark.questions()[: _LIMIT.value]
    check_files(benchmark)
    if _TRAINED_ON.value is not None:
        check_held_out(questions)

    from twig_jax import api
    from twig_jax.decoding.settings import Settings
    from twig_jax.evaluation.answers import failure
    from twig_jax.evaluation.benchmarks.files import write_upload
    from twig_jax.evaluation.judge import Judge, said, ways
    from twig_jax.evaluation.validation import BUDGETS
    from twig_jax.runtime import environment, use_compilation_cache

    use_compilation_cache()
    model = api.load(
        _CHECKPOINT.value,
        _TWIG.value,
        _DTYPE.value,
        conventions=_CONVENTIONS.value,
        template=_TEMPLATE.value,
    )
    tokens = model.config.vision.num_tokens
    budgets = asked_budgets or [round(part * tokens) for part in BUDGETS]
    settings = _settings() | {"dtype": model.generator.weights.dtype.name}
    judge = Judge(
        model,
        task,
        benchmark,
        questions,
        Path(_OUT.value) / task,
        Settings(
            max_new_tokens=_MAX_NEW.value or benchmark.max_new_tokens,
            gamma=_GAMMA.value,
            theta=_THETA.value,
            children=_CHILDREN.value,
            expanded=_EXPANDED.value,
            nodes=_NODES.value,
        ),
        batch=_BATCH.value,
        model_id=Path(_CHECKPOINT.value).name,
        notes=settings,
        limited=_LIMIT.value is not None,
    )
    chosen = ways(_MODES.value, _SELECTOR.value, budgets)
    for way in chosen:
        judge.check(way)
    for way in chosen:
        _answer(judge, way, share)
    # Whoever is last finds all there is to judge, and judges it.
    screen = sys.stderr if _JSON.value == "-" else sys.stdout
    done = {way: len(judge.answered(way)) for way in chosen}
    waiting = {way: count for way, count in done.items() if count < len(questions)}
    for way, count in waiting.items():
        print(
            f"{way.name}: {count} of {len(questions)} answered, the rest by other processes",
            file=screen,
        )
    if waiting:
        return
    about = {
        "schema": 1,
        **environment(),
        "settings": settings | {"limit": _LIMIT.value, "weights": judge.weights},
    }
    earlier = _earlier(judge, about)
    found: dict[Any, dict[str, Any]] = {}
    base = None
    failures: dict[str, None] = {}
    # One at a time: the answers of all may be too many to hold.
    for way in sorted(dict.fromkeys([*earlier, *chosen]), key=lambda way: MODES.index(way.mode)):
        lines = judge.answered(way)
        for key, line in lines.items():
            if (error := failure(line)) is not None:
                failures[f"question {key.id} cannot be asked: {error}"] = None
        found[way], score = judge.row(way, lines, base)
        base = score if way.mode == "plain" else base
        upload = benchmark.upload(said(lines))
        if upload is not None:
            path = write_upload(judge.folder / way.name, *upload)
            print(f"{way.name}: for the official judge: {path}", file=screen)
    if _TIMED.value:
        for way, speed in _speeds(judge, chosen).items():
            found[way] = speed | found[way]
    rows = [earlier.get(way, {}) | row for way, row in found.items()]
    content = about | {"results": rows}
    write_json(str(judge.folder / "results.json"), content)
    write_json(_JSON.value, content)
    print(_table(rows), file=screen)
    for told in [*failures][:10]:
        print(told, file=screen)
    if len(failures) > 10:
        print(f"and {len(failures) - 10} more: {judge.folder}/*/answers.jsonl", file=screen)


def _earlier(judge: Any, about: dict[str, Any]) -> dict[Any, dict[str, Any]]:
    """What the results' file has of ways that were judged before, on this device and so set."""
    from twig_jax.evaluation.judge import Way

    path = judge.folder / "results.json"
    try:
        there = json.loads(path.read_text())
        same = all(there[k] == about[k] for k in ("schema", "device", "versions", "settings"))
        rows = there["results"] if same else []
        found = {Way(r["mode"], r["selector"], r["avg_retained"]): r for r in rows}
    except (OSError, ValueError, KeyError, TypeError):  # none, or another version's
        return {}
    whole = len(judge.questions)
    return {way: row for way, row in found.items() if len(judge.answered(way)) == whole}


def check_files(benchmark: Any) -> None:
    """Raises where what a benchmark is scored and uploaded with is missing, before it is asked."""
    import tempfile

    from twig_jax.evaluation.benchmarks.files import write_upload

    benchmark.score({q.key: "" for q in benchmark.questions()})
    upload = benchmark.upload({})
    if upload is not None:
        with tempfile.TemporaryDirectory() as folder:
            write_upload(Path(folder), *upload)


def check_held_out(questions: list) -> None:
    """Raises ValueError where the model was trained on a question."""
    from twig_jax.data.sources import open_source
    from twig_jax.evaluation.benchmarks.leaks import leaks

    found = leaks(questions, open_source(_TRAINED_ON.value or "", _TRAINED_IMAGES.value))
    if found:
        some = ", ".join(f"{q.id} (sample {name})" for q, name in found[:10])
        raise ValueError(
            f"{len(found)} questions of {_TASK.value} are in {_TRAINED_ON.value}: {some}"
            f"{', ...' if len(found) > 10 else ''}; what was trained on cannot be judged by"
        )


def _share() -> tuple[int, int]:
    """(i, n) of this process."""
    if _DISTRIBUTED.value:
        import jax

        jax.distributed.initialize()
        share = jax.process_index(), jax.process_count()
        # Members of a cluster end together: all of them where one fails, or is minutes late.
        jax.distributed.shutdown()
        stop_at_sigterm()  # which jax would swallow
        return share
    i, _, n = _SHARE.value.partition("/")
    if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise ValueError(f"--share is i/n with i from 0 to n-1, not {_SHARE.value}")
    return int(i), int(n)


def _answer(judge: Any, way: Any, share: tuple[int, int]) -> None:
    """Answers this process' share of the questions."""
    from tqdm import tqdm

    total = len(judge.questions[share[0] :: share[1]])
    with tqdm(total=total, unit="answer", desc=way.name, disable=None) as bar:
        judge.answers(way, share, bar.update)


def _speeds(judge: Any, ways: list) -> dict:
    from tqdm import tqdm

    with tqdm(total=_TIMED.value, desc="timing", disable=None) as bar:
        return judge.speeds(ways, _TIMED.value, _REPEATS.value, bar.update)


def _settings() -> dict[str, Any]:
    """What answers depend on besides the run and dtype; but for rounding, not on the batch."""
    drafting = (_GAMMA, _THETA, _CHILDREN, _EXPANDED, _NODES)
    flags = (_CHECKPOINT, _TWIG, _CONVENTIONS, _TEMPLATE, _MAX_NEW, *drafting, _SEED)
    return {flag.name: flag.value for flag in flags}


def _table(rows: list[dict[str, Any]]) -> str:
    def percent(x: float | None) -> str:
        return "" if x is None or x != x else f"{100 * x:.1f}"

    def number(x: float | None, digits: int = 2) -> str:
        return "" if x is None else f"{x:.{digits}f}"

    headers = ["mode", "selector", "R̄", "kept", "score", "RelAcc %", "95 % interval"]
    headers += ["TokAR %", "accepted", "RelSpd", "first token ms", "unanswered"]
    lines = []
    for row in rows:
        main = next(iter(row.get("figures", {}).items()), None)
        first = row.get("first_token_s")
        ends = [percent(row.get(name)) for name in ("relacc_low", "relacc_high")]
        lines.append(
            [
                row["mode"],
                row["selector"] or "",
                "" if row["avg_retained"] is None else f"{row['avg_retained']:g}",
                str(row["retained"]),
                "" if main is None else f"{main[0]} {main[1]:.1f}",
                percent(row.get("relacc")),
                " - ".join(filter(None, ends)),
                percent(row["tokar"]),
                number(row["mean_accepted"]),
                number(row.get("relspd")),
                number(None if first is None else 1e3 * first, 1),
                str(len(row["unanswered"])),
            ]
        )
    return aligned(headers, lines)


if __name__ == "__main__":
    run(main)
