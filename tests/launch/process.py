"""Programs in processes of their own, as a user starts them."""

import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from tests import QUICK_COMPILING

ROOT = Path(__file__).resolve().parents[2]


def environment(**variables):
    """This one, with a single device: what one program has compiled, others load."""
    return os.environ | {"XLA_FLAGS": QUICK_COMPILING, "HF_HUB_OFFLINE": "1"} | variables


def python(*arguments, timeout=900, **variables):
    """Python from the repository's folder, to its end."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def launch(name, *arguments):
    """A launcher, which draws no progress bar where there is no terminal."""
    done = python("-m", f"launch.{name}", *arguments)
    assert "%|" not in done.stderr, done.stderr
    return done


@contextmanager
def slurm_step(name, shares, devices=1):
    """A launcher's processes as srun starts them, one for each list of further arguments."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        job = free.getsockname()[1]  # that jax derives the coordinator's port from
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", f"launch.{name}", "--distributed", *map(str, arguments)],
            cwd=ROOT,
            env=environment(
                XLA_FLAGS=f"{QUICK_COMPILING} --xla_force_host_platform_device_count={devices}",
                SLURM_JOB_ID=str(job),
                SLURM_STEP_NODELIST="localhost",
                SLURM_NTASKS=str(len(shares)),
                SLURM_PROCID=str(index),
                SLURM_LOCALID=str(index),
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, arguments in enumerate(shares)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
