"""Files of weights: one or several named by an index, safetensors or torch's own."""

import fcntl
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

WEIGHTS = "model.safetensors"
TORCH_WEIGHTS = "pytorch_model.bin"
SHARD_BYTES = 2**30

_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def float_dtype(name: Any) -> np.dtype:
    """float32, float16 or bfloat16, by name or dtype; ValueError for others."""
    found = _DTYPES.get(name if isinstance(name, str) else np.dtype(name).name)
    if found is None:
        raise ValueError(f"no storage type {name!r}; there are: {', '.join(_DTYPES)}")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ValueError names the file where it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an indented JSON object."""
    path.write_text(json.dumps(content, indent=2) + "\n")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps other processes out, of other hosts too; what a killed one has left locks nothing.

    Raises FileExistsError where another is in.
    """
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(f"another process holds {path}, to write the same") from None
        except OSError:  # some file systems of clusters have no locks
            pass
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


class Weights:
    """The tensors of a folder: shapes and types at once, values one at a time.

    Use as a context manager. Files are memory-mapped. Raises FileNotFoundError for a folder without
    weights or with shards missing, ValueError for a shard that is cut short, for an index that does
    not fit its shards and for types other than float16, bfloat16 and float32, ImportError for .bin
    files without torch.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._read: dict[str, Callable[[str], np.ndarray]] = {}
        self._open = ExitStack()

    def __enter__(self) -> Self:
        try:
            files, where = self._files()
            for path in files:
                if path.suffix == ".safetensors":
                    self._add_safetensors(path)
                else:
                    self._add_torch(path)
            for name, file in where.items():
                if name not in self._read:
                    raise ValueError(f"the index in {self.folder} puts {name} in {file}: not there")
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
        return self._read[name](name)

    def _files(self) -> tuple[list[Path], dict[str, str]]:
        """The files, and which of them has each tensor, where an index says so."""
        for single in (WEIGHTS, TORCH_WEIGHTS):
            if (self.folder / single).is_file():
                return [self.folder / single], {}
            index = self.folder / f"{single}.index.json"
            if index.is_file():
                break
        else:
            raise FileNotFoundError(
                f"{self.folder} has no weights: neither {WEIGHTS} nor {TORCH_WEIGHTS}, and no index"
            )
        where = read_json(index).get("weight_map")
        if not isinstance(where, dict):
            raise ValueError(f"{index} has no weight_map")
        paths = [self.folder / name for name in sorted(set(where.values()))]
        absent = [path.name for path in paths if not path.is_file()]
        if absent:
            raise FileNotFoundError(f"{index} names files that are not there: {', '.join(absent)}")
        return paths, where

    def _add(
        self,
        path: Path,
        name: str,
        dtype: str,
        shape: tuple[int, ...],
        read: Callable[[str], np.ndarray],
    ) -> None:
        if name in self._read:
            raise ValueError(f"{path} has {name}, which another file has too")
        # Constants may be of any type; a weight that is asked for may not.
        self.shapes[name], self.dtypes[name], self._read[name] = shape, dtype, read

    def _add_safetensors(self, path: Path) -> None:
        try:
            file = self._open.enter_context(safe_open(path, framework="numpy"))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or cut short: {error}") from error
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            view = file.get_slice(name)
            stored = view.get_dtype()
            dtype = _STORED.get(stored, stored)
            self._add(path, name, dtype, tuple(view.get_shape()), file.get_tensor)

    def _add_torch(self, path: Path) -> None:
        try:
            import torch
        except ImportError as error:
            raise ImportError(f"{path} is torch's format: pip install torch to read it") from error
        mapped = zipfile.is_zipfile(path)  # torch before 1.6 wrote what must be read as a whole
        try:
            tensors = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
        except Exception as error:  # a zip, a pickle or a memory map: each fails in its own way
            raise ValueError(f"{path} is damaged or cut short: {error}") from error
        named = isinstance(tensors, Mapping)
        if not named or not all(isinstance(x, torch.Tensor) for x in tensors.values()):
            raise ValueError(f"{path} holds other things than tensors, as training states do")

        def read(name: str) -> np.ndarray:
            x = tensors[name].detach()
            if x.dtype == torch.bfloat16:  # numpy has no such type of its own
                return x.view(torch.int16).numpy().view(_DTYPES["bfloat16"])
            return x.numpy()

        for name, tensor in tensors.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            self._add(path, name, dtype, tuple(tensor.shape), read)


def write_weights(
    folder: Path, sizes: Mapping[str, int], read: Callable[[str], np.ndarray]
) -> None:
    """Writes tensors to safetensors files of about 1 GiB at most, one file in memory at a time.

    sizes: the bytes of each tensor, in order; `read` gives its values. One file where all fit, else
    shards and their index, named as transformers does. Each file appears under its name only once
    it is whole; other weights in the folder are removed at the end. A folder that had weights has
    none from the first of several shards until the index, so that no old one is read with a new.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    n = len(shards)
    files = [WEIGHTS] if n == 1 else [f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)]
    index = folder / f"{WEIGHTS}.index.json"
    for file, names in zip(files, shards, strict=True):
        partial = folder / f"{file}.partial"
        try:
            # safetensors writes memory as it lies, so a transposed view must be laid out first.
            # No name holds one file's tensors while those of the next are read.
            save_file(
                {name: np.ascontiguousarray(read(name)) for name in names},
                partial,
                metadata={"format": "pt"},
            )
            partial.chmod(0o644)  # safetensors leaves it readable by its owner alone
            if n > 1:
                for old in (index, folder / WEIGHTS):
                    old.unlink(missing_ok=True)
            partial.replace(folder / file)
        except SafetensorError as error:  # it wraps what the system said
            raise OSError(f"cannot write {folder / file}: {error}") from error
        finally:
            partial.unlink(missing_ok=True)
    if n == 1:
        index.unlink(missing_ok=True)
    else:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        write_json(index, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where})
    for path in folder.glob("model*.safetensors"):
        if path.name not in files:
            path.unlink()
