"""What a base teaches, kept on disk: the same lesson, for the batches it was written for alone."""

import contextlib
import dataclasses
import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.worker import config, finish, losses, start, two_workers
from twig_jax.models.twig import feeding, fresh_p_head
from twig_jax.presets import preset
from twig_jax.training.config import DistillConfig, TrainConfig
from twig_jax.training.data import open_batches
from twig_jax.training.distill import of_likeliest, teaching
from twig_jax.training.loop import fit, stage_loss
from twig_jax.training.targets import Targets, write_targets

SETTINGS = ("p_head=True", "distill.prediction=0.5", "distill.attention=1.0", "distill.layer=1")
STEPS = ("steps=4", "save_every=2", "validation_samples=2")


def twig_and_base():
    twig, base = start()
    return {**twig, "p_head": fresh_p_head(preset("tiny")[0].text)}, base


def test_all_words_teach_what_the_base_teaches(base, twig, batch):
    distill = DistillConfig(prediction=0.5, attention=1.0, layer=1, words=512)
    run = TrainConfig("twig", "", 1, preset="tiny", p_head=True, distill=distill)
    models, twig_config = run.model()
    ours = {**twig, "p_head": fresh_p_head(models.text)}
    taught = jax.jit(teaching(models, twig_config, distill, 64))(base, batch)
    loss = jax.jit(jax.value_and_grad(stage_loss(run), has_aux=True))
    (live, metrics), gradient = loss(ours, base, batch)
    (stored, of_stored), of_gradient = loss(ours, feeding(base, 1), {**batch, **taught})
    assert stored == pytest.approx(float(live), rel=1e-5)
    for name in ("prediction_kl", "attention_kl"):
        np.testing.assert_allclose(of_stored[name], metrics[name], rtol=1e-4)
    # Float32, summed in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, of_gradient)


def test_of_few_words_the_others_count_together():
    p, q = np.array([0.5, 0.2, 0.2, 0.1]), np.array([0.4, 0.4, 0.1, 0.1])
    words = jnp.array([[[0, 2]]])
    logs = jnp.log(jnp.asarray(p[[0, 2]], jnp.float32))[None, None]
    found = of_likeliest(words, logs, jnp.log(jnp.asarray(q, jnp.float32))[None, None])
    by_hand = 0.5 * np.log(0.5 / 0.4) + 0.2 * np.log(0.2 / 0.1) + 0.3 * np.log(0.3 / 0.5)
    assert float(found[0, 0]) == pytest.approx(by_hand, rel=1e-5)


