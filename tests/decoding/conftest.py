"""What the tests of decoding run under."""

import jax
import pytest


@pytest.fixture(autouse=True)
def precise():
    """The highest matmul precision: programs of different shapes then differ by about 1e-6."""
    with jax.default_matmul_precision("highest"):
        yield
