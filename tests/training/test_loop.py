"""The loop: stopped anywhere, it loses nothing."""

import gc
import json
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from launch.training import train
from tests.training.conftest import TINY
from tests.training.worker import (
    PREEMPTED,
    config,
    finish,
    free_address,
    lines,
    losses,
    start,
    two_workers,
    worker,
)
from twig_jax.checkpoints.manager import CheckpointManager
from twig_jax.checkpoints.storage import locked
from twig_jax.data.pipeline import DigitsBatches
from twig_jax.training.loop import fit
from twig_jax.training.preemption import Preempted, preemption
from twig_jax.training.step import make_step

CONVERSATIONS = ("data.source=digits", "data.row_tokens=400", "data.row_images=1")


def steps(out):
    return [line["step"] for line in lines(out) if "loss" in line]


def state_of(out, step):
    manager = CheckpointManager(out / "checkpoints")
    state = manager.restore(None, step)
    manager.close()
    return state


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_killed_while_saving_and_resumed_equals_never_stopped(tmp_path):
    """20 steps are 10, a kill -9 in the middle of saving, and the rest: bit for bit."""
    process = worker(tmp_path / "killed", *CONVERSATIONS, DIE="10")
    status, _, said = finish(process)
    assert status == -signal.SIGKILL, said
    left = {path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()}
    assert "10" not in left and any(name.startswith("10.") for name in left), left
    before = losses(tmp_path / "killed")
    assert set(before) == set(range(1, 11))

    for name in ("killed", "whole"):
        status, _, said = finish(worker(tmp_path / name, *CONVERSATIONS))
        assert status == 0, said
    assert_same(state_of(tmp_path / "killed", 20), state_of(tmp_path / "whole", 20))
    # No step twice, and each as it would have been: the data came in the same order.
    assert steps(tmp_path / "killed") == list(range(1, 21))
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert before == {n: loss for n, loss in losses(tmp_path / "whole").items() if n <= 10}
    left = {path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()}
    assert left == {"15", "20"}


@pytest.mark.parametrize("data", [(), CONVERSATIONS], ids=["pages", "conversations"])
def test_two_processes_train_as_one(tmp_path, data):
    """Four devices each, joined by real collectives, against one process with eight.

    They save and are told to stop together, though only one gets the signal, and go on; the end is
    one process's again.
    """
    run = "mesh=(4, 2, 1)", "steps=12"
    pair = two_workers(tmp_path / "two", *run, *data)
    log = tmp_path / "two" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (log.exists() and len(losses(tmp_path / "two")) >= 2):
        assert time.monotonic() < deadline and all(p.poll() is None for p in pair)
        time.sleep(0.02)
    pair[1].terminate()
    ended = [finish(process) for process in pair]
    assert [status for status, _, _ in ended] == [PREEMPTED, PREEMPTED], ended
    stopped = max(losses(tmp_path / "two"))
    assert all(f"saved at step {stopped} of 12" in out for _, out, _ in ended)
    assert stopped < 12
    assert str(stopped) in {path.name for path in (tmp_path / "two" / "checkpoints").iterdir()}

    if data:
        # Hosts read parts of the data; one process that goes on takes over all of them.
        going_on = [worker(tmp_path / "two", *run, *data)]
    else:
        # Told while it loads what the last one saved, it has nothing to save.
        for status, out, said in map(finish, two_workers(tmp_path / "two", *run, TOLD="1")):
            assert status == PREEMPTED and f"saved at step {stopped} of 12" in out, said
        going_on = two_workers(tmp_path / "two", *run)
    for status, _, said in map(finish, going_on):
        assert status == 0, said
    assert steps(tmp_path / "two") == list(range(1, 13))
    if not data:
        status, _, said = finish(worker(tmp_path / "one", *run))
        assert status == 0, said
        for step, loss in losses(tmp_path / "one").items():
            # Sums come in another order, and differences grow as training goes on.
            assert losses(tmp_path / "two")[step] == pytest.approx(loss, rel=1e-4)


def test_two_processes_that_do_not_share_a_folder_say_so(tmp_path):
    address = free_address()
    pair = [
        worker(tmp_path / str(i), "mesh=(4, 2, 1)", devices=4, ADDRESS=address, INDEX=str(i))
        for i in range(2)
    ]
    for status, _, said in map(finish, pair):
        assert status not in (0, PREEMPTED) and "hosts do not share" in said
    assert [list((tmp_path / str(i)).glob(".shared")) for i in range(2)] == [[], []]


