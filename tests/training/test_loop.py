"""The loop: resuming is exact, also after being killed."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twig_jax.presets import preset
from twig_jax.training.config import DataConfig, OptimConfig, TrainConfig
from twig_jax.training.loop import fit

STEPS, KILLED_AT = 6, 4

KILLED_RUN = """
import os
import jax
from twig_jax import presets
from twig_jax.config import *
from twig_jax.models.llava import init_base
from twig_jax.models.twig import init_twig
from twig_jax.training.config import *
from twig_jax.training.loop import fit

presets.PRESETS["tiny"] = base, twig = {models!r}
params = init_base(base, jax.random.key(1))
fit(
    {config!r},
    init_twig(params, base.text, twig),
    params,
    callback=lambda step, _: os._exit(9) if step == {killed_at} else {{}},
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
        "data": DataConfig(batch_size=8, blocks=1, block=64),
    }
    return TrainConfig("twig", str(out), **settings | changes)


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def start():
    """(twig, base) as a new process draws them."""
    from twig_jax.models.llava import init_base
    from twig_jax.models.twig import init_twig

    models, twig = preset("tiny")
    base = init_base(models, jax.random.key(1))
    return init_twig(base, models.text, twig), base


def test_killed_and_resumed_equals_never_stopped(start, tmp_path):
    script = KILLED_RUN.format(
        models=preset("tiny"), config=config(tmp_path / "killed"), killed_at=KILLED_AT
    )
    killed = subprocess.run(
        [sys.executable, "-c", script], env=os.environ, capture_output=True, text=True, check=False
    )
    assert killed.returncode == 9, killed.stderr
    resumed = fit(config(tmp_path / "killed"), *start, progress=False)
    whole = fit(config(tmp_path / "whole"), *start, progress=False)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    jax.tree.map(lambda a, b: np.any(a != b) or pytest.fail("untrained"), whole, start[0])
    assert lines(tmp_path / "killed")[-1]["loss"] == lines(tmp_path / "whole")[-1]["loss"]
    # A run that is complete has nothing left to do.
    again = fit(config(tmp_path / "whole"), *start, progress=False)
    jax.tree.map(np.testing.assert_array_equal, again, whole)


def test_the_log_has_figures_of_training_and_callback(start, tmp_path):
    fit(
        config(tmp_path, steps=4),
        *start,
        callback=lambda step, params: {"tokar": step / 10},
        progress=False,
    )
    log = lines(tmp_path)
    assert [line["step"] for line in log] == [2, 3, 4, 4]
    assert [line["tokar"] for line in log if "tokar" in line] == [0.2, 0.4]
    training = next(line for line in log if line["step"] == 3)
    assert {"loss", "lr", "accuracy", "grad_norm", "skipped", "step_time"} <= training.keys()
    assert 0 <= training["accuracy"] <= 1 and training["skipped"] == 0


def test_ten_bad_steps_in_a_row_stop_the_run(start, tmp_path):
    twig, base = start
    broken = jax.tree.map(lambda x: x * jnp.nan, twig)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        fit(config(tmp_path, steps=20, log_every=5), broken, base, progress=False)
    assert not (tmp_path / "metrics.jsonl").read_text().count('"step": 10')
