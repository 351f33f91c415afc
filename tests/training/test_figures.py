"""What a run notes of itself is true."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.training.conftest import TINY
from tests.training.worker import config, lines, start
from twig_jax.training import loop
from twig_jax.training.data import open_batches
from twig_jax.training.flops import step_flops
from twig_jax.training.loop import fit
from twig_jax.training.losses import twig_loss
from twig_jax.training.optim import schedule
from twig_jax.training.plots import curves
from twig_jax.training.step import make_step


def test_what_is_noted(tmp_path, monkeypatch):
    """Figures of every kind, in the file and for TensorBoard; others' lines beyond are dropped."""
    monkeypatch.setattr("twig_jax.training.log.curves", curves)
    settings = ("steps=6", "save_every=2", "log_every=3")
    trained = fit(
        config(tmp_path, *settings),
        *start(),
        callback=lambda step, params: {"tokar": step / 10},
        progress=False,
    )
    jax.tree.map(lambda a, b: np.any(a != b) or pytest.fail("untrained"), trained, start()[0])
    log = lines(tmp_path)
    assert [line["step"] for line in log] == [2, 3, 4, 6, 6]
    assert [line["tokar"] for line in log if "tokar" in line] == [0.2, 0.4, 0.6]
    assert [line["step"] for line in log if "validation/loss" in line] == [2, 4, 6]
    training = log[1]
    assert training.keys() >= {
        *("loss", "lr", "accuracy", "agreement", "grad_norm", "update_norm", "skipped"),
        *("step_time", "input_wait", "tokens_per_s", "padding", "memory_gib"),
    }
    for share in ("accuracy", "agreement", "padding"):
        assert 0 <= training[share] <= 1
    assert training["skipped"] == 0
    assert 0 <= training["input_wait"] <= training["step_time"]
    flops = 8 * training["tflops"] * 1e12 * training["step_time"]  # of eight devices
    assert flops == pytest.approx(step_flops(config(tmp_path, *settings)), rel=1e-3)
    tokens = 8 * 212 * (1 - training["padding"])
    assert training["tokens_per_s"] * training["step_time"] == pytest.approx(tokens, rel=1e-3)
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 1000
    noted = scalars(tmp_path / "tensorboard")
    assert [step for step, name, _ in noted if name == "loss"] == [3, 6]
    assert [(step, value) for step, name, value in noted if name == "tokar"] == [
        (2, pytest.approx(0.2)),
        (4, pytest.approx(0.4)),
        (6, pytest.approx(0.6)),
    ]


def scalars(folder):
    """(step, name, value) of TensorBoard's files."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            data = data[16 + length :]
    return found


class Slow:
    """Batches that take as many seconds as there were, on a clock of our own."""

    def __init__(self, batches, clock):
        self.batches, self.clock, self.count = batches, clock, 0

    def __next__(self):
        self.count += 1
        self.clock[0] += self.count
        return next(self.batches)

    def __getattr__(self, name):
        return getattr(self.batches, name)


def test_what_takes_time_besides_steps_does_not_count(tmp_path, monkeypatch):
    """Compiling, saving and validating; to wait for input does."""
    clock, made = [0.0], []
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(loop, "open_batches", lambda *which: Slow(open_batches(*which), clock))

    def making(*arguments):
        step = make_step(*arguments)

        def taken(*arguments):
            clock[0] += 2 if made else 1000
            made.append(step)
            return step(*arguments)

        return taken

    def validate(step, params):
        clock[0] += 100
        return {}

    monkeypatch.setattr(loop, "make_step", making)
    run = config(tmp_path, "steps=6", "save_every=2", "log_every=3")
    fit(run, *start(), callback=validate, progress=False)
    noted = {line["step"]: line for line in lines(tmp_path) if "step_time" in line}
    assert [noted[n]["input_wait"] for n in (3, 6)] == [(2 + 3) / 2, (4 + 5 + 6) / 3]
    assert [noted[n]["step_time"] for n in (3, 6)] == [2 + 2.5, 2 + 5]


def test_what_is_held_out_is_read_once(tmp_path, monkeypatch):
    """All rows of four batches, the same at every validation, however many are taken at a time."""
    opened = []

    def counted(*arguments, **settings):
        opened.append(settings)
        return open_batches(*arguments, **settings)

    monkeypatch.setattr("twig_jax.training.validation.open_batches", counted)
    settings = ("steps=2", "save_every=1", "optim.lr=0.0", "data.batch_size=16", "device_rows=1")
    run = config(tmp_path, *settings)
    fit(run, *start(), progress=False)
    assert opened == [{"validation": True}]

    batches, loss = open_batches(run, TINY[0], validation=True), jax.jit(twig_loss(*TINY, 512))
    total = weight = 0.0
    for _ in range(4):
        value, metrics = loss(*start(), next(batches))
        total, weight = total + value * metrics["weight"], weight + metrics["weight"]
    batches.close()
    noted = [line["validation/loss"] for line in lines(tmp_path) if "validation/loss" in line]
    assert noted == [pytest.approx(float(total / weight), rel=1e-5)] * 2


def test_agreement_is_how_often_the_base_says_the_same(tmp_path):
    """A twig that is the base's own upper layers always does; another one does not."""
    models, twig = TINY
    assert (models.text.num_layers, 1) == (twig.K + twig.T, twig.T)
    still = ("steps=1", "optim.lr=0.0")
    fit(config(tmp_path / "same", *still), *start(), progress=False)
    assert lines(tmp_path / "same")[0]["agreement"] == 1
    grown, base = start()
    other = jax.tree.map(lambda x: x[::-1], grown)
    fit(config(tmp_path / "other", *still), other, base, progress=False)
    assert lines(tmp_path / "other")[0]["agreement"] < 1


SKIPPING = ("steps=8", "save_every=8", "log_every=1")


def test_skipped_steps_are_none_to_the_schedule_and_spoil_no_figure(tmp_path, monkeypatch):
    run = config(tmp_path, *SKIPPING)
    real, rate = loop.stage_loss(run), schedule(run.optim, run.steps)

    def sometimes(params, frozen, batch):
        loss, metrics = real(params, frozen, batch)
        return jnp.where(batch["tokens"].sum() % 2 == 0, jnp.nan, loss), metrics

    monkeypatch.setattr(loop, "stage_loss", lambda *_: sometimes)
    fit(run, *start(), progress=False)
    log = [line for line in lines(tmp_path) if "skipped" in line]
    assert 0 < sum(line["skipped"] for line in log) < len(log) == 8
    taken = 0
    for line in log:
        taken += not line["skipped"]
        assert line["lr"] == pytest.approx(float(rate(max(taken - 1, 0))))
        assert ("loss" in line) == (not line["skipped"])
    # They are not too many as long as they are not in a row.
    bad = "".join(str(int(line["skipped"])) for line in log)
    longest = max(map(len, bad.split("0")))
    assert longest < bad.count("1")
    monkeypatch.setattr(loop, "_PATIENCE", longest + 1)
    fit(config(tmp_path / "again", *SKIPPING), *start(), progress=False)
    monkeypatch.setattr(loop, "_PATIENCE", longest)
    with pytest.raises(FloatingPointError):
        fit(config(tmp_path / "fewer", *SKIPPING), *start(), progress=False)
    steps = [{"loss": loss, "skipped": np.isnan(loss)} for loss in (1.0, np.nan, 2.0)]
    assert loop.summarise(steps) == {"loss": 1.5, "skipped": pytest.approx(1 / 3)}
