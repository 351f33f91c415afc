"""Overrides of configurations from the command line."""

import pytest

from twig_jax.training.config import TrainConfig
from twig_jax.training.overrides import override

CONFIG = TrainConfig(stage="twig", out="runs/x", steps=10)


def test_values_take_their_fields_types():
    changed = override(
        CONFIG,
        ["optim.lr=2e-4", "steps=20", "mesh=(1, 2, 4)", "out=runs/y", "optim.clip=1", "base=b"],
    )
    assert changed.optim.lr == 2e-4
    assert changed.steps == 20
    assert changed.mesh == (1, 2, 4)
    assert changed.out == "runs/y"
    assert changed.base == "b"
    assert type(changed.optim.clip) is float
    assert CONFIG.steps == 10


def test_none_and_tuples_have_types_too():
    changed = override(
        CONFIG,
        [
            *("layers=3", "layers=None", "ema=0.9", "device_rows=2", "K=0", "base=None"),
            *("data.mix=(('cell', 1), ('find', 0.5))", "data.max_tokens=300"),
            *("deepen=(0, None, 1)", "reinforce.budgets=(16, 21.5)", "optim.clip=None"),
        ],
    )
    assert changed.layers is changed.base is changed.optim.clip is None
    assert (changed.ema, changed.device_rows, changed.K) == (0.9, 2, 0)
    assert changed.data.mix == (("cell", 1.0), ("find", 0.5))
    assert changed.deepen == (0, None, 1)
    assert changed.reinforce.budgets == (16.0, 21.5)
    assert {type(x) for x in changed.reinforce.budgets} == {float}


def test_a_home_folder_is_meant_by_its_name(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    changed = override(CONFIG, ["out=~/run", "data.source=~/a~b.json", "base=x/~"])
    assert (changed.out, changed.data.source) == ("/home/me/run", "/home/me/a~b.json")
    assert changed.base == "x/~"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optim.learning=1", "no setting 'optim.learning'"),
        ("step=1", "did you mean steps"),
        ("steps=many", "steps is int"),
        ("steps=1.5", "steps is int"),
        ("steps", "name=value"),
        ("steps=None", r"steps is int \(10\), not NoneType"),
        ("steps={[]: 1}", r"steps is int \(10\), not str"),
        ("optim.clip=off", r"optim\.clip is float \| None \(None\), not str \('off'\)"),
        ("device_rows=2.5", "device_rows is int"),
        ("ema=yes", "ema is float"),
        ("ema=True", "ema is float"),
        ("layers=six", "layers is int"),
        ("K=1.5", "K is int"),
        ("data.mix=5", r"data\.mix is tuple"),
        ("data.mix=(('cell', 'much'),)", r"data\.mix is tuple"),
        ("data.batch_size=None", r"data\.batch_size is int"),
        ("mesh=None", "mesh is tuple"),
        ("mesh=(1, 'a')", r"mesh is tuple\[int, int, int\]"),
        ("mesh=(1, 2)", "mesh is tuple"),
        ("log_every=0", "log_every is 0, it must be at least 1"),
        ("save_every=-1", "save_every is -1, it must be at least 1"),
        ("device_rows=0", "device_rows is 0"),
        ("data.batch_size=0", r"data\.batch_size is 0"),
        ("data.workers=-1", r"data\.workers is -1, it must be at least 0"),
        ("reinforce.at_a_time=0", r"reinforce\.at_a_time is 0"),
        ("optim.warmup=100", r"optim\.warmup is 100, a share of all steps"),
        ("optim.clip=0", r"optim\.clip is 0, a norm is above 0; None clips nothing"),
        ("optim.clip=-1.0", r"optim\.clip is -1, a norm is above 0"),
        ("optim.lr=-1e-4", r"optim\.lr is -0\.0001, a learning rate is 0 or more"),
        ("ema=1", "ema is 1, a decay is between 0 and 1"),
        ("reinforce.budgets=(48, 16)", "they must ascend"),
        ("optim=1", "group of settings"),
        ("steps.x=1", "no settings of its own"),
    ],
)
def test_mistakes_are_named(assignment, message):
    with pytest.raises(ValueError, match=message):
        override(CONFIG, [assignment])
