"""What accelerators can do, from their makers' data sheets, and what compiles for them."""

import math
import os
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from jax.experimental import topologies


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
    # An L40 is no L4.
    found = [chip for chip in CHIPS.values() if re.search(rf"{chip.kind}(?!\d)", device_kind)]
    # "TPU v5" is part of "TPU v5 lite".
    return max(found, key=lambda chip: len(chip.kind), default=None)


def find_topology(name: str) -> tuple[Chip, int, Any]:
    """(chip, devices, what to compile for) of TPUs, such as v5e:2x4, or so many GPUs, h100:8.

    The last is None for GPUs without their compiler (jax's plug-in for CUDA). Raises ValueError for
    a topology that is not known, and for TPUs without their compiler.
    """
    chip, _, size = name.partition(":")
    if chip not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size):
        raise ValueError(
            f"no topology {name!r}; write a TPU slice as v5e:2x4 or a number of GPUs as h100:8;"
            f" there are: {', '.join(CHIPS)}"
        )
    if CHIPS[chip].cuda:
        count = math.prod(map(int, size.split("x")))
        return CHIPS[chip], count, _gpus(CHIPS[chip], count)
    devices = _tpus(name)
    return CHIPS[chip], len(devices), devices


def _tpus(name: str) -> Any:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU to ask about itself
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # of the plug-in, of its absence, of a slice it does not know
        raise ValueError(
            f"no TPU compiler for {name}: pip install 'jax[tpu]' here, and check that there is "
            f"such a slice ({str(error).splitlines()[0]})"
        ) from error


def _gpus(chip: Chip, count: int) -> Any:
    assert chip.cuda is not None
    c = chip.cuda
    # What XLA is told about a GPU that is not there (its GpuTargetConfigProto, as text).
    described = f"""
        platform_name: "CUDA"
        device_description_str: "NVIDIA {chip.kind}"
        runtime_version {{ major: 12 minor: 8 }}
        dnn_version_info {{ major: 9 minor: 8 }}
        gpu_device_info {{
          cuda_compute_capability {{ major: {c.capability[0]} minor: {c.capability[1]} }}
          core_count: {c.cores}
          threads_per_core_limit: {c.threads}
          fpus_per_core: {c.units}
          shared_memory_per_block: 49152
          shared_memory_per_block_optin: {c.shared * 2**10}
          shared_memory_per_core: {(c.shared + 1) * 2**10}
          l2_cache_size: {c.cache * 2**20}
          clock_rate_ghz: {c.clock}
          memory_bandwidth: {chip.bandwidth:.0f}
          device_memory_size: {chip.memory * 2**30:.0f}
          threads_per_block_limit: 1024
          threads_per_warp: 32
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
        }}
    """
    try:
        found = topologies.get_topology_desc(
            platform="cuda",
            topology_name=chip.kind,
            topology=f"1x1x{count}",
            target_config=described,
        )
    except NotImplementedError:  # no plug-in
        return None
    return found.devices
