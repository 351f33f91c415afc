"""What a base teaches, computed once and kept on disk: a run that reads it needs no whole base.

FOLDER/targets.json says what the base was asked. FOLDER/000001-0of1.npz has step 1 of shard 0 of
one: the n likeliest words and their log-probabilities at every target, the attention to be learned,
and a checksum of the batch that both belong to.
"""

import contextlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from twig_jax.checkpoints.twig import fingerprint
from twig_jax.config import LlavaConfig
from twig_jax.data.packing import Batch
from twig_jax.models.llava import Params
from twig_jax.sharding.mesh import make_mesh
from twig_jax.sharding.placement import distribute
from twig_jax.training.config import DistillConfig, TrainConfig
from twig_jax.training.data import on_mesh, open_batches, row_shard
from twig_jax.training.distill import teaching
from twig_jax.training.step import batch_sharding


class Targets:
    """What the base teaches about the batches of a run, from a folder.

    Raises FileNotFoundError for a folder without targets, and ValueError for targets of other
    settings or another base, or of fewer steps than the run has.
    """

    def __init__(
        self, config: TrainConfig, base: LlavaConfig, grown_on: str, shard: tuple[int, int]
    ) -> None:
        folder = config.distill.targets or ""
        self._folder, self._shard = Path(folder), shard
        path = self._folder / "targets.json"
        if not path.is_file():
            raise FileNotFoundError(f"no targets in {folder}: write them with --write_targets")
        there, asked = json.loads(path.read_text()), _asked(config.distill, base, grown_on)
        other = [f"{k} {there.get(k)}, not {asked[k]}" for k in asked if there.get(k) != asked[k]]
        if other:
            raise ValueError(f"the targets in {folder} are of other settings: {'; '.join(other)}")
        self._file(config.steps)

    def beside(self, batch: Batch, step: int) -> Batch:
        """The batch with what is taught about it, as `distill.teaching` gives it.

        `taught_words` int32 and `taught_logs` float32 [B, S, n], `taught_attention` float32
        [B, Q, S]. Raises ValueError for a step that is not there, or another batch's.
        """
        with _opened(self._file(step), batch) as stored:
            return {**batch, **_dense(stored, batch)}

    def _file(self, step: int) -> Path:
        path = _file(self._folder, step, self._shard)
        if not path.is_file():
            raise ValueError(f"there is no {path.name} in {self._folder}: write more targets")
        return path


def write_targets(
    config: TrainConfig, base: Params, folder: str, told: Callable[[int], Any] = lambda step: None
) -> None:
    """Writes what the whole `base` teaches about every batch of a run; files there are kept.

    told: is given each step that is done. On several hosts all call this, with a folder that
    they share. Raises FileNotFoundError where they do not, ValueError for a folder with targets of
    other settings or batches, for a bucket, and for a run that learns nothing from its base or does
    not hold all of it, and what the data raise.
    """
    if "://" in folder:
        raise ValueError(f"{folder} is no folder of this machine: write to one, then copy it")
    if config.stage != "twig" or not (config.distill.prediction or config.distill.attention):
        raise ValueError(
            "there is nothing to teach: set distill.prediction or distill.attention, in stage twig"
        )
    if not config.whole_base:
        raise ValueError("the whole base teaches: set whole_base=True")
    base_config, twig = config.model()
    mesh = make_mesh(*config.mesh)
    shard = row_shard(mesh, config.data.batch_size)
    rows = batch_sharding(mesh)  # of all that is taught, constants included
    teach = jax.jit(
        teaching(base_config, twig, config.distill, config.head_chunk), out_shardings=rows
    )
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    with jax.set_mesh(mesh):
        base = distribute(base, mesh)
        asked = _asked(config.distill, base_config, fingerprint(base_config, base, twig.K))
        notes = out / "targets.json"
        if not jax.process_index() and not notes.is_file():
            with _whole(notes) as part:
                part.write_text(json.dumps(asked))
        multihost_utils.sync_global_devices("targets.json")
        if not notes.is_file():
            raise FileNotFoundError(f"no {notes}, which the first host wrote: hosts share a folder")
        if json.loads(notes.read_text()) != asked:
            raise ValueError(f"{folder} has targets of other settings; name another folder")
        paths = [_file(out, step, shard) for step in range(1, config.steps + 1)]
        # The base answers on all hosts or on none: one that has its file may not run ahead.
        there = multihost_utils.process_allgather(np.array([path.is_file() for path in paths]))
        everywhere = there.reshape(jax.process_count(), -1).all(0)
        with contextlib.closing(open_batches(config, base_config, shard)) as batches:
            for step, path in enumerate(paths, 1):
                local = next(batches)
                if path.is_file():
                    with _opened(path, local):
                        pass  # it is of this batch
                if not everywhere[step - 1]:
                    found = teach(base, on_mesh(local, mesh))
                    if not path.is_file():
                        _write(path, local, jax.tree.map(_own_rows, found))
                told(step)


