"""Prefill and decoding speed of the four modes, beside this machine's bandwidth floor.

    python -m launch.benchmark --checkpoint digits
    python -m launch.benchmark --checkpoint digits --batch 1,4,16,64 --max_new_tokens 10,50,200 \\
        --plot benchmark.png
    python -m launch.benchmark --preset llava-1.5-7b --dtype bfloat16 --json -

With `digits` the prompts are questions of its test pages, of the kind with long answers, else
random words around noise. With --preset the weights are random: speeds of plain and ttp are real,
those of speculation depend on how often a random twig is right, which is stated beside them. Every
answer is as long as asked for, whatever the model would have said.
"""

import dataclasses
import itertools
import sys
from typing import Any

from absl import app, flags

from launch import run
from launch.output import aligned, write_json

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "folder with a LLaVA model, or digits")
_TWIG = flags.DEFINE_string("twig", None, "twig folder")
_PRESET = flags.DEFINE_string("preset", None, "shapes with random weights, as llava-1.5-7b")
_MODES = flags.DEFINE_list("modes", ["plain", "ttp", "ssd", "ttp_ssd"], "what to measure")
_AVG_RETAINED = flags.DEFINE_float("avg_retained", None, "R̄ per image; default 1/9 of M")
_TEXT = flags.DEFINE_integer("text_tokens", 24, "text tokens of a random prompt", lower_bound=2)
_NEW = flags.DEFINE_list("max_new_tokens", ["40"], "tokens of each answer, one or several lengths")
_BATCH = flags.DEFINE_list("batch", ["1"], "rows, one or several sizes")
_REPEATS = flags.DEFINE_integer("repeats", 7, "interleaved measurements of each", lower_bound=1)
_GAMMA = flags.DEFINE_integer("gamma", 6, "tokens ahead that are drafted at most", lower_bound=1)
_THETA = flags.DEFINE_float("theta", 0.3, "drafting stops after a token less probable than this")
_CHILDREN = flags.DEFINE_integer("children", 1, "drafts tried after each; 1 is a chain")
_EXPANDED = flags.DEFINE_integer("expanded", 1, "drafts of a level that have children")
_NODES = flags.DEFINE_integer("nodes", 0, "most drafts an iteration; 0 for all of the tree")
_DTYPE = flags.DEFINE_string("dtype", "float32", "of weights and computation")
_PLOT = flags.DEFINE_string("plot", None, "draw speeds relative to plain here, as PNG")
_JSON = flags.DEFINE_string("json", None, "write results here; - is standard output")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    if (_CHECKPOINT.value is None) == (_PRESET.value is None):
        raise app.UsageError("give either --checkpoint or --preset")
    if _PLOT.value and "plain" not in _MODES.value:
        raise app.UsageError("--plot draws speeds relative to plain; add it to --modes")
    from twig_jax.runtime import use_compilation_cache

    use_compilation_cache()
    try:
        results = measure(whole("batch", _BATCH.value), whole("max_new_tokens", _NEW.value))
    except (FileNotFoundError, ValueError, MemoryError) as error:
        sys.exit(f"benchmark: {error}")
    if _JSON.value != "-":
        report(results)
    write_json(_JSON.value, results)


def whole(flag: str, values: list[str]) -> list[int]:
    """The numbers of a list flag; UsageError unless all are whole and above 0."""
    try:
        numbers = [int(value) for value in values]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise app.UsageError(f"--{flag} takes whole numbers above 0, not {','.join(values)!r}")
    return numbers


def load_generator() -> tuple[Any, str, Any]:
    """The model to measure, what its weights are, and its tokenizer where there is one."""
    import jax

    from twig_jax import api
    from twig_jax.decoding.generate import Generator
    from twig_jax.models.llava import init_base
    from twig_jax.models.twig import init_twig
    from twig_jax.presets import preset

    if _CHECKPOINT.value is not None:
        model = api.load(_CHECKPOINT.value, _TWIG.value, _DTYPE.value)
        return model.generator, "trained", model.tokenizer
    config, twig_config = preset(_PRESET.value or "")

    def build():
        base = init_base(config, jax.random.key(0))
        base = jax.tree.map(lambda x: x.astype(_DTYPE.value), base)
        return base, init_twig(base, config.text, twig_config)

    base, twig = jax.jit(build)()
    return Generator(config, base, twig_config, twig), "random", None


