"""One view of tensors wherever they lie: files of weights, an orbax tree, or memory.

Everything that reads or writes a model goes through a `Source`, one tensor at a time, so no
conversion holds more than a part of the model.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from twig_jax.checkpoints.manager import read_tree, tree_shapes
from twig_jax.checkpoints.storage import Weights, float_dtype
from twig_jax.checkpoints.tables import Params, Tensor, check_shapes, flatten, unflatten

TREE = "params"  # the folder of an orbax tree beside its config.json or twig.json

Place = Callable[[str, np.ndarray], Any]


@dataclass(frozen=True)
class Source:
    """Tensors with their table.

    dtypes: what is stored, by our path. read: one tensor as stored, in our order of axes (often a
    view of a memory-mapped file). ignored: names in the files that mean nothing here.
    """

    where: str
    tensors: tuple[Tensor, ...]
    dtypes: Mapping[str, str]
    read: Callable[[Tensor], np.ndarray]
    ignored: tuple[str, ...] = ()

    def cast(self, dtype: Any) -> "Source":
        """The same tensors as `dtype`; None keeps what is stored.

        Reading raises ValueError where finite values are too large for it.
        """
        if dtype is None:
            return self
        to = float_dtype(dtype)
        return Source(
            self.where,
            self.tensors,
            dict.fromkeys(self.dtypes, to.name),
            lambda tensor: rounded(self.read(tensor), to, tensor.name),
            self.ignored,
        )

    def watched(self, seen: Callable[[int], Any]) -> "Source":
        """The same tensors; every reading tells its bytes to `seen`."""

        def read(tensor: Tensor) -> np.ndarray:
            x = self.read(tensor)
            seen(x.nbytes)
            return x

        return Source(self.where, self.tensors, self.dtypes, read, self.ignored)

    def nbytes(self, tensor: Tensor) -> int:
        """The size of one tensor."""
        return int(np.prod(tensor.shape)) * float_dtype(self.dtypes[tensor.path]).itemsize

    def tree(self, place: Place | None = None, among: str = "") -> Params:
        """The parameter tree of the tensors whose path begins with the regular expression `among`.

        place(path, array) puts each where it belongs, as soon as it is read; None keeps numpy.
        """
        flat = {}
        for tensor in self.tensors:
            if re.match(among, tensor.path):
                x = self.read(tensor)
                flat[tensor.path] = x if place is None else place(tensor.path, x)
        return unflatten(flat)


def from_files(
    tensors: Iterable[Tensor],
    files: Iterable[tuple[Weights, Mapping[str, str]]],
    where: str,
    ignored: Iterable[str] = (),
) -> Source:
    """Tensors in open files, each with {name in the table: name in the file}.

    Raises one ValueError for all tensors that are missing, unexpected, misshaped or of a type that
    is no float32, float16 or bfloat16.
    """
    tensors = tuple(tensors)
    found = {name: (file, theirs) for file, names in files for name, theirs in names.items()}
    check_shapes(
        {tensor.name: tensor.shape for tensor in tensors},
        {name: file.shapes[theirs] for name, (file, theirs) in found.items()},
        where,
    )
    dtypes = {}
    for tensor in tensors:
        file, theirs = found[tensor.name]
        dtypes[tensor.path] = file.dtypes[theirs]
    odd = [f"{path} as {dtype}" for path, dtype in dtypes.items() if not _is_float(dtype)]
    if odd:
        raise ValueError(f"{where} has {', '.join(odd)}; only float32, float16, bfloat16 are read")

    def read(tensor: Tensor) -> np.ndarray:
        file, theirs = found[tensor.name]
        return tensor.to_ours(file[theirs])

    return Source(where, tensors, dtypes, read, tuple(ignored))


def from_orbax(tensors: Iterable[Tensor], folder: Path) -> Source:
    """Tensors of an orbax tree. Raises as `from_files` does."""
    tensors = tuple(tensors)
    stored = tree_shapes(folder)
    check_shapes(
        {tensor.path: tensor.our_shape for tensor in tensors},
        {path: tuple(leaf.shape) for path, leaf in stored.items()},
        str(folder),
    )
    paths = {tensor.path: tensor for tensor in tensors}
    part: dict[str, np.ndarray] = {}

    def read(tensor: Tensor) -> np.ndarray:
        if tensor.path not in part:
            # A layer is read at once, which spares most of the cost of opening the checkpoint.
            layer = re.match(r"(.*layers_\d+/)?", tensor.path)
            wanted = [p for p in paths if layer and layer[0] and p.startswith(layer[0])]
            part.clear()
            part.update(read_tree(folder, {p: stored[p] for p in wanted or [tensor.path]}))
        return part.pop(tensor.path)

    return Source(str(folder), tensors, {path: stored[path].dtype.name for path in paths}, read)


def from_tree(tensors: Iterable[Tensor], params: Params, where: str) -> Source:
    """Tensors in memory. Raises as `from_files` does."""
    tensors = tuple(tensors)
    flat = flatten(params)
    check_shapes(
        {tensor.path: tensor.our_shape for tensor in tensors},
        {path: tuple(leaf.shape) for path, leaf in flat.items()},
        where,
    )
    dtypes = {path: np.dtype(leaf.dtype).name for path, leaf in flat.items()}
    return Source(where, tensors, dtypes, lambda tensor: np.asarray(flat[tensor.path]))


def resized(source: Source, tensors: Iterable[Tensor]) -> Source:
    """The same tensors in the shapes of `tensors`, which differ in the size of the vocabulary.

    Rows beyond it are dropped, further ones are the mean of all: their logit is the mean logit,
    which is never the largest.
    """
    tensors = tuple(tensors)
    stored = {tensor.path: tensor for tensor in source.tensors}

    def read(tensor: Tensor) -> np.ndarray:
        x = source.read(stored[tensor.path])
        for axis, (old, new) in enumerate(zip(x.shape, tensor.our_shape, strict=True)):
            if old < new:
                mean = x.mean(axis, dtype=np.float32, keepdims=True).astype(x.dtype)
                x = np.concatenate([x, np.repeat(mean, new - old, axis)], axis)
            elif old > new:
                x = x.take(np.arange(new), axis)
        return x

    return Source(source.where, tensors, source.dtypes, read, source.ignored)


def rounded(x: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """x as `dtype`; ValueError where finite values are too large for it."""
    if x.dtype == dtype:
        return x
    with np.errstate(over="ignore"):
        y = x.astype(dtype)
    infinite = np.isinf(y)
    if infinite.any() and np.isfinite(x[infinite]).any():
        raise ValueError(f"{name} has values that {dtype.name} cannot hold")
    return y


def _is_float(dtype: str) -> bool:
    try:
        float_dtype(dtype)
    except ValueError:
        return False
    return True
