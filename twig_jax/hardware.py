"""What accelerators can do, from their makers' data sheets."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """kind: part of what jax calls the device. memory: GiB. flops: dense bfloat16, a second."""

    kind: str
    memory: float
    flops: float


# Google Cloud's TPU system architecture pages and NVIDIA's data sheets (SXM versions), with the
# memory that programs find free.
CHIPS = {
    "v4": Chip("TPU v4", 32, 275e12),
    "v5e": Chip("TPU v5 lite", 16, 197e12),
    "v5p": Chip("TPU v5", 95, 459e12),
    "v6e": Chip("TPU v6 lite", 32, 918e12),
    "l4": Chip("L4", 22, 121e12),
    "a100": Chip("A100", 79, 312e12),
    "h100": Chip("H100", 79, 989e12),
    "h200": Chip("H200", 139, 989e12),
}


def chip(device_kind: str) -> Chip | None:
    """The chip that jax's `device_kind` names, None for one that is not listed."""
    found = [chip for chip in CHIPS.values() if chip.kind in device_kind]
    # "TPU v5" is part of "TPU v5 lite".
    return max(found, key=lambda chip: len(chip.kind), default=None)
