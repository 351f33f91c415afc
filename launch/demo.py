"""The same answers, sooner: pruning and speculation on pages of handwritten digits.

python -m launch.demo                                  # compare modes, write demo.html
python -m launch.demo --image page.png --prompt "What digit is in row B, column 3?"
python -m launch.demo --grow                           # grow the twig again from the base
"""

import sys
import time

from absl import app, flags
from tqdm import tqdm

from launch import numbers, run
from launch.output import aligned, check_writable, write_json
from twig_jax.evaluation.compare import Run

_IMAGE = flags.DEFINE_string("image", None, "answer one question about this image file")
_PROMPT = flags.DEFINE_string("prompt", None, "the question about --image")
_MODE = flags.DEFINE_string("mode", "ttp_ssd", "how --image is answered")
_GROW = flags.DEFINE_bool("grow", False, "grow the twig again from the shipped base")
_GROW_STEPS = flags.DEFINE_integer("grow_steps", 200, "training steps of --grow", lower_bound=1)
_OUT = flags.DEFINE_string("out", "runs/demo_twig", "where --grow keeps its checkpoints")
_SAMPLES = flags.DEFINE_integer("samples", 64, "test pages for accuracy", lower_bound=1)
_TIMED = flags.DEFINE_integer("timed_samples", 12, "test pages for speed", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 3, "interleaved timings of each", lower_bound=1)
_GAMMA = flags.DEFINE_integer("gamma", 40, "most drafts an iteration", lower_bound=1)
_THETA = flags.DEFINE_float("theta", 0.3, "drafting stops after a token less probable than this")
_BATCH = flags.DEFINE_integer("batch", 32, "batch size of the accuracy runs", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "seed of the test pages")
_PRUNED = flags.DEFINE_list(
    "pruned", ["0.667", "0.778", "0.889"], "shares of the visual tokens to prune"
)
_HTML = flags.DEFINE_string("html", "demo.html", "where the report goes")
_JSON = flags.DEFINE_string("json", None, "write results here; - is standard output")

RIVALS = ("random", "base_K", "oracle")
MAX_NEW = 64


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    from twig_jax.runtime import use_compilation_cache

    use_compilation_cache()
    try:
        if _GROW.value:
            grow()
        elif _IMAGE.value is not None:
            answer_one()
        else:
            compare()
    except (ImportError, MemoryError, OSError, ValueError) as error:
        sys.exit(f"demo: {error}")


def say(text: str = "") -> None:
    """Prints for people; standard output stays clean where it carries JSON."""
    file = sys.stderr if _JSON.value == "-" else sys.stdout
    tqdm.write(text, file)  # above the progress bar
    file.flush()


def answer_one() -> None:
    """Answers --prompt about --image."""
    from twig_jax import api
    from twig_jax.decoding.settings import Settings

    if not _PROMPT.value:
        raise app.UsageError("--image needs a --prompt")
    budgets = numbers(_PRUNED.name, _PRUNED.value, below=1)
    model = api.load()
    settings = Settings(
        mode=_MODE.value,
        avg_retained=round(model.config.vision.num_tokens * (1 - budgets[-1])),
        gamma=_GAMMA.value,
        theta=_THETA.value,
        max_new_tokens=MAX_NEW,
    )
    result = model.generate(_PROMPT.value, [_IMAGE.value], settings)
    say(result.text or "")
    write_json(
        _JSON.value,
        {
            "prompt": _PROMPT.value,
            "text": result.text,
            "ids": result.tokens.tolist(),
            "drafted": sum(len(d) for d in result.drafts),
            "accepted": int(result.matched.sum()),
            "kept": result.kept.tolist(),
        },
    )


