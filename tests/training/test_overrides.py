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
    assert CONFIG.steps == 10


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optim.learning=1", "no setting 'optim.learning'"),
        ("step=1", "did you mean steps"),
        ("steps=many", "steps is int"),
        ("steps=1.5", "steps is int"),
        ("steps", "name=value"),
        ("optim=1", "group of settings"),
        ("steps.x=1", "no settings of its own"),
    ],
)
def test_mistakes_are_named(assignment, message):
    with pytest.raises(ValueError, match=message):
        override(CONFIG, [assignment])
