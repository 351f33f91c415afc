"""Speed beside transformers' LLaVA: the same weights, prompt and device, calls in turn.

    python -m launch.compare
    python -m launch.compare --weights calibrated:0.574 --max_new_tokens 128 --threads 2
    python -m launch.compare --preset llava-1.5-7b --weights calibrated:0.574 --dtype bfloat16 \\
        --max_new_tokens 128 --json compare.json

Weights are random, as in launch.benchmark. One prompt of random words around an image of noise is
answered by every mode here, and by transformers with

    plain          greedy search
    prompt lookup  drafts are what followed the last tokens before; made-up prompts favour none
    assisted       the trunk and the twig as an assistant model, with the γ and θ of ssd (where
                   scikit-learn is installed, transformers moves θ from there)
    early exit     the first K + T layers as the assistant

First the answers are compared: in float32 those of all modes but ttp and ttp_ssd must be plain's of
transformers, and those of ttp_ssd must be ttp's. A way that transformers refuses is reported with
the reason. torch computes on the GPU where jax does and torch sees one, else on the CPU.
"""

import dataclasses
import importlib.util
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags

from launch import run
from launch.output import check_writable, comparison, write_json
from twig_jax.config import DTYPES

_PRESET = flags.DEFINE_string("preset", "cpu-300m", "whose shapes are measured")
_WEIGHTS = flags.DEFINE_string("weights", "random", "as in launch.benchmark, of a preset")
_AVG_RETAINED = flags.DEFINE_float("avg_retained", None, "R̄ of the image; default 1/9 of M")
_TEXT = flags.DEFINE_integer("text_tokens", 40, "text tokens of the prompt", lower_bound=3)
_NEW = flags.DEFINE_integer("max_new_tokens", 64, "tokens of an answer", lower_bound=2)
_REPEATS = flags.DEFINE_integer("repeats", 7, "interleaved measurements of each", lower_bound=1)
_THREADS = flags.DEFINE_integer(
    "threads", os.cpu_count() or 1, "torch's; XLA takes all cores", lower_bound=1
)
_DTYPE = flags.DEFINE_enum("dtype", "float32", DTYPES, "of weights and computation")
_JSON = flags.DEFINE_string("json", None, "write results here; - is standard output")

Way = tuple[str, str]  # engine, and how it decodes
PLAIN: Way = ("transformers", "plain")

_LOOKUP = 10  # tokens that prompt lookup drafts at most: transformers' own default
_CALIBRATING = 8  # prompts, of which the first is measured


class Answer(NamedTuple):
    """tokens int32 [new], the steps that gave them, and seconds from the call on."""

    tokens: np.ndarray
    steps: int
    first: int  # tokens of the first step
    first_s: float  # until they can be read
    total_s: float


class Clock:
    """A transformers streamer: when it was given how many tokens, the prompt's and each step's."""

    def __init__(self) -> None:
        self.given: list[tuple[float, int]] = []

    def put(self, tokens: Any) -> None:
        self.given.append((time.perf_counter(), tokens.numel()))

    def end(self) -> None:
        """Nothing is held back."""


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    if importlib.util.find_spec("torch") is None:
        sys.exit(
            "compare: transformers' LLaVA needs torch; install it with pip install -e '.[test]'"
        )
    # Before jax is imported: it would take three quarters of a GPU that two engines are to share.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from twig_jax.runtime import use_compilation_cache

    use_compilation_cache()
    try:
        check_writable(_JSON.value)
        results = measure()
        if _JSON.value != "-":
            print(comparison(results))
        write_json(_JSON.value, results)
    except (OSError, ValueError, MemoryError) as error:
        sys.exit(f"compare: {error}")


