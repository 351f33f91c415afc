"""What all tests run under: eight fake devices, strict dtype promotion, warnings as errors."""

import atexit
import gc
import os
import shutil
import tempfile

from tests import QUICK_COMPILING

# What one test has compiled, no other compiles again: the workers and the processes they start
# share a folder that ends with the run.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Before jax is imported: its backend reads them once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ["XLA_FLAGS"] = " ".join(
        [
            os.environ.get("XLA_FLAGS", ""),
            "--xla_force_host_platform_device_count=8",
            QUICK_COMPILING,
        ]
    )

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
# Tracing makes objects by the million, nearly none of them in cycles.
gc.set_threshold(100_000, 10, 10)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        dest="golden_dir",
        default=None,
        help="folder of further golden cases, in the format of tests/golden",
    )
    parser.addoption(
        "--renew-costs",
        action="store_true",
        help="write what programs cost now to tests/costs.json, instead of comparing",
    )


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs():
    """Programs go with the module that compiled them: together they would pass Linux's limit
    on the memory maps of a process (vm.max_map_count), and the compiler would abort."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def draw():
    """draw(shapes, seed=0): random parameters for a tree of shapes, as jax arrays.

    Larger than initial values, which leave attention uniform and hide errors; nothing is compiled.
    """

    def draw(shapes, seed=0):
        rng = np.random.default_rng(seed)

        def leaf(path, shape):
            kind = path[-1].key
            x = rng.standard_normal(shape.shape, np.float32) * (0.3 if kind == "kernel" else 0.5)
            return jax.numpy.asarray(x + 1 if kind == "scale" else x)

        return jax.tree_util.tree_map_with_path(leaf, shapes)

    return draw


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A folder with a Llama tokenizer, as LLaVA-1.5's own folders have it."""
    from tests.llama import train  # sentencepiece is not needed elsewhere

    folder = tmp_path_factory.mktemp("llama")
    train(folder)
    return folder
