"""Prefill and decoding speed of the four modes, beside this machine's bandwidth floor.

    python -m launch.benchmark --checkpoint digits
    python -m launch.benchmark --preset llava-1.5-7b --dtype bfloat16 --json -

With --preset the weights are random: speeds of plain and ttp are real, those of speculation depend
on how often a random twig is right, which is stated beside them.
"""

import statistics
import sys
import time

from absl import app, flags

from launch import run
from launch.output import aligned, write_json

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "folder with a LLaVA model, or digits")
_TWIG = flags.DEFINE_string("twig", None, "twig folder")
_PRESET = flags.DEFINE_string("preset", None, "shapes with random weights, as llava-1.5-7b")
_MODES = flags.DEFINE_list("modes", ["plain", "ttp", "ssd", "ttp_ssd"], "what to measure")
_AVG_RETAINED = flags.DEFINE_float("avg_retained", None, "R̄ per image; default 1/9 of M")
_TEXT = flags.DEFINE_integer("text_tokens", 24, "text tokens of the prompt", lower_bound=2)
_NEW = flags.DEFINE_integer("max_new_tokens", 40, "tokens of each answer", lower_bound=2)
_BATCH = flags.DEFINE_integer("batch", 1, "rows", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 7, "interleaved measurements of each", lower_bound=1)
_GAMMA = flags.DEFINE_integer("gamma", 6, "most drafts an iteration", lower_bound=1)
_THETA = flags.DEFINE_float("theta", 0.3, "drafting stops after a token less probable than this")
_DTYPE = flags.DEFINE_string("dtype", "float32", "of weights and computation")
_JSON = flags.DEFINE_string("json", None, "write results here; - is standard output")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    if (_CHECKPOINT.value is None) == (_PRESET.value is None):
        raise app.UsageError("give either --checkpoint or --preset")
    from twig_jax.runtime import use_compilation_cache

    use_compilation_cache()
    try:
        results = measure()
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"benchmark: {error}")
    if _JSON.value != "-":
        report(results)
    write_json(_JSON.value, results)


def load_generator():
    """The model to measure, and what its weights are."""
    import jax

    from twig_jax import api
    from twig_jax.decoding.generate import Generator
    from twig_jax.models.llava import init_base
    from twig_jax.models.twig import init_twig
    from twig_jax.presets import preset

    if _CHECKPOINT.value is not None:
        return api.load(_CHECKPOINT.value, _TWIG.value, _DTYPE.value).generator, "trained"
    config, twig_config = preset(_PRESET.value or "")

    def build():
        base = init_base(config, jax.random.key(0))
        base = jax.tree.map(lambda x: x.astype(_DTYPE.value), base)
        return base, init_twig(base, config.text, twig_config)

    base, twig = jax.jit(build)()
    return Generator(config, base, twig_config, twig), "random"


def measure() -> dict:
    """Runs every mode in turn, `repeats` times, after one call each that compiles."""
    import jax

    from twig_jax.decoding.settings import Settings
    from twig_jax.evaluation.scoring import ceiling
    from twig_jax.runtime import bandwidth, environment

    generator, weights = load_generator()
    config = generator.config
    M = config.vision.num_tokens
    average = M / 9 if _AVG_RETAINED.value is None else _AVG_RETAINED.value
    requests = random_requests(config)
    settings = {
        mode: Settings(
            mode=mode,
            avg_retained=average,
            max_new_tokens=_NEW.value,
            gamma=_GAMMA.value,
            theta=_THETA.value,
        )
        for mode in _MODES.value
    }
    compile_s = {}
    for mode, one in settings.items():
        began = time.perf_counter()
        generator.generate(requests, one)
        compile_s[mode] = time.perf_counter() - began
    runs: dict[str, list] = {mode: [] for mode in settings}
    for _ in range(_REPEATS.value):
        for mode, one in settings.items():
            runs[mode].append(generator.generate(requests, one))

    rate = bandwidth()
    text = generator.weights.base["text"]
    layers = {k: v for k, v in text.items() if k != "embed_tokens"}
    floor_s = sum(x.nbytes for x in jax.tree.leaves(layers)) / rate
    results = []
    for mode, calls in runs.items():
        first = calls[0]
        emitted = [len(r.tokens) + (r.stopped_by == "eos") for r in first]
        iterations = max(len(r.matched) for r in first)
        decode_s = statistics.median(c[0].decode_s for c in calls)
        prefill_s = statistics.median(c[0].prefill_s for c in calls)
        drafted = sum(len(d) for r in first for d in r.drafts)
        matched = sum(int(r.matched.sum()) for r in first)
        rounds = sum(len(r.matched) for r in first)
        # The first iteration belongs to prefill.
        step_s = decode_s / max(iterations - 1, 1)
        results.append(
            {
                "mode": mode,
                "prefill_ms": 1e3 * prefill_s,
                "decode_ms": 1e3 * decode_s,
                "tokens": sum(emitted),
                "tokens_per_s": sum(emitted) / (prefill_s + decode_s),
                "step_ms": 1e3 * step_s,
                "floor_step_ms": 1e3 * floor_s,
                "floor_share": floor_s / step_s,
                "first_call_s": compile_s[mode],
                "tokar": matched / drafted if drafted else None,
                "mean_drafted": drafted / rounds,
                "mean_accepted": matched / rounds,
                "ceiling": ceiling(
                    generator.twig_config,
                    config.text.num_layers,
                    drafted / rounds,
                    matched / rounds,
                ),
            }
        )
    plain = next((r for r in results if r["mode"] == "plain"), None)
    for r in results:
        r["relspd"] = r["tokens_per_s"] / plain["tokens_per_s"] if plain else None
    return {
        "schema": 1,
        **environment(),
        "settings": {
            "model": _CHECKPOINT.value or _PRESET.value,
            "weights": weights,
            "dtype": _DTYPE.value,
            "avg_retained": average,
            "text_tokens": _TEXT.value,
            "visual_tokens": M,
            "max_new_tokens": _NEW.value,
            "batch": _BATCH.value,
            "repeats": _REPEATS.value,
            "gamma": _GAMMA.value,
            "theta": _THETA.value,
        },
        "bandwidth_gb_per_s": rate / 1e9,
        "results": results,
    }


def random_requests(config) -> list:
    """`--batch` prompts of random words around one image of noise."""
    import numpy as np

    from twig_jax.decoding.settings import Request

    M = config.vision.num_tokens
    rng = np.random.default_rng(0)
    size = config.vision.image_size
    text = rng.integers(4, config.text.vocab_size - 1, (_BATCH.value, _TEXT.value))
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
        f"{s['model']} ({s['weights']} weights, {s['dtype']}), batch {s['batch']}, "
        f"{s['visual_tokens']} visual + {s['text_tokens']} text tokens, {results['device']}, "
        f"{results['bandwidth_gb_per_s']:.1f} GB/s read"
    )
    columns = (
        ("mode", "mode", "{}"),
        ("prefill ms", "prefill_ms", "{:.1f}"),
        ("decode ms", "decode_ms", "{:.1f}"),
        ("tokens", "tokens", "{}"),
        ("tokens/s", "tokens_per_s", "{:.1f}"),
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
        "Medians of interleaved runs. floor: the decoder's weights read once per iteration at the "
        "measured bandwidth; an iteration emits accepted + 1 tokens."
    )


if __name__ == "__main__":
    run(main)
