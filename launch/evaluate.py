"""Scores a model on a benchmark: what is lost, for the twig and for its rivals.

python -m launch.evaluate --task digits --limit 64 --out runs/evaluation
python -m launch.evaluate --task textvqa --data playground/data/eval/textvqa \\
    --checkpoint llava-hf/llava-1.5-7b-hf --twig models/twig --avg_retained 192,128,64 \\
    --selector twig,fastv,visionzip --modes plain,ttp --out runs/evaluation

Each run has a folder OUT/TASK/RUN with answers.jsonl, as LLaVA's scripts write it, and where an
official judge wants another file, that. OUT/TASK/results.json has the figures. Runs go on where
they were stopped.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from absl import app, flags

from launch import run
from launch.output import aligned, write_json
from twig_jax.config import MODES

_TASK = flags.DEFINE_string("task", None, "a benchmark; --task help lists them")
_DATA = flags.DEFINE_string("data", "", "its folder, as LLaVA's evaluation guide lays it out")
_LIMIT = flags.DEFINE_integer("limit", None, "only the first so many questions", lower_bound=1)
_TRAINED_ON = flags.DEFINE_string(
    "trained_on", None, "training data, as data.source of launch.train: none of it may be asked"
)
_TRAINED_IMAGES = flags.DEFINE_string("trained_images", None, "its image folder; else beside it")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "digits", "folder or hub id of a base, or digits")
_TWIG = flags.DEFINE_string("twig", None, "folder or hub id of its twig")
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16", "float16"], "default float32 on CPUs, bfloat16 elsewhere"
)
_TEMPLATE = flags.DEFINE_string("template", None, "conversation template other than the base's own")
_MODES = flags.DEFINE_list("modes", ["plain", "ttp"], f"of {', '.join(MODES)}")
_SELECTOR = flags.DEFINE_list("selector", ["twig"], "what prunes; --selector help lists them")
_RETAINED = flags.DEFINE_list(
    "avg_retained", [], "visual tokens a layer sees; default a third, two ninths and one ninth"
)
_MAX_NEW = flags.DEFINE_integer("max_new_tokens", None, "default the benchmark's own")
_GAMMA = flags.DEFINE_integer("gamma", 5, "most drafts an iteration")
_THETA = flags.DEFINE_float("theta", 0.6, "drafting stops after a token less probable than this")
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
    """Answers, scores, prints and writes."""
    from twig_jax.evaluation.benchmarks import BENCHMARKS
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
    share = _share()
    benchmark = BENCHMARKS[task](Path(_DATA.value))
    questions = benchmark.questions()[: _LIMIT.value]
    if _TRAINED_ON.value is not None:
        check_held_out(questions)

    from twig_jax import api
    from twig_jax.evaluation.benchmarks.files import write_upload
    from twig_jax.runtime import environment, use_compilation_cache

    use_compilation_cache()
    model = api.load(_CHECKPOINT.value, _TWIG.value, _DTYPE.value, template=_TEMPLATE.value)
    folder = Path(_OUT.value) / task
    rows: list[dict[str, Any]] = []
    base = None
    for mode, selector, budget in _runs(model):
        name = mode if selector is None else f"{mode}-{selector}-{budget:g}"
        lines = _answers(
            model, benchmark, questions, folder / name, (mode, selector, budget), share
        )
        if len(lines) < len(questions):
            print(f"{name}: {len(lines)} of {len(questions)} answered, the rest by other processes")
            continue
        row, score = _row(benchmark, questions, lines, base, mode, selector, budget)
        base = score if mode == "plain" else base
        rows.append(row)
        upload = benchmark.upload(_said(lines))
        if upload is not None:
            print(f"{name}: for the official judge: {write_upload(folder / name, *upload)}")
    if rows:
        content = {
            "schema": 1,
            **environment(),
            "settings": _settings() | {"limit": _LIMIT.value},
            "results": rows,
        }
        write_json(str(folder / "results.json"), content)
        write_json(_JSON.value, content)
        print(_table(rows), file=sys.stderr if _JSON.value == "-" else sys.stdout)


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
        return jax.process_index(), jax.process_count()
    i, _, n = _SHARE.value.partition("/")
    if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise ValueError(f"--share is i/n with i from 0 to n-1, not {_SHARE.value}")
    return int(i), int(n)


def _runs(model: Any) -> list[tuple[str, str | None, float | None]]:
    """(mode, selector, budget) of every run, plain decoding first: RelAcc is relative to it."""
    from twig_jax.evaluation.validation import BUDGETS

    M = model.config.vision.num_tokens
    budgets = [float(b) for b in _RETAINED.value] or [round(share * M) for share in BUDGETS]
    runs: list[tuple[str, str | None, float | None]] = []
    for mode in sorted(_MODES.value, key=lambda m: m != "plain"):
        if mode in ("ttp", "ttp_ssd"):
            runs += [(mode, s, b) for s in _SELECTOR.value for b in budgets]
        else:
            runs.append((mode, None, None))
    return runs


def _answers(
    model: Any, benchmark: Any, questions: list, folder: Path, run: tuple, share: tuple[int, int]
) -> dict:
    """The lines of a run, after this process' share of them."""
    from tqdm import tqdm

    from twig_jax.decoding.settings import Settings
    from twig_jax.evaluation.answers import answer_share
    from twig_jax.evaluation.pruners.answering import Rival

    mode, selector, budget = run
    settings = Settings(
        mode=mode,
        avg_retained=budget,
        max_new_tokens=_MAX_NEW.value or benchmark.max_new_tokens,
        gamma=_GAMMA.value,
        theta=_THETA.value,
    )
    many = (
        model.generator.generate_many
        if selector is None
        else Rival(model.generator, selector).answer
    )

    def ask(question: Any) -> Any:
        request = model.request(question.prompt, question.images)
        model.generator.prepare([request], replace(settings, mode="plain"))
        return request

    total = len(questions[share[0] :: share[1]])
    with tqdm(total=total, unit="answer", desc=folder.name, disable=not sys.stderr.isatty()) as bar:
        return answer_share(
            folder,
            questions,
            share,
            ask,
            lambda requests, told: many(requests, settings, _BATCH.value, told),
            batch=_BATCH.value,
            model_id=Path(_CHECKPOINT.value).name,
            settings={"mode": mode, "selector": selector, "avg_retained": budget, **_settings()},
            told=bar.update,
        )


