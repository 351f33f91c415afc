"""One table from parameter path to mesh axes, for base, twig and what training keeps beside them.

Megatron's layout: projections into heads and feed-forward units split their outputs over
'tensor', those back to the residual stream split their inputs; the other axis goes to 'fsdp'.
"""

import re
from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from twig_jax.sharding.mesh import ROWS

RULES: tuple[tuple[str, P], ...] = (
    (r"((q|k|v|gate|up)_proj|lm_head)/kernel", P("fsdp", "tensor")),
    (r"(o|down|out)_proj/kernel", P("tensor", "fsdp")),
    (r"(q|k|v)_proj/bias", P("tensor")),
    (r"(q|k)_gate/kernel", P("fsdp", "tensor")),
    (r"(q|k)_gate/bias", P("tensor")),
    (r"fc1/kernel", P("fsdp", "tensor")),
    (r"fc1/bias", P("tensor")),
    (r"fc2/kernel", P("tensor", "fsdp")),
    (r"(fc2|out_proj)/bias", P()),
    (r"embed_tokens/embedding", P("tensor", "fsdp")),
    (r"linear_1/kernel", P("fsdp", "tensor")),
    (r"linear_1/bias", P("tensor")),
    (r"linear_2/kernel", P("tensor", "fsdp")),
    (r"linear_2/bias", P()),
    (r"(class|patch|position)_embedding", P()),
    (r"[a-z_0-9]*norm[a-z_0-9]*/(scale|bias)", P()),
    (r"count|step", P()),
)


def spec(path: str) -> P:
    """The partition of the parameter at 'a/b/c'; ValueError unless exactly one rule matches."""
    # Transposed kernels, of which those in int8 have a scale for every output.
    if transposed := re.fullmatch(r"(.+/kernel)/(values|scale)", path):
        inputs, outputs = spec(transposed[1])
        return P(outputs, inputs) if transposed[2] == "values" else P(outputs)
    found = [p for pattern, p in RULES if re.search(rf"(^|/)({pattern})$", path)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} sharding rules match the parameter {path}; need one")
    return found[0]


def path_string(path: tuple[Any, ...]) -> str:
    """A jax key path as 'a/b/c'."""
    return "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


def partition(shape: tuple[int, ...], axes: Iterable[str | None], mesh: Any) -> P:
    """The partition of an array: "rows" stands for the mesh's data axes, None for no axis.

    An axis that does not divide its dimension is left out: correct, only less spread.
    """
    chosen = []
    for size, axis in zip(shape, axes, strict=False):
        names = ROWS if axis == "rows" else (axis,) if axis else ()
        parts = 1
        for name in names:
            parts *= mesh.shape[name]
        chosen.append(names if names and size % parts == 0 else None)
    return P(*chosen)


def shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """A NamedSharding for every leaf (array or shape) of a parameter tree."""

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, partition(leaf.shape, spec(path_string(path)), mesh))

    return jax.tree_util.tree_map_with_path(one, tree)
