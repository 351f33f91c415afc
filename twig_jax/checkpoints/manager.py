"""Training checkpoints. The only file that imports orbax."""

from pathlib import Path
from typing import Any

from orbax.checkpoint import v1 as ocp


class CheckpointManager:
    """Numbered checkpoints of a training state in one folder, the newest `keep` kept.

    Saving is asynchronous and atomic: a folder appears under its final name only once it is whole.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        self._checkpointer = ocp.training.Checkpointer(
            Path(folder).absolute(),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        found = self._checkpointer.latest
        return None if found is None else found.step

    def save(self, step: int, state: Any, notes: dict[str, Any]) -> None:
        """Starts saving `state` (a pytree of arrays) and JSON `notes` at `step`."""
        self._checkpointer.save_async(step, state, custom_metadata=notes)

    def restore(self, like: Any, step: int | None = None) -> Any:
        """The state at `step` (the newest if None), placed as the abstract tree `like` says."""
        return self._checkpointer.load(step, like)

    def wait(self) -> None:
        """Blocks until what was started is on disk; raises what went wrong."""
        self._checkpointer.wait()

    def close(self) -> None:
        """Waits, then frees the folder."""
        self._checkpointer.close()
