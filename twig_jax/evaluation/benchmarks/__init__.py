"""Benchmarks in the files that LLaVA's evaluation scripts and the official scorers use."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from twig_jax.evaluation.benchmarks.choice import MMMU, MMBench, ScienceQA
from twig_jax.evaluation.benchmarks.files import Benchmark
from twig_jax.evaluation.benchmarks.judged import llava_bench, mm_vet
from twig_jax.evaluation.benchmarks.pages import Digits
from twig_jax.evaluation.benchmarks.short import GQA, TextVQA, VQAv2, VQAv2Val
from twig_jax.evaluation.benchmarks.yes_no import MME, Pope

# Each opens the folder that LLaVA's evaluation guide makes for it.
BENCHMARKS: dict[str, Callable[..., Benchmark]] = {
    "gqa": GQA,
    "vqav2": VQAv2,
    "vqav2_val": VQAv2Val,
    "textvqa": TextVQA,
    "pope": Pope,
    "mme": MME,
    "mmbench": MMBench,
    "mmbench_test": partial(MMBench, split="test_20230712"),
    "scienceqa": ScienceQA,
    "mmvet": mm_vet,
    "mmmu": MMMU,
    "llava-bench": llava_bench,
    "digits": Digits,
}


def open_benchmark(name: str, folder: Path, limit: int | None = None, seed: int = 0) -> Benchmark:
    """A benchmark in its folder; the digits need none, and make any number of questions of a seed.

    Raises ValueError for a name there is none of.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"no benchmark {name}; there are: {', '.join(BENCHMARKS)}")
    if name == "digits":
        return Digits(limit or Digits.samples, seed)
    return BENCHMARKS[name](folder)
