"""What launchers set up before they compute, and what they say about where they ran."""

import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp


def cache_folder() -> Path:
    """Where things are kept between starts: twig_jax in the user's cache folder."""
    # Empty is as good as unset; where it is set there may be no home (a container's made-up user).
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twig_jax"


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that a second start is faster.

    The folder is $JAX_COMPILATION_CACHE_DIR, else `cache_folder`.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def environment() -> dict[str, Any]:
    """This host's devices, versions, and clocks where nvidia-smi tells them, for result files."""
    import flax
    import jaxlib

    device = jax.local_devices()[0]
    cores = f", {os.cpu_count()} cores" if device.platform == "cpu" else ""
    return {
        "device": f"{jax.local_device_count()} x {device.device_kind}{cores}",
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "flax": flax.__version__,
            "platform": device.client.platform_version,
        },
        **({"gpus": gpus} if (gpus := _gpus()) else {}),
    }


_ASKED = (
    "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,"
    "power.draw,power.limit,temperature.gpu,mig.mode.current"
)


def _gpus() -> list[dict[str, str]]:
    """What nvidia-smi says of each GPU, units included; nothing without it, or where it hangs."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={_ASKED}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    names = _ASKED.split(",")
    return [dict(zip(names, line.split(", "), strict=False)) for line in lines]


def memory_used() -> int:
    """Most bytes in use so far: of the first device, or of the process where that is the CPU."""
    stats = jax.local_devices()[0].memory_stats()
    if stats is not None and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def bandwidth() -> float:
    """Bytes/s this machine reads in a large reduction, the best of six times five."""
    x = _large()
    total = jax.jit(lambda x: x.sum())
    return x.nbytes / _quickest(lambda: total(x))


def copy_bandwidth() -> float:
    """Bytes/s this machine reads and writes back, both counted, in a large sum; as `bandwidth`."""
    x = _large()
    more = jax.jit(lambda x: x + 1, donate_argnums=0)

    def again() -> jax.Array:
        nonlocal x
        x = more(x)
        return x

    return 2 * x.nbytes / _quickest(again)


def _large() -> jax.Array:
    """So large that no cache holds it: 0.5 GiB, 2 on accelerators."""
    return jnp.ones((1 << (27 if jax.default_backend() == "cpu" else 29),), jnp.float32)


def product_rate(dtype: str) -> float:
    """Multiplications and additions/s of this machine in a large product, best of 6 x 5.

    dtype: of the matrices; sums are float32, without which CPUs have no fast product of bfloat16.
    float32 products have jax's default precision, as the models' do.
    """
    n = 1024 if jax.default_backend() == "cpu" else 8192
    # Not of ones: processors draw less power from equal bits, and run faster.
    x = jax.random.normal(jax.random.key(0), (n, n), dtype)
    product = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32))
    return 2 * n**3 / _quickest(lambda: product(x))


def _quickest(call: Callable[[], jax.Array]) -> float:
    """Seconds of a call, in the quickest of six times five of them, after one that compiles."""
    call().block_until_ready()
    times = []
    for _ in range(6):
        began = time.perf_counter()
        # Accelerators go from one to the next without waiting for the host.
        for _ in range(5):
            last = call()
        last.block_until_ready()
        times.append((time.perf_counter() - began) / 5)
    return min(times)
