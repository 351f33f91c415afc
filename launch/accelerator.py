"""Parity, equality and speed on an accelerator: everything to know about it within minutes.

    python -m launch.accelerator --out runs/accelerator
    python -m launch.accelerator --out runs/try --tiny --parts benchmark
    python -m launch.accelerator --out runs/7b --parts matrix --minutes 120

Runs from the repository's folder, and needs no checkpoint and no network. The parts:

    parity        tests/parity: transformers' LLaVA and recordings of the published implementation
    equality      answers with and without drafts, token for token (tests/tools/equalities.py)
    benchmark     prefill and decoding of a whole model with random weights, --weights
    matrix        the same at every budget, batch and length; only when asked for
    int8          the same as benchmark, with a twig that drafts in int8; only when asked for
    transformers  its generate on the same weights, in turn with ours; only when asked for

Every part has its share of --minutes, parity and equality the same one; one that fails or is cut
off does not stop the others, and the benchmarks leave what they have measured by then.
OUT/README.md says what came out, OUT has the logs and figures. Exit status 1 where any part did
not pass.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from launch import run
from launch.output import comparison, speeds
from launch.parts import Outcome, Part, run_parts

_OUT = flags.DEFINE_string("out", "runs/accelerator", "where logs, figures and README.md go")
_PARTS = flags.DEFINE_list("parts", ["parity", "equality", "benchmark"], "what to run, in order")
_MINUTES = flags.DEFINE_float("minutes", 8.0, "for all parts together", lower_bound=0.1)
_PRESET = flags.DEFINE_string("preset", "llava-1.5-7b", "whose shapes are measured")
# Of llava-1.5-7b: 57 % of five drafts are accepted, as in the paper.
_WEIGHTS = flags.DEFINE_string("weights", "mistaken:0.178:10", "as in launch.benchmark")
_TINY = flags.DEFINE_bool("tiny", False, "as little as possible of all, to try this on a CPU")

ROOT = Path(__file__).resolve().parents[1]


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    out = Path(_OUT.value).resolve()
    known = {part.name: part for part in parts(out)}
    if unknown := [name for name in _PARTS.value if name not in known]:
        raise app.UsageError(f"no part {unknown[0]!r}; there are: {', '.join(known)}")
    device = machine()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"accelerator: {error}")
    for name in _PARTS.value:
        (out / f"{name}.json").unlink(missing_ok=True)  # of an earlier run
    chosen = [known[name] for name in _PARTS.value]
    # Ends the part that runs, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    outcomes = run_parts(chosen, 60 * _MINUTES.value, out, ROOT)
    text = summary(device, outcomes, out)
    (out / "README.md").write_text(text)
    print(text)
    sys.exit(any(o.outcome != "passed" for o in outcomes))


def machine() -> str:
    """Device, versions and clocks, as JSON; exits where they are not to be measured."""
    # By another process: one that has looked at a device keeps its memory.
    look = "import json; from twig_jax.runtime import environment as e; print(json.dumps(e()))"
    done = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"accelerator: {done.stderr.strip()[-2000:]}")
    if not _TINY.value and json.loads(done.stdout)["device"].split(" x ")[1].startswith("cpu"):
        sys.exit("accelerator: jax finds a CPU alone; --tiny tries this on one")
    return done.stdout.strip()


def parts(out: Path) -> list[Part]:
    """All parts; out: where they leave figures and compiled programs."""
    tiny, python = _TINY.value, sys.executable
    # The best device there is, where the tests would take the CPU; they compare in float32.
    exact = {"JAX_PLATFORMS": "", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    # They compile far longer than they run, so all of them at once.
    exact["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
    exact["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default"]
    if importlib.util.find_spec("xdist") is not None:
        pytest += ["-n", str(min(os.cpu_count() or 1, 8))]
    tests = ["tests/parity/test_hf.py", "tests/parity/test_golden.py"]
    # Without those that need no accelerator: that mistakes are noticed, and files for other code.
    pytest += [*(tests[:1] if tiny else tests), "-k", "not fails and not processor"]
    size = {"tokens": 1, "rows": 4, "new": 8} if tiny else {"tokens": 8000, "rows": 32, "new": 32}
    return [
        Part("parity", pytest, 4, exact),
        Part("equality", [python, "-m", "tests.tools.equalities", *_flags(size)], 4, exact, True),
        _benchmark(out, "benchmark", 5, modes="plain,ttp,ttp_ssd", batch="1,8"),
        _benchmark(
            out,
            "matrix",
            5,
            modes="plain,ttp,ssd,ttp_ssd,tree",
            batch="1,8,32",
            max_new_tokens="10,100,500",
            avg_retained="192,128,64",
        ),
        _benchmark(out, "int8", 5, modes="plain,ssd,ttp_ssd", batch="1,8", int8="twig"),
        _speed(out, "transformers", "compare", 5),
    ]


def _benchmark(out: Path, name: str, share: float, **flags: Any) -> Part:
    """A run of launch.benchmark: unless told otherwise R̄ = M / 9."""
    small = {"modes": "plain,ssd", "batch": 16, "tree": "2,2,2,4"} if _TINY.value else {}
    # Calibrated weights are told by their probabilities where they may be mistaken.
    theta = 0.6 if _WEIGHTS.value.startswith("calibrated") else 0
    common = {"gamma": 5, "theta": theta, "profile": out / f"{name}.profile.txt"}
    return _speed(out, name, "benchmark", share, **common | flags | small)


def _speed(out: Path, name: str, launcher: str, share: float, **flags: Any) -> Part:
    """A run of a launcher that measures whole answers: of 128 tokens unless told otherwise."""
    common = {
        "preset": _PRESET.value,
        "weights": _WEIGHTS.value,
        "dtype": "bfloat16",
        "max_new_tokens": 128,
        "repeats": 3,
        "json": out / f"{name}.json",
    }
    small = {
        "preset": "toy",
        "dtype": "float32",
        "max_new_tokens": 64,
        "avg_retained": 4,
        "repeats": 1,
    }
    chosen = common | flags | (small if _TINY.value else {})
    command = [sys.executable, "-m", f"launch.{launcher}", *_flags(chosen)]
    # Programs in a folder of their own: the first calls of a first run are cold.
    return Part(name, command, share, {"JAX_COMPILATION_CACHE_DIR": f"{out}/programs/{name}"})


def _flags(values: Mapping[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]


def summary(device: str, outcomes: Sequence[Outcome], out: Path) -> str:
    """README.md: every part's outcome, its command and last words, and the speeds measured."""
    text = ["# Parity, equality and speed of twig_jax", "", "```", device, "```", ""]
    text += ["| part | outcome | seconds | of at most | log |", "|---|---|---|---|---|"]
    for o in outcomes:
        took = f"{o.seconds:.0f} | {o.limit:.0f}"
        text.append(f"| {o.name} | {o.outcome} | {took} | [{o.log.name}]({o.log.name}) |")
    for o in outcomes:
        lines = o.log.read_text(errors="replace").rstrip().splitlines()
        figures = out / f"{o.name}.json"
        # One line says it where all is well.
        said = "\n".join(lines[-1 if o.outcome == "passed" else -30 :])
        if figures.is_file():
            table = comparison if o.name == "transformers" else speeds
            said = table(json.loads(figures.read_text())) + f"\n\n{said}" * (o.outcome != "passed")
        text += ["", f"## {o.name}: {o.outcome}", "", f"`{o.command}`", "", "```", said, "```"]
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    run(main)
