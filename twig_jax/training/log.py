"""Figures of a run, step by step, on disk."""

import json
from typing import Any, Self

import jax
from etils import epath
from tensorboardX import SummaryWriter

from twig_jax.training.plots import curves


class Log:
    """Writes `metrics.jsonl`, TensorBoard files and, at the end, `curves.png` into a folder.

    On the first host alone.
    after: the step a run goes on behind. What an earlier start noted beyond it will come again, and
    is dropped.
    """

    def __init__(self, folder: epath.Path, after: int) -> None:
        self._path = folder / "metrics.jsonl"
        self._lines: list[str] = []
        self._writer = None
        if jax.process_index():
            return
        if after and self._path.exists():
            earlier = self._path.read_text().splitlines()
            self._lines = [line for line in earlier if json.loads(line)["step"] <= after]
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=after + 1)

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Notes figures of a step; the file is never seen half-written."""
        if self._writer is None:
            return
        rounded = {name: float(f"{value:.6g}") for name, value in figures.items()}
        self._lines.append(json.dumps({"step": step, **rounded}))
        # Whole each time: object stores cannot append, and it stays small.
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(f"{line}\n" for line in self._lines))
        partial.replace(self._path)
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._writer is not None:
            self._writer.close()
            curves(self._path.with_name("curves.png"), [json.loads(line) for line in self._lines])
