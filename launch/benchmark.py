"""Prefill and decoding speed of the four modes and of trees, beside this machine's floors.

    python -m launch.benchmark --checkpoint digits
    python -m launch.benchmark --checkpoint digits --batch 1,4,16,64 --max_new_tokens 10,50,200 \\
        --plot benchmark.png
    python -m launch.benchmark --preset llava-1.5-7b --weights calibrated:0.574 --dtype bfloat16 \\
        --gamma 5 --theta 0.6 --avg_retained 192,128,64 --modes plain,ttp,ssd,ttp_ssd,tree \\
        --batch 1,8,32 --max_new_tokens 10,100,500 --repeats 3 --json 7b.json

With `digits` the prompts are questions of its test pages, of the kind with long answers, else
random words around noise. With --preset the weights are random: speeds of plain and ttp are real,
those of speculation depend on how often a random twig is right, which is stated beside them, or is
what was asked for with `--weights calibrated:TOKAR` (evaluation/calibration.py), which tells the
ERROR and LOGIT that `--weights mistaken:ERROR:LOGIT` needs to have the same again. Every answer is
as long as asked for, whatever the model would have said. `tree` is ttp_ssd with drafts that branch.
"""

import dataclasses
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from absl import app, flags

from launch import numbers, run, whole
from launch.output import check_writable, parts, speeds, write_json
from twig_jax.config import DTYPES, INT8, MODES

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "folder with a LLaVA model, or digits")
_TWIG = flags.DEFINE_string("twig", None, "twig folder")
_PRESET = flags.DEFINE_string("preset", None, "shapes with random weights, as llava-1.5-7b")
_WEIGHTS = flags.DEFINE_string(
    "weights", "random", "random, calibrated:TOKAR[:DRAFTS], or mistaken:ERROR:LOGIT as that found"
)
_MODES = flags.DEFINE_list("modes", ["plain", "ttp", "ssd", "ttp_ssd"], "what to measure, or tree")
_AVG_RETAINED = flags.DEFINE_list(
    "avg_retained", None, "R̄ per image, one or several budgets; default 1/9 of M"
)
_TEXT = flags.DEFINE_integer("text_tokens", 40, "text tokens of a random prompt", lower_bound=3)
_NEW = flags.DEFINE_list("max_new_tokens", ["40"], "tokens of each answer, one or several lengths")
_BATCH = flags.DEFINE_list("batch", ["1"], "rows, one or several sizes")
_REPEATS = flags.DEFINE_integer("repeats", 7, "interleaved measurements of each", lower_bound=1)
_GAMMA = flags.DEFINE_integer("gamma", 6, "tokens ahead that are drafted at most", lower_bound=1)
_THETA = flags.DEFINE_float("theta", 0.3, "drafting stops after a token less probable than this")
_TREE = flags.DEFINE_list(
    "tree",
    ["4", "10", "10", "60"],
    "of mode tree: levels, children of a node, nodes of a level that have them, drafts kept",
)
_DTYPE = flags.DEFINE_enum("dtype", "float32", DTYPES, "of weights and computation")
_INT8 = flags.DEFINE_enum(
    "int8", None, INT8, "twig: draft in int8, answers stay; all: the base too, which is lossy"
)
_PLOT = flags.DEFINE_string("plot", None, "draw speeds relative to plain here, as PNG")
_PROFILE = flags.DEFINE_string(
    "profile", None, "write here where the time of each way goes, as text"
)
_JSON = flags.DEFINE_string("json", None, "write results here; - is standard output")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    if (_CHECKPOINT.value is None) == (_PRESET.value is None):
        raise app.UsageError("give either --checkpoint or --preset")
    if _PLOT.value and "plain" not in _MODES.value:
        raise app.UsageError("--plot draws speeds relative to plain; add it to --modes")
    if _PLOT.value and Path(_PLOT.value).suffix not in (".png", ".svg", ".pdf"):
        raise app.UsageError(f"--plot draws .png, .svg or .pdf, not {_PLOT.value}")
    if unknown := [mode for mode in _MODES.value if mode not in (*MODES, "tree")]:
        raise app.UsageError(f"no mode {unknown[0]!r}; there are: {', '.join(MODES)}, tree")
    if _WEIGHTS.value != "random" and _PRESET.value is None:
        raise app.UsageError("--weights is for a --preset; a checkpoint has its own")
    batches, lengths = whole("batch", _BATCH.value), whole("max_new_tokens", _NEW.value)
    if len(whole("tree", _TREE.value)) != 4:
        raise app.UsageError(f"--tree takes four numbers, not {','.join(_TREE.value)!r}")
    from twig_jax.runtime import use_compilation_cache

    use_compilation_cache()
    # What is measured by and by is written at once: a run that is cut off leaves what it has.
    file = None if _JSON.value == "-" else _JSON.value
    try:
        check_writable(file, _PLOT.value, _PROFILE.value)
        results = measure(batches, lengths, lambda so_far: write_json(file, so_far))
    except (OSError, ValueError, MemoryError) as error:
        sys.exit(f"benchmark: {error}")
    if _JSON.value == "-":
        write_json("-", results)
    else:
        print(speeds(results))