def measure() -> dict[str, Any]:
    """All ways in turn, after a call of each that compiles and is compared."""
    from tqdm import tqdm

    from twig_jax.decoding import cost
    from twig_jax.decoding.settings import Settings
    from twig_jax.evaluation import calibration, speed
    from twig_jax.presets import preset
    from twig_jax.pruning.schedule import by_twig
    from twig_jax.runtime import bandwidth, environment, product_rate

    config, twig = preset(_PRESET.value)
    # No token ends an answer, in either engine, so that none has to be forbidden.
    config = dataclasses.replace(config, eos_token_id=-1)
    M = config.vision.num_tokens
    requests = speed.random_requests(config, _CALIBRATING, _TEXT.value)
    speed.check_room(config, max(len(r.ids) for r in requests), _NEW.value)
    retained = M / 9 if _AVG_RETAINED.value is None else _AVG_RETAINED.value
    by_twig(twig).budget(retained, config.text.num_layers, M, 1)  # or it is told now
    settings = Settings(avg_retained=retained, max_new_tokens=_NEW.value)
    generator, reached = calibration.draw(
        config, twig, _WEIGHTS.value, _DTYPE.value, requests, settings
    )
    others, device, versions = theirs(generator, requests[0], settings)
    ways = ours(generator, requests[0], settings) | others
    answers, failed = first_answers(ways)
    agreement = agreements(answers)
    calls: dict[Way, list[Answer]] = {way: [] for way in answers}
    for _ in tqdm(range(_REPEATS.value), unit="round", disable=None):
        for one, timed in calls.items():
            timed.append(ways[one]())

    machine = cost.Machine(bandwidth(), product_rate(_DTYPE.value))
    plain = dataclasses.replace(settings, mode="plain")
    program = generator.batches.prepare(requests[:1], plain).program
    given = cost.shapes(program, 1, generator.weights)
    floor = cost.seconds(cost.step(given, 0), machine)
    where = environment()
    return {
        "schema": 1,
        **where,
        "versions": where["versions"] | versions,
        "devices": {"twig_jax": where["device"], "transformers": device},
        "settings": {
            "model": _PRESET.value,
            "weights": _WEIGHTS.value if reached is None else "calibrated",
            "dtype": _DTYPE.value,
            "avg_retained": settings.avg_retained,
            "text_tokens": _TEXT.value,
            "visual_tokens": M,
            "max_new_tokens": _NEW.value,
            "repeats": _REPEATS.value,
            "threads": _THREADS.value,
            "gamma": settings.gamma,
            "theta": settings.theta,
            "prompt_lookup_num_tokens": _LOOKUP,
        },
        "calibration": None if reached is None else dataclasses.asdict(reached),
        "bandwidth_gb_per_s": machine.bandwidth / 1e9,
        "floor_ms": 1e3 * floor,
        "results": [speeds(way, calls, floor, agreement[way]) for way in calls],
        "failed": failed,
    }


def speeds(
    way: Way, calls: dict[Way, list[Answer]], floor: float, agreement: float | None
) -> dict[str, Any]:
    """One way's medians, and its speed over transformers' plain, call by call."""
    mine, new = calls[way], _NEW.value
    first = statistics.median(a.first_s for a in mine)
    total = statistics.median(a.total_s for a in mine)
    further = new - mine[0].first
    token = (total - first) / further if further else None
    pairs = zip(calls[PLAIN], mine, strict=True)
    return {
        "engine": way[0],
        "way": way[1],
        "first_token_ms": 1e3 * first,
        "token_ms": token and 1e3 * token,
        "tokens_per_s": new / total,
        "relspd": statistics.median(p.total_s / a.total_s for p, a in pairs),
        "floor_share": token and floor / token,
        "tokens_per_step": new / mine[0].steps,
        "agreement": agreement,
    }


def ours(generator: Any, request: Any, settings: Any) -> dict[Way, Callable]:
    """(engine, way) -> a call that answers, by this package."""
    from twig_jax.config import MODES
    from twig_jax.evaluation import speed

    def answer(mode: str) -> Answer:
        call = speed.timed(generator, [request], dataclasses.replace(settings, mode=mode))
        result = call.results[0]
        matched = result.matched
        return Answer(result.tokens, len(matched), int(matched[0]) + 1, call.first_s, call.total_s)

    return {("twig_jax", mode): lambda mode=mode: answer(mode) for mode in MODES}