def measure(batches: list[int], lengths: list[int]) -> dict:
    """All modes at every batch size and answer length."""
    import jax
    from tqdm import tqdm

    from twig_jax.decoding.settings import Settings
    from twig_jax.evaluation import plots, speed, tasks
    from twig_jax.runtime import bandwidth, environment

    generator, weights, tokenizer = load_generator()
    config = generator.config
    M = config.vision.num_tokens
    average = M / 9 if _AVG_RETAINED.value is None else _AVG_RETAINED.value
    if _CHECKPOINT.value == "digits":
        samples = tasks.load_samples(tokenizer, config, max(batches), task="long")
        requests = [sample.request for sample in samples]
    else:
        requests = random_requests(config, max(batches))
    rate = bandwidth()
    speeds = []
    for batch, new in tqdm(list(itertools.product(batches, lengths)), unit="cell"):
        settings = {
            mode: Settings(
                mode=mode,
                avg_retained=average,
                max_new_tokens=new,
                min_new_tokens=new,
                gamma=_GAMMA.value,
                theta=_THETA.value,
                children=_CHILDREN.value,
                expanded=_EXPANDED.value,
                nodes=_NODES.value,
            )
            for mode in _MODES.value
        }
        speeds += speed.measure(generator, requests[:batch], settings, _REPEATS.value, rate)
        # No other cell uses these programs, and on a CPU dozens of them use up the memory maps
        # that Linux lets a process have.
        jax.clear_caches()
    model = _CHECKPOINT.value or _PRESET.value or ""
    where = environment()
    if _PLOT.value:
        title = f"{model}, {_DTYPE.value}, {where['device']}"
        plots.relative_speed(_PLOT.value, title, speeds)
    return {
        "schema": 1,
        **where,
        "settings": {
            "model": model,
            "weights": weights,
            "dtype": _DTYPE.value,
            "avg_retained": average,
            "text_tokens": max(int((~r.is_visual).sum()) for r in requests),
            "visual_tokens": M,
            "max_new_tokens": lengths,
            "batch": batches,
            "repeats": _REPEATS.value,
            "gamma": _GAMMA.value,
            "theta": _THETA.value,
            "children": _CHILDREN.value,
            "expanded": _EXPANDED.value,
            "nodes": _NODES.value,
        },
        "bandwidth_gb_per_s": rate / 1e9,
        "results": [dataclasses.asdict(one) for one in speeds],
    }


def random_requests(config: Any, rows: int) -> list:
    """Prompts of random words around one image of noise."""
    import numpy as np

    from twig_jax.decoding.settings import Request

    M = config.vision.num_tokens
    rng = np.random.default_rng(0)
    size = config.vision.image_size
    text = rng.integers(4, config.text.vocab_size - 1, (rows, _TEXT.value))
    requests = []
    for row in text.astype(np.int32):
        ids = np.concatenate([row[:2], np.full(M, config.image_token_id, np.int32), row[2:]])
        is_visual = np.repeat([False, True, False], [2, M, _TEXT.value - 2])
        pixels = rng.normal(size=(1, size, size, 3)).astype(np.float32)
        requests.append(Request(ids, is_visual, pixels=pixels))
    return requests


def report(results: dict) -> None:
    """The results as a table."""
    s = results["settings"]
    print(
        f"{s['model']} ({s['weights']} weights, {s['dtype']}), {s['visual_tokens']} visual + up to "
        f"{s['text_tokens']} text tokens, {results['device']}, "
        f"{results['bandwidth_gb_per_s']:.1f} GB/s read"
    )
    columns = (
        ("batch", "batch", "{}"),
        ("tokens", "max_new_tokens", "{}"),
        ("mode", "mode", "{}"),
        ("prefill ms", "prefill_ms", "{:.1f}"),
        ("first ms", "first_token_ms", "{:.1f}"),
        ("token ms", "token_ms", "{:.2f}"),
        ("tokens/s", "tokens_per_s", "{:.0f}"),
        ("RelSpd", "relspd", "{:.2f}"),
        ("ceiling", "ceiling", "{:.2f}"),
        ("step ms", "step_ms", "{:.2f}"),
        ("floor ms", "floor_step_ms", "{:.2f}"),
        ("of floor", "floor_share", "{:.0%}"),
        ("TokAR", "tokar", "{:.2f}"),
        ("accepted", "mean_accepted", "{:.2f}"),
        ("first call s", "first_call_s", "{:.1f}"),
    )
    lines = [
        ["" if r[k] is None else f.format(r[k]) for _, k, f in columns] for r in results["results"]
    ]
    print(aligned([head for head, _, _ in columns], lines))
    print(
        "Medians of interleaved calls. first: until a first token can be read; token: what each\n"
        "further one adds; floor: weights and caches of a step (accepted + 1 tokens), read once\n"
        "where they are needed at the measured bandwidth."
    )


if __name__ == "__main__":
    run(main)
