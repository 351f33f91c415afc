"""The loop: resuming is exact, also after being killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twig_jax.models.llava import init_base
from twig_jax.models.twig import init_twig
from twig_jax.presets import preset
from twig_jax.training.config import DataConfig, OptimConfig, TrainConfig
from twig_jax.training.loop import fit
from twig_jax.training.preemption import Preempted

ROOT = Path(__file__).resolve().parents[2]
STEPS, KILLED_AT = 6, 4

KILLED_RUN = f"""
import os
import sys
from tests.training.conftest import TINY
from tests.training.test_loop import config, start
from twig_jax import presets
from twig_jax.training.loop import fit

presets.PRESETS["tiny"] = TINY
fit(
    config(sys.argv[1]),
    *start(),
    callback=lambda step, params: os._exit(9) if step == {KILLED_AT} else {{}},
    progress=False,
)
"""


def config(out, **changes):
    settings = {
        "preset": "tiny",
        "steps": STEPS,
        "save_every": 2,
        "log_every": 3,
        "optim": OptimConfig(lr=1e-2, clip=1.0),
        "data": DataConfig(batch_size=8, row_tokens=212),
    }
    return TrainConfig("twig", str(out), **settings | changes)


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def start():
    """(twig, base), the same in any process."""
    models, twig = preset("tiny")
    rng = np.random.default_rng(0)
    base = jax.tree.map(
        lambda shape: rng.normal(0, 0.2, shape.shape).astype(np.float32),
        jax.eval_shape(lambda key: init_base(models, key), jax.random.key(0)),
    )
    return init_twig(base, models.text, twig), base


def test_killed_and_resumed_equals_never_stopped(tmp_path):
    command = [sys.executable, "-c", KILLED_RUN, str(tmp_path / "killed")]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert killed.returncode == 9, killed.stderr
    resumed = fit(config(tmp_path / "killed"), *start(), progress=False)
    whole = fit(
        config(tmp_path / "whole"),
        *start(),
        callback=lambda step, params: {"tokar": step / 10},
        progress=False,
    )
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    jax.tree.map(lambda a, b: np.any(a != b) or pytest.fail("untrained"), whole, start()[0])

    log = lines(tmp_path / "whole")
    assert [line["step"] for line in log] == [2, 3, 4, 6, 6]
    assert [line["tokar"] for line in log if "tokar" in line] == [0.2, 0.4, 0.6]
    training = log[1]
    assert {"loss", "lr", "accuracy", "grad_norm", "skipped", "step_time"} <= training.keys()
    assert 0 <= training["accuracy"] <= 1 and training["skipped"] == 0

    # A run that is complete has nothing left to do.
    again = fit(config(tmp_path / "whole"), *start(), progress=False)
    jax.tree.map(np.testing.assert_array_equal, again, whole)


def test_told_to_stop_it_saves_and_goes_on_later(tmp_path):
    def tell(step, params):
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="saved at step 3 of 6"):
        fit(config(tmp_path / "told"), *start(), callback=tell, progress=False)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert [line["step"] for line in lines(tmp_path / "told")] == [2, 3]
    resumed = fit(config(tmp_path / "told"), *start(), progress=False)
    whole = fit(config(tmp_path / "whole"), *start(), progress=False)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


def test_ten_bad_steps_in_a_row_stop_the_run(tmp_path):
    twig, base = start()
    broken = jax.tree.map(lambda x: x * jnp.nan, twig)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        fit(config(tmp_path, steps=20, log_every=5), broken, base, progress=False)
    assert not (tmp_path / "metrics.jsonl").read_text().count('"step": 10')
