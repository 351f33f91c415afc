"""What adaptive drafting loses with a twig that is never right, and wins with one that is.

    python -m tests.tools.adaptive

Long answers of the digits model, of forced length, once with the shipped twig and once with a
random one; every call beside a plain one, in turn. Losing at most 5 % to plain decoding is what
adaptive drafting promises, see docs/decoding.md.
"""

import statistics
import time

import jax
from absl import app, flags

from launch.output import aligned
from twig_jax import api
from twig_jax.decoding.generate import Generator
from twig_jax.decoding.settings import Settings
from twig_jax.evaluation import tasks
from twig_jax.models.twig import init_twig
from twig_jax.runtime import use_compilation_cache

_BATCH = flags.DEFINE_multi_integer("batch", [1, 8], "rows", lower_bound=1)
_NEW = flags.DEFINE_integer("max_new_tokens", 200, "tokens of an answer", lower_bound=2)
_REPEATS = flags.DEFINE_integer("repeats", 9, "interleaved measurements of each", lower_bound=1)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    use_compilation_cache()
    model = api.load("digits")
    own, config = model.generator, model.config
    twig = own.twig_config
    assert twig is not None
    noise = init_twig(own.weights.base, config.text, twig, "random", 1)
    # Noise alone agrees with nothing; its drafts are taken however improbable it finds them.
    others = Generator(config, own.weights.base, twig, noise)
    rows = []
    for batch in _BATCH.value:
        samples = tasks.load_samples(model.tokenizer, config, batch, task="long")
        requests = [sample.request for sample in samples]
        for name, generator in (("shipped", own), ("random", others)):
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
