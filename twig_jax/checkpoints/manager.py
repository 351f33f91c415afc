"""Orbax: training checkpoints and model trees. The only file that imports it."""

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from twig_jax.checkpoints.tables import flatten, unflatten


class CheckpointManager:
    """Numbered checkpoints of a training state in one folder.

    Kept are the newest `keep` and the one of the lowest loss, where losses are given.
    Saving is asynchronous and atomic: a folder appears under its final name only once it is whole.
    What reads raises ValueError, with the folder's name, for one that has become damaged since.
    reads_only: what is unfinished stays there, as a run that goes on may be saving it; otherwise it
    is what a killed run has left, and removed.
    """

    def __init__(self, folder: str | Path, keep: int = 2, *, reads_only: bool = False) -> None:
        policies = ocp.training.preservation_policies
        best = policies.BestN(
            get_metric_fn=lambda metrics: -metrics["loss"],
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        path = epath.Path(folder)
        # Orbax wants absolute paths; a bucket's would be put behind the working folder.
        self._folder = path if path.is_absolute() else path.absolute()
        self._checkpointer = ocp.training.Checkpointer(
            self._folder,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            cleanup_tmp_directories=not reads_only,
        )

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        found = self._checkpointer.latest
        return None if found is None else found.step

    def best(self) -> int | None:
        """The step of the checkpoint of the lowest loss, the newest one where none has a loss."""
        self.wait()
        scored = [found for found in self._checkpointer.checkpoints if found.metrics is not None]
        if not scored:
            return self.latest()
        return min(scored, key=lambda found: found.metrics["loss"]).step

    def save(self, step: int, state: Any, notes: dict[str, Any], loss: float | None = None) -> None:
        """Starts saving `state` (a pytree of arrays) and JSON `notes` at `step`."""
        metrics = None if loss is None or not math.isfinite(loss) else {"loss": loss}
        self._checkpointer.save_async(step, state, metrics=metrics, custom_metadata=notes)

    def restore(self, like: Any, step: int | None = None) -> Any:
        """The state at `step` (the newest if None), placed as the abstract tree `like` says."""
        with self._reading(step):
            return self._checkpointer.load(step, like)

    def shapes(self, step: int | None = None) -> Any:
        """Shapes and types of the state at `step` (the newest if None), of dicts and lists."""
        with self._reading(step):
            stored = self._checkpointer.metadata(step).metadata
            if stored is None:  # orbax logs what it could not read
                raise ValueError("files are damaged or missing")
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), stored)

    def restore_part(self, like: dict[str, Any], step: int | None = None) -> dict[str, Any]:
        """`restore` of the entries of the state alone that `like` has."""
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context, self._reading(step):
            return self._checkpointer.load(step, like)

    def notes(self, step: int | None = None) -> dict[str, Any]:
        """What was noted with the state at `step` (the newest if None)."""
        with self._reading(step):
            return self._checkpointer.metadata(step).custom_metadata or {}

    @contextmanager
    def _reading(self, step: int | None) -> Iterator[None]:
        try:
            yield
        except (KeyError, OSError, ValueError) as error:  # orbax's and tensorstore's
            folder = self._folder / str(self.latest() if step is None else step)
            raise ValueError(
                f"cannot read the checkpoint in {folder}: {error}; where files are damaged or "
                "missing, move it away to go on from the one before"
            ) from error

    def wait(self) -> None:
        """Blocks until what was started is on disk; raises what went wrong."""
        self._checkpointer.wait()

    def close(self) -> None:
        """Waits, then frees the folder."""
        self._checkpointer.close()


def write_tree(folder: str | Path, parts: Iterable[Any]) -> None:
    """Writes one tree from disjoint parts; while one is written, the next is asked for.

    The folder appears once it is whole. Values are not compressed: trained weights shrink by a
    quarter at most, for several times the time. Raises OSError where the disk does not take it.
    """
    path = Path(folder).absolute()
    context = ocp.Context()
    context.array.saving.use_compression = False
    with context:
        pending = None
        try:
            for part in parts:
                if pending is not None:
                    _written(path, pending.result)
                pending = _written(path, partial(ocp.partial.save_async, path, part))
        except BaseException:
            if pending is not None:
                with suppress(OSError):
                    _written(path, pending.result)
            raise
        if pending is not None:
            _written(path, pending.result)
        _written(path, partial(ocp.partial.finalize, path))


def _written(path: Path, write: Callable[[], Any]) -> Any:
    # Orbax's threads hand their errors on, and would print them as well.
    hook, threading.excepthook = threading.excepthook, lambda _: None
    try:
        return write()
    except Exception as error:  # of the file system, of tensorstore, of orbax
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        threading.excepthook = hook


def tree_shapes(folder: str | Path) -> dict[str, jax.ShapeDtypeStruct]:
    """{'a/b/c': shape and type} of a tree, from its metadata alone.

    Raises ValueError for a folder that holds no whole tree.
    """
    try:
        stored = ocp.metadata(Path(folder).absolute()).metadata
    except (FileNotFoundError, ValueError, ocp.errors.InvalidLayoutError) as error:
        raise ValueError(f"{folder} is no whole orbax checkpoint: {error}") from error
    if not isinstance(stored, Mapping):  # orbax logs what it could not read, and gives None
        raise ValueError(f"{folder} is no whole orbax checkpoint: files are damaged or missing")
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for path, leaf in flatten(dict(stored)).items()
    }


def read_tree(
    folder: str | Path, wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, np.ndarray]:
    """Some leaves of a tree as numpy arrays, {'a/b/c': array}."""
    # Orbax gives numpy where numpy is asked for; the placeholders take no memory.
    like = {
        path: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape) for path, leaf in wanted.items()
    }
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    # Each process reads by itself: others may read something else, or have ended.
    context.multiprocessing.primary_host = jax.process_index()
    context.multiprocessing.active_processes = {jax.process_index()}
    with context:
        return flatten(ocp.load(Path(folder).absolute(), unflatten(like)))
