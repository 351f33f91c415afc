"""What adaptive drafting loses with a twig that is never right, and wins with one that is.

    python -m tests.tools.adaptive

Long answers of the digits model, of forced length, once with the shipped twig and once with a
random one; every call beside a plain one, in turn. What drafting may lose to plain decoding at most
is in docs/decoding.md. --random takes random weights of 300M parameters, for which only a random
twig means anything.
"""

import statistics
import time
from collections.abc import Iterator

import jax
import numpy as np
from absl import app, flags

from launch.output import aligned
from twig_jax import api
from twig_jax.decoding.generate import Generator
from twig_jax.decoding.settings import Request, Settings
from twig_jax.evaluation import tasks
from twig_jax.models.llava import init_base
from twig_jax.models.twig import init_twig
from twig_jax.presets import preset
from twig_jax.runtime import use_compilation_cache

_BATCH = flags.DEFINE_multi_integer("batch", [1, 8], "rows", lower_bound=1)
_NEW = flags.DEFINE_integer("max_new_tokens", 200, "tokens of an answer", lower_bound=2)
_RANDOM = flags.DEFINE_bool("random", False, "random weights of 300M parameters")
_REPEATS = flags.DEFINE_integer("repeats", 9, "interleaved measurements of each", lower_bound=1)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    use_compilation_cache()
    rows = []
    for batch in _BATCH.value:
        for name, generator, requests in random_model(batch) if _RANDOM.value else digits(batch):
            for adaptive in (True, False):
                rows.append([name, batch, adaptive, *compare(generator, requests, adaptive)])
    head = ["twig", "rows", "adaptive", "plain ms", "ssd ms", "RelSpd", "TokAR", "drafts a step"]
    print(
        aligned(
            head,
            [
                [name, str(batch), "yes" if adaptive else "no", *(f"{x:.2f}" for x in figures)]
                for name, batch, adaptive, *figures in rows
            ],
        )
    )


def digits(batch: int) -> Iterator[tuple[str, Generator, list[Request]]]:
    """The shipped model with its own and with a random twig, and questions."""
    model = api.load("digits")
    samples = tasks.load_samples(model.tokenizer, model.config, batch, task="long")
    requests = [sample.request for sample in samples]
    own, config = model.generator, model.config
    twig = own.twig_config
    assert twig is not None
    yield "shipped", own, requests
    noise = init_twig(own.weights.base, config.text, twig, "random", 1)
    yield "random", Generator(config, own.weights.base, twig, noise), requests


def random_model(batch: int) -> Iterator[tuple[str, Generator, list[Request]]]:
    """Random base and twig, and one prompt of random words."""
    config, twig = preset("cpu-300m")
    base = jax.jit(init_base, static_argnums=0)(config, jax.random.key(0))
    noise = init_twig(base, config.text, twig, "random", 1)
    ids = np.random.default_rng(0).integers(4, 32000, 32).astype(np.int32)
    request = Request(ids, np.zeros(len(ids), bool))
    yield "random", Generator(config, base, twig, noise), [request] * batch


def compare(generator: Generator, requests: list, adaptive: bool) -> tuple[float, ...]:
    """Medians of both modes in ms, of plain's time over ssd's, and what was drafted."""
    new = _NEW.value
    ways = [
        Settings("plain", max_new_tokens=new, min_new_tokens=new),
        Settings("ssd", max_new_tokens=new, min_new_tokens=new, theta=0.0, adaptive=adaptive),
    ]
    results = [generator.generate(requests, way) for way in ways]
    times: list[tuple[float, ...]] = []
    for _ in range(_REPEATS.value):
        taken = []
        for way in ways:
            began = time.perf_counter()
            generator.generate(requests, way)
            taken.append(1e3 * (time.perf_counter() - began))
        times.append(tuple(taken))
    for plain, ssd in zip(*results, strict=True):
        if plain.tokens.tolist() != ssd.tokens.tolist():
            raise ValueError("ssd answered other than plain decoding")
    drafted = sum(len(d) for r in results[1] for d in r.drafts)
    matched = sum(int(r.matched.sum()) for r in results[1])
    steps = sum(len(r.matched) for r in results[1])
    jax.clear_caches()
    return (
        *(statistics.median(way) for way in zip(*times, strict=True)),
        statistics.median(plain / ssd for plain, ssd in times),
        matched / max(drafted, 1),
        drafted / steps,
    )


if __name__ == "__main__":
    app.run(main)