def test_one_process_at_a_time_trains_into_a_folder(tmp_path):
    run = config(tmp_path / "run", "steps=2", "save_every=2")
    (tmp_path / "run").mkdir()
    with (
        locked(tmp_path / "run" / ".lock"),
        pytest.raises(FileExistsError, match=r"another process holds .*run/\.lock"),
    ):
        fit(run, *start(), progress=False)
    assert not list((tmp_path / "run").iterdir())
    fit(run, *start(), progress=False)
    assert not (tmp_path / "run" / ".lock").exists()


def test_told_to_stop_it_saves_and_goes_on_later(tmp_path, caplog):
    def tell(step, params):
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="saved at step 6 of 20"):
        fit(config(tmp_path / "told"), *start(), callback=tell, progress=False)
    assert signal.getsignal(signal.SIGTERM) is handler
    resumed = fit(config(tmp_path / "told"), *start(), progress=False)
    assert_same(resumed, fit(config(tmp_path / "whole"), *start(), progress=False))
    with pytest.raises(ValueError, match="has been trained for 20 steps, not 19"):
        fit(config(tmp_path / "told", "steps=19"), *start(), progress=False)
    # A run that is complete has nothing left to do, and says so.
    assert_same(resumed, fit(config(tmp_path / "told"), *start(), progress=False))
    assert f"{tmp_path / 'told'} is complete, at step 20: nothing is trained" in caplog.text
    assert steps(tmp_path / "told") == list(range(1, 21))
    # One that is told so before its last step ends with it.
    fit(config(tmp_path / "last", "steps=6"), *start(), callback=tell, progress=False)
    assert steps(tmp_path / "last") == list(range(1, 7))


def test_an_interruption_is_a_notice_the_first_time():
    # Shells start what runs in the background with interruptions ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt), preemption() as told:
        assert not told(1)
        signal.raise_signal(signal.SIGINT)
        assert told(2)
        signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_told_to_stop_while_it_saves_the_end_it_does_so(tmp_path, monkeypatch):
    """What the signal would have ended is the process: here it is noted."""
    told = []
    handler = signal.signal(signal.SIGTERM, lambda *_: told.append("to end"))
    close = CheckpointManager.close

    def told_to_stop(manager):
        os.kill(os.getpid(), signal.SIGTERM)
        close(manager)

    monkeypatch.setattr(CheckpointManager, "close", told_to_stop)
    try:
        fit(config(tmp_path, "steps=1"), *start(), progress=False)
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert told == []
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_what_goes_on_has_one_state_at_a_time(tmp_path, monkeypatch):
    """What a step fits into, going on fits into too."""
    fit(config(tmp_path, "steps=1"), *start(), progress=False)
    restore, params, frozen = CheckpointManager.restore, *start()
    before, held = sum(x.nbytes for x in jax.live_arrays()), []

    def watched(manager, like, step):
        held.append(sum(x.nbytes for x in jax.live_arrays()) - before)
        return restore(manager, like, step)

    monkeypatch.setattr(CheckpointManager, "restore", watched)
    fit(config(tmp_path, "steps=2"), params, frozen, progress=False)
    # The base, as it lies on the mesh; a state is three times the parameters.
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    assert len(held) == 1 and held[0] < size + sum(x.nbytes for x in jax.tree.leaves(frozen))


def test_it_goes_on_over_another_mesh(tmp_path):
    whole = fit(config(tmp_path / "whole"), *start(), progress=False)
    with pytest.raises(Preempted):
        fit(
            config(tmp_path / "moved", "mesh=(8, 1, 1)"),
            *start(),
            callback=lambda step, params: os.kill(os.getpid(), signal.SIGTERM) or {},
            progress=False,
        )
    moved = fit(config(tmp_path / "moved", "mesh=(2, 2, 2)"), *start(), progress=False)
    assert moved["layers_0"]["q_proj"]["kernel"].sharding.shard_shape((32, 32)) == (16, 16)
    for step, loss in losses(tmp_path / "whole").items():
        assert losses(tmp_path / "moved")[step] == pytest.approx(loss, rel=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3), moved, whole)