def grow() -> None:
    """Grows the twig again from the shipped base, showing loss and TokAR."""
    import dataclasses

    from configs.digits_twig import get_config
    from launch.training import train
    from twig_jax.data.digits import ASSETS

    steps = _GROW_STEPS.value
    config = dataclasses.replace(
        get_config(),
        base=str(ASSETS / "base"),
        steps=steps,
        save_every=max(1, steps // 4),
        validation_samples=32,
        out=_OUT.value,
    )
    train(config, export=f"{_OUT.value}/twig", say=say)


def compare() -> None:
    """All modes, budgets and selectors; prints tables, writes the report and --json."""
    import numpy as np

    from twig_jax import api
    from twig_jax.data import digits, questions
    from twig_jax.decoding.settings import Settings
    from twig_jax.evaluation import compare as c
    from twig_jax.evaluation import tasks
    from twig_jax.evaluation.report import demo as report
    from twig_jax.evaluation.report.page import table
    from twig_jax.runtime import environment

    began = time.perf_counter()
    if _PROMPT.value is not None:
        raise app.UsageError("--prompt needs an --image")
    budgets = numbers(_PRUNED.name, _PRUNED.value, below=1)
    check_writable(_HTML.value, _JSON.value)
    model = api.load()
    config, tokenizer = model.config, model.tokenizer
    common = Settings(
        gamma=_GAMMA.value, theta=_THETA.value, max_new_tokens=MAX_NEW, avg_retained=1.0
    )
    samples = tasks.load_samples(tokenizer, config, _SAMPLES.value, seed=_SEED.value)
    long_ones = tasks.load_samples(
        tokenizer, config, -(-_TIMED.value // 2), seed=_SEED.value, start=10**6, task="long"
    )
    short_ones = tasks.load_samples(
        tokenizer, config, _TIMED.value // 2, seed=_SEED.value, start=10**6, task="short"
    )
    accuracy_runs = [Run("plain")] + [
        Run("ttp_ssd", pruned, selector) for pruned in budgets for selector in ("twig", *RIVALS)
    ]
    speed_runs = [Run("ssd")] + [Run(m, p) for m in ("ttp", "ttp_ssd") for p in budgets]
    say(
        f"{len(samples)} unseen test pages for accuracy (batch {_BATCH.value}), "
        f"{_TIMED.value} for speed (batch 1, {_REPEATS.value} interleaved timings each)"
    )
    total = len(accuracy_runs) * len(samples) + _TIMED.value
    with tqdm(total=total, unit="answer", disable=None) as bar:

        def progress(what: str) -> None:
            bar.set_description(what)
            bar.update()

        timings = c.timed(
            model,
            long_ones + short_ones,
            speed_runs,
            common,
            repeats=_REPEATS.value,
            progress=progress,
        )
        accuracy = c.accuracy_rows(
            model, samples, accuracy_runs, common, batch=_BATCH.value, progress=progress
        )
    blank = tasks.load_samples(tokenizer, config, _SAMPLES.value, seed=_SEED.value, blank=True)
    blank_exact = c.blank_exact(model, blank, common, batch=_BATCH.value)
    speed = c.speed_rows(model, long_ones + short_ones, timings)

    accuracy_table = _accuracy_table(accuracy)
    speed_table = _speed_table(speed)
    for headers, lines in (accuracy_table, speed_table):
        say()
        say(aligned(headers, lines))

    say()
    say(
        "RelAcc: accuracy over the unpruned base's, with its 95 % interval. RelSpd: tokens/s,\n"
        "prefill included, over plain decoding's right beside it. ceiling: RelSpd of decoding if\n"
        "a pass cost the same whatever its width. Compilation is not in any figure."
    )
    say(f"With the pages blanked, the base gets {_percent(blank_exact)} % of its answers right.")
    ssd = timings[Run("ssd")]
    checks = [("ssd = plain", c.unequal(ssd.results, ssd.plain_results))]
    for pruned in budgets:
        fast, slow = timings[Run("ttp_ssd", pruned)], timings[Run("ttp", pruned)]
        checks.append((f"ttp_ssd = ttp at {pruned:.1%}", c.unequal(fast.results, slow.results)))
    for name, wrong in checks:
        say(f"check, token for token: {name}: {'equal' if not wrong else f'DIFFERENT in {wrong}'}")

    # Two questions about one page, each with its own selection.
    pairs = []
    sharp = Run("ttp_ssd", budgets[-1]).settings(model, common)
    for index in range(2):
        page = digits.page("test", _SEED.value, 2 * 10**6 + index)
        rng = digits.generator("test", _SEED.value, 2 * 10**6 + index, 1)
        pair = []
        for question in questions.questions(page, rng, 2, {"describe": 1.0}):
            request = model.request(question.text, [page.image])
            result = model.generator.generate([request], sharp)[0]
            words = [tokenizer.decode([int(t)]) for t in result.tokens]
            first = int(np.argmax(request.is_visual))
            pair.append(report.Shown(page.image, question.text, words, result, first))
        pairs.append(pair)
    seconds = time.perf_counter() - began
    summary = (
        f"{len(samples)} unseen pages, base of {config.text.num_layers} layers, "
        f"{config.vision.num_tokens} visual tokens, on {environment()['device']}; "
        f"{seconds:.0f} s with compilation."
    )
    report.write(
        _HTML.value,
        summary,
        [table(*accuracy_table), table(*speed_table)],
        report.charts(accuracy, speed),
        pairs,
        digits.PATCHES_PER_SIDE,
    )
    say(f"report: {_HTML.value}; {seconds:.0f} s in all, compilation included")
    write_json(
        _JSON.value,
        {
            "schema": 1,
            **environment(),
            "settings": {
                "samples": len(samples),
                "timed_samples": _TIMED.value,
                "repeats": _REPEATS.value,
                "gamma": _GAMMA.value,
                "theta": _THETA.value,
                "seed": _SEED.value,
                "max_new_tokens": MAX_NEW,
                "dtype": "float32",
            },
            "blank_exact": blank_exact,
            "lossless": {name: not wrong for name, wrong in checks},
            "results": [row.as_json() for row in c.merged(accuracy, speed)],
        },
    )
    if any(wrong for _, wrong in checks):
        sys.exit("demo: an accelerated answer differs from plain decoding of the same model")


def _percent(x: float | None, digits: int = 1) -> str:
    return "" if x is None or x != x else f"{100 * x:.{digits}f}"


def _number(x: float | None, digits: int = 2) -> str:
    return "" if x is None or x != x else f"{x:.{digits}f}"


def _accuracy_table(rows: list) -> tuple[list[str], list[list[str]]]:
    headers = [
        "pruned %",
        "mode",
        "selector",
        "kept",
        "exact %",
        "short %",
        "long %",
        "RelAcc %",
        "95 % interval",
    ]
    lines = []
    for row in (r for r in rows if r.task == "all"):
        same = {
            r.task: r
            for r in rows
            if (r.pruned, r.mode, r.selector) == (row.pruned, row.mode, row.selector)
        }
        lines.append(
            [
                _percent(row.pruned),
                row.mode,
                row.selector or "",
                str(row.retained),
                _percent(row.exact),
                *(_percent(same[t].exact) if t in same else "" for t in ("short", "long")),
                _percent(row.relacc),
                f"{_percent(row.relacc_low)} - {_percent(row.relacc_high)}",
            ]
        )
    return headers, lines


def _speed_table(rows: list) -> tuple[list[str], list[list[str]]]:
    headers = [
        "answers",
        "pruned %",
        "mode",
        "tokens/s",
        "RelSpd",
        "ceiling",
        "TokAR %",
        "digit words %",
        "wording %",
        "drafted",
        "accepted",
        "kept",
    ]
    lines = [
        [
            r.task,
            _percent(r.pruned),
            r.mode,
            _number(r.tokens_per_s, 0),
            _number(r.relspd),
            _number(r.ceiling),
            _percent(r.tokar),
            _percent(r.tokar_content),
            _percent(r.tokar_wording),
            _number(r.mean_drafted),
            _number(r.mean_accepted),
            str(r.retained),
        ]
        for r in rows
        if r.task != "all"
    ]
    return headers, lines


if __name__ == "__main__":
    run(main)
