"""The short way in."""

import pytest

from twig_jax import api


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint folder .*nowhere"):
        api.load(tmp_path / "nowhere")


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        api.load(tmp_path)