def test_held_out_data_that_are_not_there_stop_a_run_before_it_begins(tmp_path):
    absent = (*CONVERSATIONS, "whole_base=False", f"data.validation={tmp_path / 'none.jsonl'}")
    with pytest.raises(FileNotFoundError, match=r"no data at .*none\.jsonl"):
        fit(config(tmp_path / "run", *absent), *start(), progress=False)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_best_is_kept_and_can_be_the_result(tmp_path):
    """The one of the lowest loss on what is held out, which too high a rate spoils."""
    seen = {}
    best = fit(
        config(tmp_path, "best=True", "optim.lr=1.0", "optim.warmup=1.0", "keep=1"),
        *start(),
        callback=lambda step, params: seen.update({step: jax.device_get(params)}) or {},
        progress=False,
    )
    held_out = {x["step"]: x["validation/loss"] for x in lines(tmp_path) if "validation/loss" in x}
    assert list(held_out) == [5, 10, 15, 20]
    lowest = min(held_out, key=held_out.get)
    assert lowest < 20
    assert_same(best, seen[lowest])
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {str(lowest), "20"}


def test_the_average_of_parameters_is_the_result(tmp_path):
    """Another decay may be set on the way, none may not."""
    history = []
    settings = ("steps=4", "save_every=1", "mesh=(8, 1, 1)")
    fit(
        config(tmp_path / "plain", *settings),
        *start(),
        callback=lambda step, params: history.append(jax.device_get(params)) or {},
        progress=False,
    )
    averaged = fit(config(tmp_path / "ema", "ema=0.9", *settings), *start(), progress=False)
    expected = start()[0]
    for params in history:
        expected = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, expected, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), averaged, expected)

    on = ("steps=5", "mesh=(8, 1, 1)")
    with pytest.raises(ValueError, match=r"another model: ema 0\.9, now None"):
        fit(config(tmp_path / "ema", *on), *start(), progress=False)
    further = fit(config(tmp_path / "ema", "ema=0.5", *on), *start(), progress=False)
    state = state_of(tmp_path / "ema", 5)
    expected = jax.tree.map(lambda a, b: (a + b) / 2, averaged, state["params"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), further, expected)


@pytest.mark.parametrize("stage", ["twig", "base"])
def test_devices_hold_no_second_copy_of_what_trains(tmp_path, monkeypatch, stage):
    """Beside the parameters, two moments; what the run began with is gone after the first step."""

    def heads():
        gc.collect()
        text = TINY[0].text
        shape = (text.hidden_size, text.vocab_size)
        return sum(x.shape == shape and x.dtype == jnp.float32 for x in jax.live_arrays())

    counted = []

    def count(step, params):
        counted.append(heads())
        return {}

    monkeypatch.setattr("launch.training.validation", lambda *_: count)
    settings = (f"stage={stage}", "base_dtype=bfloat16", "steps=2", "save_every=1")
    before = heads()
    train(config(tmp_path, *settings))
    assert [n - before for n in counted] == [3, 3]


def test_two_steps_at_most_are_on_their_way(tmp_path, monkeypatch):
    """Between two lines of the log too, with batches that are there at once."""
    losses, unfinished = [], []

    def recorded(*settings):
        step = make_step(*settings)

        def run(*arguments):
            state, metrics = step(*arguments)
            losses.append(metrics["loss"])
            return state, metrics

        return run

    class Same(DigitsBatches):
        def __next__(self):
            unfinished.append(sum(not loss.is_ready() for loss in losses))
            self.batch = getattr(self, "batch", None) or super().__next__()
            return self.batch

    monkeypatch.setattr("twig_jax.training.loop.make_step", recorded)
    monkeypatch.setattr("twig_jax.training.data.DigitsBatches", Same)
    settings = ("steps=12", "log_every=12", "save_every=12", "data.batch_size=32")
    fit(config(tmp_path, *settings), *start(), progress=False)
    assert max(unfinished[:12]) <= 2


def test_only_the_layers_below_are_needed(tmp_path):
    twig, base = start()
    whole = fit(config(tmp_path / "whole", "steps=3"), twig, base, progress=False)
    below = {**base, "text": {k: base["text"][k] for k in ("embed_tokens", "layers_0")}}
    settings = ("steps=3", "whole_base=False")
    assert_same(whole, fit(config(tmp_path / "below", *settings), twig, below, progress=False))
    assert "agreement" not in lines(tmp_path / "below")[0]