def test_a_run_learns_from_what_was_written(tmp_path):
    """From the base's trunk alone; writing goes on where it stopped."""
    twig, base = twig_and_base()
    folder = tmp_path / "targets"
    run = config(tmp_path / "live", *SETTINGS, *STEPS, "distill.words=512")
    done = []
    write_targets(dataclasses.replace(run, steps=2), base, str(folder), done.append)
    (folder / "000002-0of1.npz").unlink()
    before = (folder / "000001-0of1.npz").stat().st_mtime_ns
    write_targets(run, base, str(folder), done.append)
    assert done == [1, 2, 1, 2, 3, 4]
    assert (folder / "000001-0of1.npz").stat().st_mtime_ns == before
    assert sorted(p.name for p in folder.iterdir()) == [
        *(f"{step:06}-0of1.npz" for step in range(1, 5)),
        "targets.json",
    ]
    live = fit(run, twig, base, progress=False)
    settings = (*SETTINGS, *STEPS, "distill.words=512", "whole_base=False")
    stored = config(tmp_path / "stored", *settings, f"distill.targets={folder}")
    learned = fit(stored, twig, feeding(base, 1), progress=False)
    for step, loss in losses(tmp_path / "live").items():
        # Log-probabilities and attention are kept in sixteen bits.
        assert losses(tmp_path / "stored")[step] == pytest.approx(loss, rel=2e-3)
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), live, learned)
    assert max(jax.tree.leaves(moved)) < 0.02  # of steps of up to 0.01 each

    models, grown_on = preset("tiny")[0], json.loads((folder / "targets.json").read_text())["base"]
    targets = Targets(stored, models, grown_on, (0, 1))
    with contextlib.closing(open_batches(stored, models)) as batches:
        batch = next(batches)
    assert targets.beside(batch, 1)["taught_words"].shape == (8, 212, 512)
    for name in ("tokens", "targets", "pixels"):
        with pytest.raises(ValueError, match="written for another batch"):
            targets.beside({**batch, name: batch[name] + 1}, 1)

    def refused(message, *changes):
        run = config(tmp_path / "other", *settings, f"distill.targets={folder}", *changes)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            fit(run, twig, feeding(base, 1), progress=False)

    refused("written for another batch", "seed=1")
    # What was written for less would silently teach nothing.
    less, attention = tmp_path / "less", DistillConfig(attention=1.0, layer=1)
    write_targets(
        dataclasses.replace(run, steps=1, distill=attention),
        base,
        str(less),
    )
    refused("of other settings: words None, not 512", f"distill.targets={less}")
    refused("of other settings: queries answer, not text", "distill.queries=text")
    refused("of other settings: most_queries 64, not 63", "distill.most_queries=63")
    refused("there is no 000006-0of1.npz", "steps=6", f"out={tmp_path / 'longer'}")
    refused("no targets in nowhere: write them", "distill.targets=nowhere")
    with pytest.raises(ValueError, match="was written for another batch"):
        write_targets(dataclasses.replace(run, seed=1), base, str(folder))
    with pytest.raises(ValueError, match="has targets of other settings"):
        write_targets(dataclasses.replace(run, distill=attention), base, str(folder))
    # It goes on without them, too.
    going_on = config(tmp_path / "stored", *SETTINGS, *STEPS, "distill.words=512", "steps=5")
    fit(going_on, learned, base, progress=False)
    assert set(losses(tmp_path / "stored")) == {1, 2, 3, 4, 5}


@pytest.mark.parametrize(
    ("changes", "folder", "message"),
    [
        ({}, "gs://bucket/targets", "gs://bucket/targets is no folder of this machine"),
        ({"distill": DistillConfig()}, "targets", "there is nothing to teach"),
        ({"stage": "base"}, "targets", "there is nothing to teach"),
        ({"whole_base": False}, "targets", "set whole_base=True"),
    ],
)
def test_what_cannot_be_written_is_told_first(tmp_path, changes, folder, message):
    run = dataclasses.replace(config(tmp_path, *SETTINGS), **changes)
    with pytest.raises(ValueError, match=message):
        write_targets(run, {}, folder)


def test_two_processes_write_together_though_one_lacks_a_file(tmp_path):
    """What one of them has is kept; the base, which is spread over both, answers for the other."""
    folder = tmp_path / "targets"
    folder.mkdir()
    settings = ("distill.prediction=0.5", "steps=2", "mesh=(4, 2, 1)")
    run = config(tmp_path, *settings[:-1])
    with contextlib.closing(open_batches(run, preset("tiny")[0], (0, 2))) as batches:
        batch, checksum = next(batches), 0
    for name in ("tokens", "targets", "pixels"):
        checksum = zlib.crc32(batch[name].tobytes(), checksum)
    np.savez(folder / "000001-0of2.npz", checksum=checksum)
    kept = (folder / "000001-0of2.npz").read_bytes()
    for status, _, said in map(finish, two_workers(tmp_path, *settings, TARGETS=str(folder))):
        assert status == 0, said
    assert (folder / "000001-0of2.npz").read_bytes() == kept
    assert sorted(path.name for path in folder.iterdir()) == [
        *(f"{step:06}-{shard}of2.npz" for step in (1, 2) for shard in (0, 1)),
        "targets.json",
    ]
    write_targets(run, start()[1], str(tmp_path / "one"))
    whole, *parts = (
        np.load(path)["words"]
        for path in (
            tmp_path / "one" / "000002-0of1.npz",
            *(folder / f"000002-{shard}of2.npz" for shard in (0, 1)),
        )
    )
    np.testing.assert_array_equal(whole, np.concatenate(parts))