def _said(lines: dict) -> dict:
    from twig_jax.evaluation.answers import failed
    from twig_jax.evaluation.benchmarks.files import texts

    return texts({key: line for key, line in lines.items() if not failed(line)})


def _row(
    benchmark: Any,
    questions: list,
    lines: dict,
    base: Any,
    mode: str,
    selector: str | None,
    budget: float | None,
) -> tuple[dict[str, Any], Any]:
    """A line of the results, and the score."""
    from twig_jax.evaluation.benchmarks.files import mean
    from twig_jax.evaluation.scoring import relacc

    found = [json.loads(lines[q.key])["metadata"] for q in questions]
    answered = [m for m in found if "error" not in m]
    drafted = sum(sum(m["drafted"]) for m in answered)
    matched = sum(sum(m["matched"]) for m in answered)
    rounds = sum(len(m["matched"]) for m in answered)
    row: dict[str, Any] = {
        "task": _TASK.value,
        "mode": mode,
        "selector": selector,
        "avg_retained": budget,
        "retained": max((len(m["kept"]) for m in answered), default=0),
        "samples": len(questions),
        "unanswered": [q.key.id for q, m in zip(questions, found, strict=True) if "error" in m],
        "tokar": matched / drafted if drafted else None,
        "mean_drafted": drafted / rounds if drafted else None,
        "mean_accepted": matched / rounds if drafted else None,
    }
    score = benchmark.score(_said(lines))
    if score is not None:
        keys = [q.key for q in questions if q.key in score.points]
        if _LIMIT.value is not None:
            score = replace(score, figures={"accuracy": mean(score.points[k] for k in keys)})
        row["figures"] = score.figures
        if base is not None or mode == "plain":
            of = base or score
            main = next(iter(score.figures))
            points = [[s.points[k] for k in keys] for s in (score, of)]
            _, low, high = relacc(points[0], points[1])
            ratio = score.figures[main] / of.figures[main] if of.figures[main] else None
            row |= {"relacc": ratio, "relacc_low": low, "relacc_high": high}
    return row, score


def _settings() -> dict[str, Any]:
    """What answers depend on besides the run; but for rounding, not on the batch."""
    flags = (_CHECKPOINT, _TWIG, _DTYPE, _TEMPLATE, _MAX_NEW, _GAMMA, _THETA)
    return {flag.name: flag.value for flag in flags}


def _table(rows: list[dict[str, Any]]) -> str:
    def percent(x: float | None) -> str:
        return "" if x is None or x != x else f"{100 * x:.1f}"

    headers = ["mode", "selector", "R̄", "kept", "score", "RelAcc %", "95 % interval"]
    headers += ["TokAR %", "accepted", "unanswered"]
    lines = []
    for row in rows:
        main = next(iter(row.get("figures", {}).items()), None)
        lines.append(
            [
                row["mode"],
                row["selector"] or "",
                "" if row["avg_retained"] is None else f"{row['avg_retained']:g}",
                str(row["retained"]),
                "" if main is None else f"{main[0]} {main[1]:.1f}",
                percent(row.get("relacc")),
                f"{percent(row.get('relacc_low'))} - {percent(row.get('relacc_high'))}",
                percent(row["tokar"]),
                "" if row["mean_accepted"] is None else f"{row['mean_accepted']:.2f}",
                str(len(row["unanswered"])),
            ]
        )
    return aligned(headers, lines)


if __name__ == "__main__":
    run(main)