def _own_rows(x: jax.Array) -> np.ndarray:
    """The rows of this host, in the order that they came to the devices in."""
    parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def _asked(distill: DistillConfig, base: LlavaConfig, grown_on: str) -> dict[str, Any]:
    """What a run needs of its targets; those that were written for more will do."""
    asked: dict[str, Any] = {"base": grown_on}
    if distill.attention:
        # Until it was said, targets had the mean of heads among all tokens.
        asked["attention"] = "of each head among visual tokens"
        asked["layer"] = distill.layer_of(base.text.num_layers)
        asked |= {"queries": distill.queries, "most_queries": distill.most_queries}
    if distill.prediction:
        asked["words"] = distill.words
    return asked


def _file(folder: Path, step: int, shard: tuple[int, int]) -> Path:
    return folder / f"{step:06}-{shard[0]}of{shard[1]}.npz"


def _checksum(batch: Batch) -> int:
    checksum = 0
    for name in ("tokens", "targets", "pixels"):
        checksum = zlib.crc32(batch[name].tobytes(), checksum)
    return checksum


@contextlib.contextmanager
def _opened(path: Path, batch: Batch) -> Iterator[Any]:
    """What a file has; its arrays are read as they are asked for."""
    with np.load(path) as stored:
        if int(stored["checksum"]) != _checksum(batch):
            raise ValueError(
                f"{path} was written for another batch: train with the data, seed, batch size and "
                "number of hosts that the targets were written with, or write to another folder"
            )
        yield stored


def _write(path: Path, batch: Batch, found: dict[str, np.ndarray]) -> None:
    """Only what is at targets, and rows of attention that are not empty; the whole file or none."""
    at = batch["targets"] >= 0
    rows = found["taught_attention"].any(-1)
    with _whole(path) as part, part.open("wb") as file:
        np.savez_compressed(
            file,
            checksum=_checksum(batch),
            words=found["taught_words"][at],
            logs=found["taught_logs"][at].astype(np.float16),
            rows=rows,
            attention=found["taught_attention"][rows].astype(np.float16),
        )


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A path of this host's own, which gets the name `path` at the end."""
    part = path.with_suffix(f".{jax.process_index()}.part")
    yield part
    os.replace(part, path)


def _dense(stored: Any, batch: Batch) -> Batch:
    at, rows = batch["targets"] >= 0, stored["rows"]
    n, (B, S) = stored["words"].shape[-1], at.shape
    words: Any = np.zeros((B, S, n), np.int32)
    logs: Any = np.zeros((B, S, n), np.float32)
    attention: Any = np.zeros((*rows.shape, S), np.float32)
    words[at], logs[at] = stored["words"], stored["logs"]
    attention[rows] = stored["attention"]
    return {"taught_words": words, "taught_logs": logs, "taught_attention": attention}
