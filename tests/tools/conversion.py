"""Measures a conversion at full size on random weights: peak memory and time, beside a plain copy.

python -m tests.tools.conversion --preset llava-1.5-7b --folder runs/conversion

Makes a random bfloat16 checkpoint in Hugging Face's layout (once), copies its files from a cold
cache with sync, converts it to orbax from a cold cache with sync, and prints one JSON line. Needs
three times the size of the checkpoint on disk, and may need root to empty the page cache.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import app, flags

from twig_jax.checkpoints.config_files import write_config
from twig_jax.checkpoints.llava import write_hf
from twig_jax.checkpoints.source import Source
from twig_jax.checkpoints.tables import llava_tensors
from twig_jax.presets import preset

_PRESET = flags.DEFINE_string("preset", "llava-1.5-7b", "whose shapes")
_FOLDER = flags.DEFINE_string("folder", None, "where to work", required=True)


def random_checkpoint(name: str, folder: Path) -> int:
    """Writes the checkpoint unless it is there; returns its bytes."""
    config, _ = preset(name)
    tensors = tuple(llava_tensors(config))
    rng = np.random.default_rng(0)

    def read(tensor):
        # Exponents and mantissas as those of trained weights: a normal distribution.
        x = rng.standard_normal(tensor.our_shape, np.float32)
        x *= 0.02
        return x.astype(ml_dtypes.bfloat16)

    source = Source("random", tensors, {t.path: "bfloat16" for t in tensors}, read)
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        write_config(partial, config, "bfloat16")
        write_hf(partial, source)
        partial.rename(folder)
    return sum(source.nbytes(tensor) for tensor in tensors)


def cold() -> None:
    """Writes out what is pending and empties the page cache."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def copy(source: Path, target: Path) -> float:
    """Seconds of a cold copy with sync."""
    cold()
    began = time.perf_counter()
    shutil.copytree(source, target)
    os.sync()
    seconds = time.perf_counter() - began
    shutil.rmtree(target)
    return seconds


def convert(source: Path, target: Path) -> tuple[float, float]:
    """(seconds of a cold conversion with sync, its peak anonymous memory in GiB)."""
    cold()
    began = time.perf_counter()
    arguments = ["--source", source, "--to", "orbax", "--out", target]
    process = subprocess.Popen([sys.executable, "-m", "launch.convert", *map(str, arguments)])
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except FileNotFoundError:
            break
        for line in status.splitlines():
            if line.startswith("RssAnon"):
                peak = max(peak, int(line.split()[1]))
        time.sleep(0.02)
    if process.wait():
        raise RuntimeError("the conversion failed")
    os.sync()
    return time.perf_counter() - began, peak / 2**20


def main(argv: list[str]) -> None:
    folder = Path(_FOLDER.value)
    nbytes = random_checkpoint(_PRESET.value, folder / "source")
    copies, conversions, peaks = [], [], []
    for _ in range(2):
        copies.append(copy(folder / "source", folder / "copy"))
        seconds, peak = convert(folder / "source", folder / "orbax")
        shutil.rmtree(folder / "orbax")
        conversions.append(seconds)
        peaks.append(peak)
    print(
        json.dumps(
            {
                "preset": _PRESET.value,
                "gib": round(nbytes / 2**30, 2),
                "copy_s": [round(s, 1) for s in copies],
                "convert_s": [round(s, 1) for s in conversions],
                "speed_share": round(min(copies) / min(conversions), 2),
                "peak_anonymous_gib": round(max(peaks), 2),
            }
        )
    )


if __name__ == "__main__":
    app.run(main)
