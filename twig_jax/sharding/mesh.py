"""Device meshes with the axes ('data', 'fsdp', 'tensor')."""

import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

AXES = ("data", "fsdp", "tensor")
ROWS = AXES[:2]  # those that rows of a batch are spread over
_TYPES = (AxisType.Auto,) * 3


def make_mesh(
    data: int = 0, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh over the devices, None for all; a size of 0 takes what the other two leave.

    Raises ValueError where the sizes do not multiply to the number of devices.
    """
    count = jax.device_count() if devices is None else len(devices)
    sizes = mesh_sizes((data, fsdp, tensor), count)
    try:
        return jax.make_mesh(sizes, AXES, _TYPES, devices=devices)
    except NotImplementedError:  # a torus of TPUs, an axis of which would have to be split
        split = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(split, AXES, axis_types=_TYPES)


def abstract_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> AbstractMesh:
    """A mesh without devices, for shapes and their shardings."""
    return AbstractMesh((data, fsdp, tensor), AXES, axis_types=_TYPES)


def mesh_sizes(sizes: tuple[int, int, int], devices: int) -> tuple[int, int, int]:
    """The sizes (data, fsdp, tensor) for so many devices, of which one 0 takes what is left.

    Raises ValueError where they do not multiply to that number.
    """
    left = devices // max(1, math.prod(size for size in sizes if size))
    data, fsdp, tensor = (size or left for size in sizes)
    if data * fsdp * tensor != devices or sizes.count(0) > 1:
        raise ValueError(
            f"mesh data={sizes[0]} x fsdp={sizes[1]} x tensor={sizes[2]} does not use the "
            f"{devices} devices; choose sizes whose product is that number, or one of them as 0"
        )
    return data, fsdp, tensor
