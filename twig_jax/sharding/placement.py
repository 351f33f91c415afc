"""Where arrays live on a mesh, and how they get there and back."""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from twig_jax.sharding.rules import partition, shardings


def spread(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains x to `partition` of the mesh that is set; without one it is x."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition(x.shape, axes, mesh))


def put(x: Any, sharding: NamedSharding) -> jax.Array:
    """An array in a sharding; every host has the same one and places its own parts."""
    if sharding.is_fully_addressable or not getattr(x, "is_fully_addressable", True):
        return jax.device_put(x, sharding)
    # device_put would gather and compare the values of all hosts first.
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def distribute(tree: Any, mesh: Mesh) -> Any:
    """Parameters in their shardings, as `put` places them."""
    return jax.tree.map(put, tree, shardings(tree, mesh))


@functools.cache
def _everywhere(mesh: Mesh) -> Any:
    """Copies an array to all devices; one function a mesh, as each compiles for itself."""
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))


def gather(tree: Any) -> Any:
    """Numpy arrays of device arrays, on every host; all hosts call it."""

    def whole(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return x
        # One by one, as they would not all fit onto each device.
        return jax.device_get(_everywhere(x.sharding.mesh)(x))  # type: ignore[attr-defined]

    return jax.device_get(jax.tree.map(whole, tree))
