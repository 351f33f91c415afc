"""What launchers set up before they compute, and what they say about where they ran."""

import os
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp


def cache_folder() -> Path:
    """Where things are kept between starts: twig_jax in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "twig_jax"


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that a second start is faster.

    The folder is $JAX_COMPILATION_CACHE_DIR, else `cache_folder`.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def environment() -> dict[str, Any]:
    """Device and versions, for result files."""
    import flax

    device = jax.devices()[0]
    cores = f", {os.cpu_count()} cores" if device.platform == "cpu" else ""
    return {
        "device": f"{jax.device_count()} x {device.device_kind}{cores}",
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "flax": flax.__version__,
        },
    }


def memory_used() -> int:
    """Most bytes in use so far: of the first device, or of the process where that is the CPU."""
    stats = jax.local_devices()[0].memory_stats()
    if stats is not None and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def bandwidth() -> float:
    """Bytes/s this machine reads in a large reduction, the best of thirty."""
    x = jnp.ones((1 << 27,), jnp.float32)
    total = jax.jit(lambda x: x.sum())
    total(x).block_until_ready()
    times = []
    for _ in range(30):
        began = time.perf_counter()
        total(x).block_until_ready()
        times.append(time.perf_counter() - began)
    return x.nbytes / min(times)
