"""A training run in a process of its own: python -m tests.training.worker OUT SETTING...

DIE=step kills it while it saves that step; ADDRESS=host:port and INDEX=i make it one of two.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np

from tests.training.conftest import TINY
from twig_jax import presets
from twig_jax.models.llava import init_base
from twig_jax.models.twig import init_twig
from twig_jax.training.config import DataConfig, OptimConfig, TrainConfig
from twig_jax.training.loop import fit
from twig_jax.training.overrides import override
from twig_jax.training.preemption import Preempted

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
    if "DIE" in os.environ:
        die_saving(out, int(os.environ["DIE"]))
    if "ADDRESS" in os.environ:
        jax.distributed.initialize(
            os.environ["ADDRESS"], num_processes=2, process_id=int(os.environ["INDEX"])
        )
    try:
        fit(config(out, *settings), *start(), progress=False)
    except Preempted as notice:
        print(notice)
        sys.exit(PREEMPTED)


if __name__ == "__main__":
    main(*sys.argv[1:])
