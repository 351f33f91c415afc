"""Files of weights: whole or not there, one in memory at a time."""

import json
import math
import weakref

import numpy as np
import pytest
from safetensors import SafetensorError

from twig_jax.checkpoints import storage


def test_one_file_at_a_time_is_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "SHARD_BYTES", 8)
    held = []

    def read(name):
        assert all(x() is None for x in held)
        x = np.zeros(2, np.float32)
        held.append(weakref.ref(x))
        return x

    storage.write_weights(tmp_path, dict.fromkeys("abc", 8), read)
    assert len(held) == 3


def test_weights_take_the_place_of_others(tmp_path, monkeypatch):
    """In as many files as it takes; while those are written no old one can be read with them."""
    monkeypatch.setattr(storage, "SHARD_BYTES", 16)
    single, index = "model.safetensors", "model.safetensors.index.json"
    for value, names in enumerate(["a", "abcdef", "abc", "ab", "abcd"]):
        seen = []

        def read(name, value=value, seen=seen):
            seen.append({path.name for path in tmp_path.iterdir()})
            return np.full(2, value, np.float32)

        storage.write_weights(tmp_path, dict.fromkeys(names, 8), read)
        n = math.ceil(len(names) / 2)
        shards = {f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)}
        there = {path.name for path in tmp_path.iterdir()}
        assert there == ({single} if n == 1 else {*shards, index})
        assert not any({single, index} & files for files in seen[2:])
        with storage.Weights(tmp_path) as weights:
            found = {name: weights[name].tolist() for name in weights.shapes}
        assert found == {name: [value, value] for name in names}
        if n > 1:
            notes = json.loads((tmp_path / index).read_text())
            assert notes["metadata"] == {"total_size": 8 * len(names)}


def test_what_safetensors_cannot_write_is_an_error_of_the_system(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"a part")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(storage, "save_file", full)
    with pytest.raises(OSError, match=r"cannot write .*model.safetensors: No space left"):
        storage.write_weights(tmp_path, {"a": 8}, lambda name: np.zeros(2, np.float32))
    assert not list(tmp_path.iterdir())


def test_everyone_may_read_what_is_written(tmp_path):
    storage.write_weights(tmp_path, {"a": 8}, lambda name: np.zeros(2, np.float32))
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644
