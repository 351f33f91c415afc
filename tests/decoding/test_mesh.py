"""The same engine on any mesh: sharded decoding gives the tokens of a single device."""

import json
import os
import socket
import subprocess
import sys

import jax
import pytest
from jax.sharding import PartitionSpec as P

from tests.decoding.models import CALL, generator, mixed
from twig_jax.sharding.mesh import make_mesh


@pytest.fixture(autouse=True)
def precise():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    with jax.default_matmul_precision("highest"):
        return [r.tokens.tolist() for r in generator().generate(mixed(), CALL)]


@pytest.mark.parametrize("shape", [(4, 1, 2), (2, 2, 2), (8, 1, 1)])
def test_a_mesh_changes_no_token(shape, expected) -> None:
    """Rows go over data and fsdp (four rows over eight devices stay whole), heads over tensor."""
    model = generator(made={"mesh": make_mesh(*shape)})
    running = model.start(mixed(), CALL)
    rows = ("data", "fsdp") if shape[0] * shape[1] == 4 else None
    heads = "tensor" if shape[2] == 2 else None
    for cache in jax.tree.leaves(running.state.caches):
        assert cache.sharding.is_equivalent_to(
            jax.NamedSharding(model.mesh, P(rows, heads)), cache.ndim
        )
    results = model.finish(running)
    assert [r.tokens.tolist() for r in results] == expected


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
        assert json.loads(out.splitlines()[-1]) == expected
