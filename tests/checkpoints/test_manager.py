"""Training checkpoints keep every bit, the newest two, and their shardings."""

import math
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from twig_jax.checkpoints.manager import CheckpointManager, write_tree
from twig_jax.sharding.mesh import make_mesh


@pytest.fixture
def state():
    x = jax.random.normal(jax.random.key(0), (8, 6))
    return {"params": {"w": x, "half": x.astype(jnp.bfloat16)}, "step": jnp.int32(7)}


def abstract(tree, sharding=None):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), tree
    )


def test_restores_every_bit_and_keeps_the_newest(tmp_path, state):
    manager = CheckpointManager(tmp_path / "run", keep=2)
    assert manager.latest() is None
    for step in (1, 2, 3):
        manager.save(step, {**state, "step": jnp.int32(step)}, {"note": step})
    manager.wait()
    assert manager.latest() == 3
    manager.close()

    reopened = CheckpointManager(tmp_path / "run")
    assert reopened.latest() == 3
    found = reopened.restore(abstract(state))
    assert found["step"] == 3
    jax.tree.map(np.testing.assert_array_equal, found["params"], state["params"])
    assert found["params"]["half"].dtype == jnp.bfloat16
    assert reopened.restore(abstract(state), 2)["step"] == 2
    assert not (tmp_path / "run" / "1").exists()
    reopened.close()


def test_notes_and_the_best(tmp_path, state):
    manager = CheckpointManager(tmp_path, keep=1)
    for step, loss in ((1, 3.0), (2, 1.0), (3, None), (4, math.nan)):
        manager.save(step, state, {"step": step, "pool": [[1, 2], []]}, loss)
    assert manager.best() == 2
    assert {path.name for path in tmp_path.iterdir()} == {"2", "4"}
    assert manager.notes(2) == {"step": 2, "pool": [[1, 2], []]}
    assert manager.notes() == {"step": 4, "pool": [[1, 2], []]}
    manager.close()


def test_without_losses_the_newest_is_the_best(tmp_path, state):
    manager = CheckpointManager(tmp_path)
    assert manager.best() is None
    manager.save(1, state, {})
    manager.save(2, state, {})
    assert manager.best() == 2
    manager.close()


def test_a_checkpoint_that_is_cut_short_is_named(tmp_path, state):
    """As on a disk that was full; orbax would say that its handlers do not fit."""
    manager = CheckpointManager(tmp_path)
    manager.save(1, state, {})
    manager.save(2, state, {})
    manager.wait()
    file = tmp_path / "2" / "state" / "_METADATA"
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ValueError, match=f"checkpoint in {tmp_path}/2: .* move it away"):
        manager.restore(abstract(state))
    assert manager.restore(abstract(state), 1)["step"] == 7
    manager.close()


@pytest.mark.parametrize("folder", ["gs://bucket/run", "/here/run", "run"])
def test_a_bucket_stays_one(monkeypatch, folder):
    folders = []
    monkeypatch.setattr(
        "orbax.checkpoint.v1.training.Checkpointer", lambda path, **_: folders.append(str(path))
    )
    CheckpointManager(folder)
    assert folders == [folder if "/" in folder else str(Path.cwd() / folder)]


def test_restores_into_other_shardings(tmp_path, state):
    manager = CheckpointManager(tmp_path)
    manager.save(1, state, {})
    manager.wait()
    rows = NamedSharding(make_mesh(8, 1, 1), P("data"))
    like = {"params": abstract(state["params"], rows), "step": abstract(state["step"])}
    found = manager.restore(like, 1)
    assert found["params"]["w"].sharding == rows
    assert found["params"]["w"].addressable_shards[3].data.shape == (1, 6)
    np.testing.assert_array_equal(found["params"]["w"], state["params"]["w"])
    manager.close()


def test_nothing_is_written_after_an_error(tmp_path):
    """What reads the parts may fail while one is written: its folder can be removed right away."""

    def parts():
        for name in "abcdefgh":
            yield {name: jnp.ones((1 << 20,))}
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        write_tree(tmp_path / "tree", parts())
    shutil.rmtree(tmp_path)
    time.sleep(0.5)
    assert not tmp_path.exists()
