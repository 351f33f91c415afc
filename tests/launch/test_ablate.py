"""The ablation launcher, as a user runs it."""

import json
import shutil

import pytest
from safetensors.numpy import load_file

from tests.launch.process import launch

REINFORCED = """
import dataclasses
from configs import digits_twigpp_stage2

def get_config():
    config = digits_twigpp_stage2.get_config()
    few = dataclasses.replace(config.reinforce, actions=4, at_a_time=4, budgets=(32.0,))
    config = dataclasses.replace(config, steps=2, validation_samples=4, reinforce=few)
    return dataclasses.replace(config, base="{base}", K_f=4)
"""


def ablate(*arguments):
    return launch("ablate", "--config", "configs/digits_twig.py", *arguments)


def test_a_twig_is_trained_answers_and_is_timed(shallow, tmp_path):
    few = ("--set", "steps=2", "--set", "data.batch_size=8", "--set", "whole_base=False")
    few += ("--ablations", "attention", "--limit", 4, "--timed_samples", 1, "--repeats", 1)
    few += ("--set", f"base={shallow[1]}", "--set", "K_f=4", "--batch", 4, "--out", tmp_path)
    done = ablate(*few, "--avg_retained", 32, "--json", "-")
    assert done.returncode == 0, done.stderr
    lines = json.loads(done.stdout)["results"]
    assert [line["variant"] for line in lines] == [
        "base, layer K-1", "base, layer K+T-1", "twig, last layer",
    ]  # fmt: skip
    assert all(line["relacc"] is not None and line["relspd"] > 0 for line in lines)
    assert [line["tokar"] is None for line in lines] == [True, True, False]
    assert {line["retained"] for line in lines} == {16}
    assert "RelAcc %" in done.stderr and (tmp_path / "ablations.png").is_file()
    # Another run neither trains nor asks again; without a budget there is nothing to tell.
    done = ablate(*few, "--avg_retained", 9, "--json", "-")
    assert done.returncode == 0, done.stderr
    assert "training" not in done.stderr
    assert all(line["relacc"] is None for line in json.loads(done.stdout)["results"])


def test_a_reinforced_twig_grows_on_a_taught_one(shallow, tmp_path):
    """The taught ones are there; the reinforced ones but for one budget have to be trained."""
    _, base, _, grown = shallow
    twigs = ["configured", "distill.prediction=0.0"]
    twigs += ["configured+reinforced+reinforce.budgets=(32.0,)"]
    twigs += ["p_head=False,distill.prediction=0.0,distill.attention=0.0"]
    for name in twigs:
        shutil.copytree(grown, tmp_path / "twigs" / name / "seed0" / "twig")
    config = tmp_path / "reinforced.py"
    config.write_text(REINFORCED.format(base=base))
    done = ablate(
        "--config", "configs/digits_twigpp_stage1.py", "--ablations", "stages",
        "--set", f"base={base}", "--set", "K_f=4", "--avg_retained", 32,
        "--reinforced", config, "--limit", 4, "--timed_samples", 0,
        "--batch", 4, "--out", tmp_path, "--json", "-",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    trained = tmp_path / "twigs" / "configured+reinforced" / "seed0"
    assert done.stderr.count("training ") == 1 and f"training {trained}" in done.stderr
    new, old = (load_file(twig / "model.safetensors") for twig in (trained / "twig", grown))
    changed = {name for name in new if (new[name] != old[name]).any()}
    assert changed and all("p_head" in name for name in changed)
    lines = json.loads(done.stdout)["results"]
    assert len(lines) == 6 and all(line["relacc"] > 0 for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--reinforced", "configs/digits_twig.py"), "reinforces nothing"),
        (("--ablations", "depth"), "no --ablations depth; there are: attention, init"),
        (("--task", "cats"), "no benchmark cats; there are: gqa"),
        (("--set", "step=3"), "step"),
    ],
)
def test_bad_input(arguments, message):
    done = ablate(*arguments)
    assert done.returncode == 1 and "ablate: " in done.stderr and message in done.stderr