def test_other_runs_are_refused(tmp_path, caplog):
    twig, base = start()
    fit(config(tmp_path, "steps=1"), twig, base, progress=False)
    with pytest.raises(ValueError, match="another model: T None, now 2"):
        fit(config(tmp_path, "steps=2", "T=2"), twig, base, progress=False)
    other = jax.tree.map(lambda x: -x, base)
    with pytest.raises(ValueError, match="a twig on another base"):
        fit(config(tmp_path, "steps=2"), twig, other, progress=False)
    with pytest.raises(ValueError, match=r"read other data, .*: data\.source was None; give"):
        fit(config(tmp_path, "steps=2", *CONVERSATIONS), twig, base, progress=False)
    # What the preset has says nothing new.
    own = f"K={config(tmp_path).model()[1].K}"
    fit(config(tmp_path, "steps=2", "seed=1", own), twig, base, progress=False)
    assert "seed=1 (was 0)" in caplog.text and "steps=2 (was 1)" in caplog.text


def test_clipping_may_be_set_on_the_way(tmp_path):
    settings = ("whole_base=False",)
    fit(config(tmp_path, *settings, "steps=1", "optim.clip=None"), *start(), progress=False)
    fit(config(tmp_path, *settings, "steps=2", "optim.clip=1e-3"), *start(), progress=False)
    assert CheckpointManager(tmp_path / "checkpoints").latest() == 2


def test_reinforcing_takes_a_folder_of_its_own(tmp_path, base, ours):
    settings = ("steps=1", "p_head=True")
    fit(config(tmp_path, *settings), ours, base, progress=False)
    reinforced = config(
        tmp_path, "steps=2", "p_head=True", "reinforce.actions=8", "reinforce.budgets=(74.0,)"
    )
    with pytest.raises(ValueError, match=r"reinforce\.actions 0, now 8; give the run another fol"):
        fit(reinforced, ours, base, progress=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.batch_size=12"], "12 rows a batch .* over 8 devices that take all"),
        (["data.batch_size=24", "device_rows=2"], "over 8 devices that take 2 at a time"),
        (["data.batch_size=4"], "4 rows a batch"),
        (["mesh=(3, 1, 1)"], "does not use the 8 devices"),
        (["data.source=/nowhere.json"], "no data at /nowhere.json"),
        (["data.source=digits", "stage=base"], "conversations train a twig"),
        (["p_head=True", "reinforce.actions=8"], "needs whole_base=True, and average budgets"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, settings, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        fit(config(tmp_path, *settings), *start(), progress=False)


def test_bad_samples_are_counted_and_too_many_stop_the_run(tmp_path):
    image = tmp_path / "page.png"
    Image.fromarray(np.zeros((96, 96, 3), np.uint8)).save(image)
    turns = [
        {"from": "human", "value": "<image>\nWhat digit is in row B, column 3?"},
        {"from": "gpt", "value": "seven"},
    ]
    rows = [
        {"id": f"s{n}", "image": "page.png" if n % 50 else "none.png", "conversations": turns}
        for n in range(200)
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    data = (f"data.source={path}", "data.row_tokens=400", "data.row_images=2", "steps=2")
    fit(config(tmp_path / "some", *data, "data.max_bad_fraction=0.05"), *start(), progress=False)
    assert lines(tmp_path / "some")[1]["bad_samples"] > 0
    with pytest.raises(ValueError, match=r"more than max_bad_fraction 0\.001"):
        few = config(tmp_path / "few", *data, "data.max_bad_fraction=0.001")
        fit(few, *start(), progress=False)


def test_ten_bad_steps_in_a_row_stop_the_run(tmp_path):
    twig, base = start()
    broken = jax.tree.map(lambda x: x * jnp.nan, twig)
    advice = "lower the learning rate and start again from step 5, saved in "
    with pytest.raises(FloatingPointError, match=advice):
        fit(config(tmp_path, "log_every=5"), broken, base, progress=False)
    assert not (tmp_path / "metrics.jsonl").read_text().count('"step": 10')
