"""Device meshes with the axes ('data', 'fsdp', 'tensor')."""

import math

import jax
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "tensor")


def make_mesh(data: int = 0, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over all devices; a size of 0 takes what the other two leave.

    Raises ValueError where the sizes do not multiply to the number of devices.
    """
    return jax.make_mesh(
        mesh_sizes((data, fsdp, tensor), jax.device_count()),
        AXES,
        axis_types=(AxisType.Auto,) * 3,
    )


def mesh_sizes(sizes: tuple[int, int, int], devices: int) -> tuple[int, int, int]:
    """The sizes (data, fsdp, tensor) for so many devices, of which one 0 takes what is left.

    Raises ValueError where they do not multiply to that number.
    """
    left = devices // max(1, math.prod(size for size in sizes if size))
    data, fsdp, tensor = (size or left for size in sizes)
    if data * fsdp * tensor != devices or sizes.count(0) > 1:
        raise ValueError(
            f"mesh data={data} x fsdp={fsdp} x tensor={tensor} does not use the {devices} "
            "devices; choose sizes whose product is that number, or one of them as 0"
        )
    return data, fsdp, tensor
