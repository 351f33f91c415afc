"""Where things are kept, and what result files say about the machine."""

import subprocess
from pathlib import Path

import pytest

from twig_jax.runtime import cache_folder, environment


def test_the_cache_lies_where_the_user_has_theirs(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == tmp_path / ".cache" / "twig_jax"

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache" / "twig_jax"


def test_clocks_are_those_that_nvidia_smi_tells(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\nprintf "Chip %s, 580.1, 1980 MHz\\n" 0 1\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    gpus = environment()["gpus"]
    assert [gpu["name"] for gpu in gpus] == ["Chip 0", "Chip 1"]
    assert (gpus[0]["driver_version"], gpus[0]["clocks.sm"]) == ("580.1", "1980 MHz")


@pytest.mark.parametrize("error", [subprocess.TimeoutExpired("nvidia-smi", 60), OSError("broken")])
def test_results_are_not_lost_to_an_nvidia_smi_that_fails(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr("subprocess.run", fail)
    assert "gpus" not in environment()


def test_without_nvidia_smi_nothing_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    said = environment()
    assert "gpus" not in said and {"jax", "jaxlib", "platform"} <= said["versions"].keys()
