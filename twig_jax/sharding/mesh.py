"""Device meshes with the axes ('data', 'fsdp', 'tensor')."""

import jax
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "tensor")


def make_mesh(data: int = 0, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over all devices; `data=0` takes what the other two axes leave.

    Raises ValueError where the sizes do not multiply to the number of devices.
    """
    devices = jax.device_count()
    data = data or devices // (fsdp * tensor)
    if data * fsdp * tensor != devices:
        raise ValueError(
            f"mesh data={data} x fsdp={fsdp} x tensor={tensor} does not use the {devices} "
            "devices; choose sizes whose product is that number"
        )
    return jax.make_mesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3)
