"""Safetensors files: one, or several named by an index."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_STORED = {"F32", "F16", "BF16"}


def float_dtype(name: Any) -> np.dtype:
    """float32, float16 or bfloat16, by name or dtype; ValueError for others."""
    found = _DTYPES.get(name if isinstance(name, str) else np.dtype(name).name)
    if found is None:
        raise ValueError(f"no storage type {name!r}; there are: {', '.join(_DTYPES)}")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ValueError names the file where it is none."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an indented JSON object."""
    path.write_text(json.dumps(content, indent=2) + "\n")


class Weights:
    """The tensors of a folder: the shapes at once, the values one at a time.

    Use as a context manager. Raises FileNotFoundError for a folder without weights or with shards
    missing, ValueError for a shard that is cut short and for types other than float16, bfloat16
    and float32.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._source: dict[str, Any] = {}
        self._open = ExitStack()

    def __enter__(self) -> Self:
        try:
            for path in self._files():
                self._add(path)
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._open.close()

    def __getitem__(self, name: str) -> np.ndarray:
        return self._source[name].get_tensor(name)

    def _files(self) -> list[Path]:
        single, index = self.folder / WEIGHTS, self.folder / INDEX
        if single.is_file():
            return [single]
        if not index.is_file():
            raise FileNotFoundError(f"{self.folder} has no weights: neither {WEIGHTS} nor {INDEX}")
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise ValueError(f"{index} has no weight_map")
        paths = [self.folder / name for name in sorted(set(shards.values()))]
        absent = [path.name for path in paths if not path.is_file()]
        if absent:
            raise FileNotFoundError(f"{index} names files that are not there: {', '.join(absent)}")
        return paths

    def _add(self, path: Path) -> None:
        try:
            file = self._open.enter_context(safe_open(path, framework="numpy"))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or cut short: {error}") from error
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            if name in self._source:
                raise ValueError(f"{path} has {name}, which another file has too")
            view = file.get_slice(name)
            if view.get_dtype() not in _STORED:
                raise ValueError(
                    f"{path} has {name} as {view.get_dtype()}; only {', '.join(_DTYPES)} are read"
                )
            self._source[name] = file
            self.shapes[name] = tuple(view.get_shape())


def write_weights(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes contiguous arrays to the folder's single file, which appears only once it is whole."""
    partial = folder / f"{WEIGHTS}.partial"
    try:
        save_file(dict(tensors), partial, metadata={"format": "pt"})
        partial.chmod(0o644)  # safetensors leaves it readable by its owner alone
        partial.replace(folder / WEIGHTS)
    finally:
        partial.unlink(missing_ok=True)
