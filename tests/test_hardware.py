"""Accelerators and their compilers, of which none need be there."""

from types import SimpleNamespace

import jax
import pytest

from twig_jax.hardware import find_topology, runs_triton


def test_topologies(monkeypatch):
    monkeypatch.setattr("twig_jax.hardware._gpus", lambda chip, count: jax.devices()[:count])
    chip, count, devices = find_topology("h100:2x4")
    assert chip.kind == "H100" and count == 8 and devices == jax.devices()
    monkeypatch.setattr("twig_jax.hardware._tpus", lambda name: jax.devices())
    chip, count, devices = find_topology("v5e:2x4")
    assert chip.kind == "TPU v5 lite" and count == 8 and devices == jax.devices()


def test_gpus_are_described_to_their_compiler(monkeypatch):
    told = {}

    def get(**kwargs):
        told.update(kwargs)
        return SimpleNamespace(devices=["one", "two"])

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", get)
    chip, count, devices = find_topology("l4:2")
    assert chip.kind == "L4" and count == 2 and devices == ["one", "two"]
    assert told["platform"] == "cuda" and told["topology"] == "1x1x2"
    described = " ".join(told["target_config"].split())
    assert "cuda_compute_capability { major: 8 minor: 9 } core_count: 58" in described
    assert "memory_bandwidth: 300000000000 " in described

    def absent(**_):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", absent)
    assert find_topology("l4:2")[2] is None


@pytest.mark.parametrize(
    ("capability", "runs"), [("9.0", True), ("8.0", True), ("7.5", False), ("gfx942", False)]
)
def test_devices_that_triton_compiles_for(capability, runs):
    assert runs_triton(SimpleNamespace(compute_capability=capability)) == runs
    assert not runs_triton(jax.devices("cpu")[0])
