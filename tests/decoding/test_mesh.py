"""The same engine on any mesh: sharded decoding gives the tokens of a single device."""

import dataclasses
import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.decoding.models import CALL, mixed
from tests.decoding.worker import model
from twig_jax.decoding import batch, buckets
from twig_jax.decoding.generate import compiled_programs
from twig_jax.decoding.images import encode
from twig_jax.programs import device_bytes
from twig_jax.sharding.mesh import make_mesh


@pytest.fixture(autouse=True)
def precise():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    with jax.default_matmul_precision("highest"):
        return [r.tokens.tolist() for r in model().generate(mixed(), CALL)]


@pytest.mark.parametrize("shape", [(4, 1, 2), (2, 2, 2), (8, 1, 1)])
def test_a_mesh_changes_no_token(shape, expected) -> None:
    """Rows go over data and fsdp (four rows over eight devices stay whole), heads over tensor."""
    spread = model(make_mesh(*shape))
    running = spread.start(mixed(), CALL)
    rows = ("data", "fsdp") if shape[0] * shape[1] == 4 else None
    heads = "tensor" if shape[2] == 2 else None
    for cache in jax.tree.leaves(running.state.caches):
        assert cache.sharding.is_equivalent_to(
            jax.NamedSharding(spread.mesh, P(rows, heads)), cache.ndim
        )
    results = spread.finish(running)
    assert [r.tokens.tolist() for r in results] == expected


def test_warm_up_leaves_nothing_to_compile() -> None:
    """One image or several, of some rows."""
    spread = model(make_mesh(2, 2, 2))
    call = dataclasses.replace(CALL, avg_retained=5)  # the largest budget of any row
    bucket = buckets.Bucket(rows=4, text=32, images=2, new=32)
    spread.warm_up(call, [bucket])
    before = compiled_programs()
    for rows in (mixed(), mixed()[1:]):
        spread.finish(spread.start(rows, call, bucket=bucket))
    assert compiled_programs() == before


def test_images_are_encoded_by_all_devices() -> None:
    """Each encodes a fourth of eight images, with the same result."""
    mesh = make_mesh(4, 1, 2)
    alone, spread = model(), model(mesh)
    size = alone.config.vision.image_size
    pixels = np.random.default_rng(0).normal(size=(8, size, size, 3)).astype(np.float32)

    def encoded(one):
        given = one.config, one.weights.base, pixels, one.weights.dtype, False
        with one.context():
            compiled = encode.lower(*given).compile()
            return np.stack(encode(*given)), compiled.cost_analysis()["flops"]

    (known, all_of_it), (found, part) = encoded(alone), encoded(spread)
    np.testing.assert_allclose(found, known, rtol=1e-5, atol=1e-6)  # of sums in another order
    assert part < 0.3 * all_of_it


def test_memory_is_that_of_each_device(monkeypatch) -> None:
    """Four pairs of devices with room for one row each, or a little more, take four."""
    mesh = make_mesh(2, 2, 2)
    spread = model(mesh)
    program = spread.batches.prepare(mixed(), CALL).program
    room = device_bytes(spread.weights) + 1.5 * buckets.state_bytes(program, 1, 4, split=2)
    monkeypatch.setattr(batch, "device_memory", lambda _: room)
    assert len(spread.generate(mixed(), CALL)) == 4
    with pytest.raises(MemoryError, match="about 4 rows of this shape"):
        spread.generate(mixed() * 2, CALL)
    with pytest.raises(MemoryError, match="not even one row fits"):
        model().generate(mixed(), CALL)


def test_two_processes_give_the_same(expected) -> None:
    """Four devices each, joined by real collectives; every process gets every answer."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {
        **os.environ,
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4"),
    }
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.decoding.worker", address, str(i)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for worker in workers:
        out, err = worker.communicate(timeout=300)
        assert worker.returncode == 0, err[-3000:]
        tokens, compiled = json.loads(out.splitlines()[-1])
        assert tokens == expected
        assert not compiled  # when the same was asked again, and looked at after every iteration
