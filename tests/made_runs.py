"""Folders as launch.evaluate leaves them, made by hand: no model runs."""

import json

from twig_jax.evaluation.benchmarks.files import Key, answer_line
from twig_jax.evaluation.benchmarks.pages import Digits
from twig_jax.evaluation.judge import Way

PLAIN, SSD = Way("plain"), Way("ssd")
TWIG, RANDOM = Way("ttp_ssd", "twig", 16.0), Way("ttp_ssd", "random", 16.0)
TOKENS = 144
# Six tokens in three iterations: three drafts, two accepted; two drafts, one accepted; no draft.
METADATA = {
    "pieces": [" three", "ty", " is", " 30", ",", " odd"],
    "accepted": [1, 1, 0, 1, 0, 0],
    "drafted": [3, 2, 0],
    "matched": [2, 1, 0],
    "stopped_by": "eos",
}
DRAFTLESS = {"accepted": [0] * 6, "drafted": [0] * 7, "matched": [0] * 7}
TIMINGS = [[7, 200.0, 7, 100.0], [3, 90.0, 3, 60.0]]


def evaluation(
    folder, points, *, seed=0, task="digits", kept=(0, 13), figures=None, timings=TIMINGS, **also
):
    """Writes FOLDER/TASK: `points` of each way's questions; answers say how much they are worth."""
    count = len(next(iter(points.values())))
    asked = Digits(count, seed).questions()
    rows = []
    for way, values in points.items():
        exact = sum(values) / count
        main = {"accuracy": 100 * exact} if figures is None else {"total": figures[way]}
        base = sum(points[PLAIN]) / count if figures is None else figures[PLAIN]
        top = exact if figures is None else figures[way]
        row = {
            "task": task,
            "mode": way.mode,
            "selector": way.selector,
            "avg_retained": way.avg_retained,
            "pruned": 0.0 if way.selector is None else 1 - way.avg_retained / TOKENS,
            "retained": TOKENS if way.selector is None else len(kept),
            "samples": count,
            "unanswered": [],
            "exact": exact,
            "figures": main,
            "relacc": top / base,
        }
        if timings is not None:
            row |= {"timed_samples": len(timings), "timings": timings}
            row |= {"first_token_s": len(timings) / 8, "memory_bytes": len(timings) << 20}
        rows.append(row)
        path = folder / task / way.name
        path.mkdir(parents=True)
        told = METADATA | {"retained": rows[-1]["retained"]}
        if way.selector is not None:
            told |= {"kept": list(kept)}
        if way.mode in ("plain", "ttp"):
            told |= DRAFTLESS
        lines = [
            answer_line(q, f"worth {v} <b>", "digits", told)
            for q, v in zip(asked, values, strict=True)
        ]
        (path / "answers.jsonl").write_text("".join(line + "\n" for line in lines))
        worth = [[v, q.group] for q, v in zip(asked, values, strict=True)]
        (path / "points.json").write_text(json.dumps(worth))
    content = {
        "schema": 1,
        "device": "1 x cpu",
        "versions": {"jax": "0"},
        "settings": {"checkpoint": "digits", "twig": None, "seed": seed, "limit": count},
        "results": rows,
    }
    (folder / task / "results.json").write_text(json.dumps(content | also))
    return folder


def key(index, seed=0):
    """Of a question."""
    question = Digits(1, seed, index).questions()[0]
    return Key(str(question.id), question.stated)
