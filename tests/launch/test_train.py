"""Training runs, as a user starts them, for a few steps."""

import json
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from absl.app import UsageError

from launch import numbers
from launch.training import read_config
from tests.launch.process import ROOT, environment, launch, python, slurm_step
from twig_jax.hardware import find_topology

train = partial(launch, "train")


def test_sigterm_ends_with_the_status_that_asks_for_more(tmp_path):
    """The run is told to stop once it has logged a step."""
    out = tmp_path / "run"
    settings = (
        "steps=500",
        f"out={out}",
        "data.batch_size=8",
        "data.row_tokens=212",
        "log_every=1",
    )
    command = [sys.executable, "-m", "launch.train", "--config", "configs/digits_twig.py"]
    with subprocess.Popen(
        [*command, *(f"--set={s}" for s in settings)],
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        log = out / "metrics.jsonl"
        deadline = time.monotonic() + 600
        while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.2)
        process.terminate()
        _, said = process.communicate(timeout=600)
    assert process.returncode == 75, said
    step = int(re.search(r"saved at step (\d+) of 500", said)[1])
    assert [path.name for path in (out / "checkpoints").iterdir()] == [str(step)]


def test_sigterm_before_training_ends_with_that_status_too(tmp_path):
    """Here while the configuration is read: what it loads then can take minutes."""
    (tmp_path / "slow.py").write_text(
        f"import pathlib, time\npathlib.Path({str(tmp_path / 'begun')!r}).touch()\ntime.sleep(60)\n"
    )
    # jax.distributed has a handler of its own, also in a job of one process.
    with slurm_step("train", [["--config", tmp_path / "slow.py"]]) as (process,):
        deadline = time.monotonic() + 120
        while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.1)
        process.terminate()
        _, said = process.communicate(timeout=30)
    assert process.returncode == 75, said


def test_the_processes_of_a_slurm_step_train_one_twig(tmp_path):
    """As srun starts them, with two devices each: one speaks and writes, all end well."""
    settings = ("steps=1", "validation_samples=4")
    (tmp_path / "tiny.py").write_text(
        "from tests.training.conftest import TINY\n"
        "from tests.training.worker import config\n"
        "from twig_jax import presets\n"
        "presets.PRESETS['tiny'] = TINY\n"
        f"get_config = lambda: config({str(tmp_path / 'run')!r})\n"
    )
    arguments = ["--config", tmp_path / "tiny.py", "--export", tmp_path / "twig"]
    arguments += [f"--set={s}" for s in settings]
    with slurm_step("train", [arguments] * 2, devices=2) as processes:
        ended = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ended
    # The collectives' library greets on standard output, from several threads at once.
    said = [[x for x in out.splitlines() if x.startswith("step ")] for out, _ in ended]
    assert len(said[0]) == 1 and said[0][0].startswith("step 1: exact ")
    assert "tokar" in said[0][0]
    assert said[1] == []
    logged = [[x for x in err.splitlines() if x.startswith("step ")] for _, err in ended]
    assert [x[:18] for x in logged[0]] == ["step 1 of 1: loss "] and logged[1] == []
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 1]
    assert {p.name for p in (tmp_path / "twig").iterdir()} == {"model.safetensors", "twig.json"}


def test_what_the_base_teaches_is_written(tmp_path):
    few = ("--set=steps=1", "--set=data.batch_size=8", "--set=data.row_tokens=212")
    stage = ("--config", "configs/digits_twigpp_stage1.py", *few)
    result = train(*stage, "--write_targets", tmp_path / "targets")
    assert result.returncode == 0, result.stderr[-2000:]
    names = {path.name for path in (tmp_path / "targets").iterdir()}
    assert names == {"000001-0of1.npz", "targets.json"}


@pytest.mark.parametrize(
    ("name", "text", "said"), [("a.md", "", "no Python file"), ("a.py", "", "has no get_config")]
)
def test_what_is_no_configuration_is_told(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        read_config(tmp_path / name)


def test_an_export_that_cannot_be_written_is_told_at_once(tmp_path):
    (tmp_path / "taken").touch()
    run = ("--config", "configs/digits_twig.py", f"--set=out={tmp_path / 'run'}")
    done = train(*run, "--export", tmp_path / "taken")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "taken" in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("main", "status", "said"),
    [
        ("raise app.UsageError('give more')", 1, "tool: give more (--help lists the flags)\n"),
        ("raise KeyboardInterrupt", 130, "\ntool: interrupted\n"),
        ("sys.exit(flags.FLAGS.out)", 1, f"{Path.home()}/runs\n"),
    ],
)
def test_launchers_end_with_a_line(main, status, said):
    program = (
        "import sys; from absl import app, flags; from launch import run; "
        "flags.DEFINE_string('out', None, ''); sys.argv = ['tool.py', '--out=~/runs']\n"
        f"def main(argv):\n    {main}\n"
        "run(main)"
    )
    done = python("-c", program)
    assert (done.returncode, done.stderr) == (status, said)


def test_one_of_several_that_fails_does_not_wait_for_the_others():
    """They may be in a computation with it, and jax waits for all before it leaves in order."""
    program = (
        "import atexit, sys, jax; jax.process_count = lambda: 2; "
        "atexit.register(print, 'left in order'); from launch import run, train; "
        "sys.argv = ['train', '--config', 'configs/none.py']; run(train.main)"
    )
    done = python("-c", program)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "train: no configuration file configs/none.py\n"


@pytest.mark.parametrize("values", [[], ["a"], ["0"], ["16", "-1"], ["nan"], ["inf"], ["88.9"]])
def test_list_flags_take_numbers(values):
    with pytest.raises(UsageError, match="--pruned takes numbers above 0 and below 1, not"):
        numbers("pruned", values, below=1)
    assert numbers("pruned", ["0.5", "0.25"], below=1) == [0.5, 0.25]


def test_a_plan_is_printed_and_nothing_trained(tmp_path):
    plan = ("--plan", "--topology", "h100:8", "--json", tmp_path / "plan.json")
    result = train("--config", "configs/llava15_7b_twig.py", *plan)
    assert result.returncode == 0, result.stderr[-2000:]
    there = find_topology("h100:8")[2] is not None  # jax's compiler for NVIDIA GPUs
    how = "compiled ahead of time" if there else "ESTIMATED from shapes"
    assert f"h100:8: 8 devices, {how}" in result.stdout
    assert json.loads((tmp_path / "plan.json").read_text())["fits"]
    result = train("--config", "configs/llava15_7b_twig.py", "--plan")
    assert result.returncode == 1 and "--plan and --topology go together" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "configs/none.py"], "no configuration file"),
        (["--config", "configs/digits_twig.py", "--set", "optim.rate=1"], "no setting"),
        (["--config", "configs/digits_twig.py", "--stage=twig"], "Unknown command line flag"),
        (
            ["--config", "configs/digits_twig.py", "--set", "base=/nowhere"],
            "no checkpoint folder /nowhere",
        ),
    ],
)
def test_mistakes_are_named(arguments, message):
    result = train(*arguments)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
