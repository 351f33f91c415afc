"""What accelerators can do, from their makers' data sheets."""

import re
from dataclasses import dataclass
from typing import Any, NamedTuple


class Cuda(NamedTuple):
    """What compilers want to know of an NVIDIA GPU.

    capability: of CUDA. cores, threads: streaming multiprocessors and what each runs at a time,
    with so many units for float32. shared: KiB of shared memory of a block. cache: MiB, the second
    level. clock: GHz, the highest.
    """

    capability: tuple[int, int]
    cores: int
    threads: int
    units: int
    shared: int
    cache: int
    clock: float


@dataclass(frozen=True)
class Chip:
    """kind: part of what jax calls the device. memory: GiB. flops: dense bfloat16, a second.

    bandwidth: bytes/s of its main memory. link: bytes/s that it sends to its neighbours in a ring:
    over two links of a TPU, one each way, over all of a GPU's NVLinks, or over PCIe. cuda: of GPUs.
    """

    kind: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    cuda: Cuda | None = None


# Google Cloud's TPU system architecture pages and NVIDIA's data sheets (SXM versions), with the
# memory that programs find free; NVIDIA's CUDA programming guide and architecture papers.
CHIPS = {
    "v4": Chip("TPU v4", 32, 275e12, 1228e9, 100e9),
    "v5e": Chip("TPU v5 lite", 16, 197e12, 819e9, 100e9),
    "v5p": Chip("TPU v5", 95, 459e12, 2765e9, 200e9),
    "v6e": Chip("TPU v6 lite", 32, 918e12, 1640e9, 200e9),
    "l4": Chip("L4", 22, 121e12, 300e9, 32e9, Cuda((8, 9), 58, 1536, 128, 99, 48, 2.04)),
    "a100": Chip("A100", 79, 312e12, 2039e9, 300e9, Cuda((8, 0), 108, 2048, 64, 163, 40, 1.41)),
    "h100": Chip("H100", 79, 989e12, 3350e9, 450e9, Cuda((9, 0), 132, 2048, 128, 227, 50, 1.98)),
    "h200": Chip("H200", 139, 989e12, 4800e9, 450e9, Cuda((9, 0), 132, 2048, 128, 227, 50, 1.98)),
}


def runs_triton(device: Any) -> bool:
    """Whether a jax device is an NVIDIA GPU that Triton compiles for: Ampere or newer."""
    capability = str(getattr(device, "compute_capability", ""))  # "9.0"; of others none, or gfx942
    return re.fullmatch(r"\d+\.\d+", capability) is not None and float(capability) >= 8


def chip(device_kind: str) -> Chip | None:
    """The chip that jax's `device_kind` names, None for one that is not listed."""
    found = [chip for chip in CHIPS.values() if chip.kind in device_kind]
    # "TPU v5" is part of "TPU v5 lite".
    return max(found, key=lambda chip: len(chip.kind), default=None)
