"""What result files say about the machine."""

from twig_jax.runtime import environment


def test_clocks_are_those_that_nvidia_smi_tells(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\nprintf "Chip %s, 580.1, 1980 MHz\\n" 0 1\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    gpus = environment()["gpus"]
    assert [gpu["name"] for gpu in gpus] == ["Chip 0", "Chip 1"]
    assert (gpus[0]["driver_version"], gpus[0]["clocks.sm"]) == ("580.1", "1980 MHz")


def test_without_nvidia_smi_nothing_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    said = environment()
    assert "gpus" not in said and {"jax", "jaxlib", "platform"} <= said["versions"].keys()
