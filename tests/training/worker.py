"""A training run in a process of its own: python -m tests.training.worker OUT SETTING...

DIE=step kills it while it saves that step; ADDRESS=host:port and INDEX=i make it one of two;
TARGETS=folder writes what the base teaches there instead; TOLD tells the second to stop before it
begins.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from jax.experimental import multihost_utils

from tests.training.conftest import TINY
from twig_jax import presets
from twig_jax.checkpoints.convert import placing
from twig_jax.models.llava import init_base
from twig_jax.models.twig import init_twig
from twig_jax.sharding.mesh import make_mesh
from twig_jax.training import log, targets
from twig_jax.training.config import DataConfig, OptimConfig, TrainConfig
from twig_jax.training.loop import fit
from twig_jax.training.overrides import override
from twig_jax.training.preemption import Preempted

ROOT = Path(__file__).resolve().parents[2]
PREEMPTED = 75


def config(out, *settings):
    """A run of the tiny twig, of 20 steps."""
    return override(
        TrainConfig(
            "twig",
            str(out),
            steps=20,
            preset="tiny",
            save_every=5,
            log_every=1,
            optim=OptimConfig(lr=1e-2, clip=1.0),
            data=DataConfig(batch_size=8, row_tokens=212),
        ),
        settings,
    )


def start():
    """(twig, base), the same in any process."""
    models, twig = TINY
    rng = np.random.default_rng(0)
    base = jax.tree.map(
        lambda shape: rng.normal(0, 0.2, shape.shape).astype(np.float32),
        jax.eval_shape(lambda key: init_base(models, key), jax.random.key(0)),
    )
    return init_twig(base, models.text, twig), base


def lines(out):
    """What a run has noted, oldest first."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out):
    """{step: loss} of what it has noted."""
    return {line["step"]: line["loss"] for line in lines(out) if "loss" in line}


def worker(out, *settings, devices=8, **environment):
    """Starts one."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    return subprocess.Popen(
        [sys.executable, "-m", "tests.training.worker", str(out), *settings],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_address():
    """Where nobody listens."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def two_workers(out, *settings, **environment):
    """Starts two that are one run, of four devices each."""
    address = free_address()
    return [
        worker(out, *settings, devices=4, ADDRESS=address, INDEX=str(index), **environment)
        for index in range(2)
    ]


def finish(process):
    """(status, output, end of the errors) of one."""
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err[-3000:]


def die_saving(out, step):
    """Kills this process as soon as the checkpoint of that step is being written."""

    def watch():
        folder = Path(out) / "checkpoints"
        while True:
            names = os.listdir(folder) if folder.is_dir() else []
            if any(name.startswith(f"{step}.") for name in names):
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.0005)

    threading.Thread(target=watch, daemon=True).start()


def main(out, *settings):
    presets.PRESETS["tiny"] = TINY
    log.curves = lambda path, lines: None  # they take a second to draw
    if "DIE" in os.environ:
        die_saving(out, int(os.environ["DIE"]))
    if "ADDRESS" in os.environ:
        jax.distributed.initialize(
            os.environ["ADDRESS"], num_processes=2, process_id=int(os.environ["INDEX"])
        )
        # As on a torus of TPUs, where a host's devices need not be beside each other.
        both = sorted(jax.devices(), key=lambda d: (d.id % 4, d.process_index))
        targets.make_mesh = partial(make_mesh, devices=both)
        # What device_put compares the values of all hosts by, which takes long.
        with mock.patch.object(multihost_utils, "assert_equal", side_effect=AssertionError):
            kernel = placing(make_mesh(2, 2, 2))("lm_head/kernel", np.ones((8, 8), np.float32))
        assert not kernel.is_fully_addressable
    run, (twig, base) = config(out, *settings), start()
    if "TOLD" in os.environ and os.environ["INDEX"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    try:
        if "TARGETS" in os.environ:
            targets.write_targets(run, base, os.environ["TARGETS"])
        else:
            fit(run, twig, base, progress=False)
    except Preempted as notice:
        print(notice)
        sys.exit(PREEMPTED)


if __name__ == "__main__":
    main(*sys.argv[1:])