def load(batches: list[int], lengths: list[int]) -> tuple[Any, list, str, Any]:
    """Generator, prompts for the largest batch, what the weights are, and their calibration."""
    from twig_jax import api
    from twig_jax.decoding.settings import Settings
    from twig_jax.evaluation import calibration
    from twig_jax.evaluation.speed import random_requests
    from twig_jax.presets import preset

    rows = max(batches)
    if _CHECKPOINT.value is not None:
        model = api.load(_CHECKPOINT.value, _TWIG.value, _DTYPE.value, int8=_INT8.value)
        if _CHECKPOINT.value != "digits":
            requests = random_requests(model.config, rows, _TEXT.value)
            return model.generator, requests, "trained", None
        from twig_jax.evaluation import tasks

        samples = tasks.load_samples(model.tokenizer, model.config, rows, task="long")
        return model.generator, [sample.request for sample in samples], "trained", None
    config, twig_config = preset(_PRESET.value or "")
    requests = random_requests(config, rows, _TEXT.value)
    settings = Settings(max_new_tokens=max(lengths), gamma=_GAMMA.value, theta=_THETA.value)
    generator, found = calibration.draw(
        config,
        twig_config,
        _WEIGHTS.value,
        _DTYPE.value,
        requests,
        settings,
        int8=_INT8.value,
    )
    if found is None:
        return generator, requests, _WEIGHTS.value, None
    return generator, requests, "calibrated", dataclasses.asdict(found)


def ways(budgets: Sequence[float], tokens: int, new: int) -> dict[str, Any]:
    """Settings of everything that is measured; budgets: R̄, of M = `tokens`."""
    from twig_jax.decoding.settings import Settings

    depth, children, expanded, nodes = whole("tree", _TREE.value)
    found = {}
    for mode in _MODES.value:
        tree = mode == "tree"
        one = Settings(
            mode="ttp_ssd" if tree else mode,
            max_new_tokens=new,
            min_new_tokens=new,
            gamma=depth if tree else _GAMMA.value,
            theta=_THETA.value,
            children=children if tree else 1,
            expanded=expanded if tree else 1,
            nodes=nodes if tree else 0,
        )
        if not one.prune:
            found[mode] = one
            continue
        for average in budgets:
            name = f"{mode} {1 - average / tokens:.1%}"
            found[name] = dataclasses.replace(one, avg_retained=average)
    return found


def measure(batches: list[int], lengths: list[int], told: Callable[[dict], Any]) -> dict:
    """All ways at every batch size and answer length; `told` of the results so far."""
    import jax
    from tqdm import tqdm

    from twig_jax.decoding.cost import Machine
    from twig_jax.evaluation import plots, speed
    from twig_jax.evaluation.profile import profile
    from twig_jax.runtime import (
        bandwidth,
        cache_folder,
        copy_bandwidth,
        environment,
        memory_used,
        product_rate,
    )

    programs = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", cache_folder()))
    cold = next(programs.glob("*-cache"), None) is None
    generator, requests, weights, calibration = load(batches, lengths)
    M = generator.config.vision.num_tokens
    asked = _AVG_RETAINED.value
    budgets = numbers(_AVG_RETAINED.name, asked) if asked else [M / 9]
    speed.check_room(generator.config, max(len(r.ids) for r in requests), max(lengths))
    for one in ways(budgets, M, max(lengths)).values():
        generator.batches.need(0, requests[0], one)  # what it refuses is told before anything runs
    machine = Machine(bandwidth(), product_rate(_DTYPE.value))
    model = _CHECKPOINT.value or _PRESET.value or ""
    results: dict[str, Any] = {
        "schema": 1,
        "settings": {
            "model": model,
            "weights": weights,
            "dtype": _DTYPE.value,
            "int8": _INT8.value,
            "avg_retained": budgets,
            "text_tokens": max(int((~r.is_visual).sum()) for r in requests),
            "visual_tokens": M,
            "max_new_tokens": lengths,
            "batch": batches,
            "repeats": _REPEATS.value,
            "gamma": _GAMMA.value,
            "theta": _THETA.value,
            "tree": whole("tree", _TREE.value),
            "compiled_cold": cold,
        },
        "calibration": calibration,
        "bandwidth_gb_per_s": machine.bandwidth / 1e9,
        "copy_gb_per_s": copy_bandwidth() / 1e9,
        "product_tflops": machine.flops / 1e12,
        "memory_bytes": 0,
        "results": [],
    }
    log = Path(_PROFILE.value) if _PROFILE.value else None
    if log:
        log.write_text("")
    speeds: list[speed.Speed] = []
    for batch, new in tqdm(list(itertools.product(batches, lengths)), unit="cell", disable=None):
        # No other cell uses these programs, and on a CPU dozens of them use up the memory maps
        # that Linux lets a process have.
        jax.clear_caches()
        settings = ways(budgets, M, new)
        restart = cold and not speeds  # else the first calls may load programs themselves
        speeds += speed.measure(
            generator, requests[:batch], settings, _REPEATS.value, machine, restart=restart
        )
        results["results"] = [dataclasses.asdict(one) for one in speeds]
        results |= {"memory_bytes": memory_used(), **environment()}
        told(results)
        if log:
            with log.open("a") as file:
                for way, one in settings.items():
                    call = partial(generator.generate, requests[:batch], one)
                    spent = profile(call, generator.compiled(requests[:batch], one))
                    file.write(f"{way}, {batch} rows, {new} tokens\n{parts(spent)}\n\n")
    if _PLOT.value:
        title = f"{model}, {_DTYPE.value}, {results['device']}"
        plots.relative_speed(_PLOT.value, title, speeds)
    return results


if __name__ == "__main__":
    run(main)
