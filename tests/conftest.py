"""What all tests run under: eight fake devices, strict dtype promotion, warnings as errors."""

import os

# Before jax is imported: its backend reads them once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        dest="golden_dir",
        default=None,
        help="folder of further golden cases, in the format of tests/golden",
    )