def theirs(
    generator: Any, request: Any, settings: Any
) -> tuple[dict[Way, Callable], str, dict[str, str]]:
    """(engine, way) -> a call that answers, by transformers; the device, and versions."""
    import jax

    from twig_jax.checkpoints.llava import write_llava
    from twig_jax.models.cpu import restored

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        import transformers
    torch.set_num_threads(_THREADS.value)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, _DTYPE.value)

    def load(config: Any, base: Any) -> Any:
        model: Any
        with tempfile.TemporaryDirectory() as folder:
            write_llava(folder, restored(base), config, _DTYPE.value)
            model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        # Read where a model is the assistant.
        model.generation_config.update(
            num_assistant_tokens=settings.gamma,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=settings.theta,
        )
        return model.to(device).eval()

    model = load(generator.config, generator.weights.base)
    drafting, K, T = assistant(generator), generator.twig_config.K, generator.twig_config.T
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "prompt lookup": {"prompt_lookup_num_tokens": _LOOKUP},
        "assisted": {"assistant_model": load(*drafting)},
        "early exit": {"assistant_early_exit": K + T},
    }
    ids = torch.from_numpy(request.ids[None].astype(np.int64)).to(device)
    pixels = torch.from_numpy(request.pixels.transpose(0, 3, 1, 2).copy()).to(device, dtype)
    prompt = {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}

    @torch.inference_mode()
    def answer(way: str) -> Answer:
        clock, began = Clock(), time.perf_counter()
        out = model.generate(
            **prompt,
            **options[way],
            do_sample=False,
            max_new_tokens=settings.max_new_tokens,
            streamer=clock,
        )
        tokens = out[0, ids.shape[1] :].cpu().numpy().astype(np.int32)
        total = time.perf_counter() - began
        _, (read, first), *_ = clock.given
        return Answer(tokens, len(clock.given) - 1, first, read - began, total)

    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    calls = {("transformers", way): lambda way=way: answer(way) for way in options}
    return calls, name, versions


def assistant(generator: Any) -> tuple[Any, Any]:
    """(configuration, parameters): the trunk and the twig as a LLaVA of K + T layers."""
    config, base, twig = generator.config, generator.weights.base, generator.weights.twig
    K, T = generator.twig_config.K, generator.twig_config.T
    layers = [base["text"][f"layers_{k}"] for k in range(K)]
    layers += [twig[f"layers_{t}"] for t in range(T)]
    text = {
        "embed_tokens": base["text"]["embed_tokens"],
        "norm": twig["norm"],
        "lm_head": twig["lm_head"],
        **{f"layers_{i}": layer for i, layer in enumerate(layers)},
    }
    shape = dataclasses.replace(config.text, num_layers=K + T)
    return dataclasses.replace(config, text=shape), {**base, "text": text}


def first_answers(
    ways: dict[Way, Callable],
) -> tuple[dict[Way, np.ndarray], list[dict[str, str]]]:
    """Each way's tokens; and the ways that do not work, with the reason."""
    answers, failed = {}, []
    for (engine, way), answer in ways.items():
        try:
            answers[engine, way] = answer().tokens
        # Whatever transformers' further ways fail with is what is to be told.
        except Exception as error:
            if engine == "twig_jax" or (engine, way) == PLAIN:
                raise
            reason = f"{type(error).__name__}: {error}"
            failed.append({"engine": engine, "way": way, "reason": reason})
    return answers, failed


def agreements(answers: dict[Way, np.ndarray]) -> dict[Way, float | None]:
    """Share of leading tokens that each answer has in common with the one that it should be.

    Raises ValueError where that is not all of them, in float32.
    """
    shares: dict[Way, float | None] = {}
    for (engine, way), tokens in answers.items():
        if way == "ttp":
            shares[engine, way] = None
            continue
        other = ("twig_jax", "ttp") if way == "ttp_ssd" else PLAIN
        same = int(np.cumprod(tokens == answers[other]).sum())
        shares[engine, way] = same / len(tokens)
        if same < len(tokens) and _DTYPE.value == "float32":
            raise ValueError(
                f"{engine} {way} answers other than {' '.join(other)} from token {same} on: "
                f"{tokens[same:][:8].tolist()} and {answers[other][same:][:8].tolist()}"
            )
    return shares


if __name__ == "__main__":
    run(main)
