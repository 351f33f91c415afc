"""Where activations and caches live, when a mesh is set."""

from typing import Any

import jax
from jax.sharding import PartitionSpec as P

ROWS = ("data", "fsdp")


def partition(shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Any) -> P:
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


def spread(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains x to `partition` of the mesh that is set; without one it is x."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition(x.shape, axes, mesh))
