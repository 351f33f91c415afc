"""A model small enough to run in milliseconds."""

import jax
import pytest

from twig_jax.config import LlavaConfig, TextConfig, VisionConfig
from twig_jax.models.llava import init_base

CONFIG = LlavaConfig(
    vision=VisionConfig(
        image_size=24,
        patch_size=8,
        hidden_size=16,
        intermediate_size=24,
        num_layers=3,
        num_heads=2,
    ),
    text=TextConfig(
        vocab_size=37,
        hidden_size=24,
        intermediate_size=40,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
    ),
    image_token_id=3,
    pad_token_id=0,
)


@pytest.fixture(scope="session")
def config():
    """Grouped-query attention, a head width that is not hidden size / heads, 9 visual tokens."""
    return CONFIG


@pytest.fixture(scope="session")
def base(draw):
    """Parameters of `config`."""
    return draw(jax.eval_shape(lambda key: init_base(CONFIG, key), jax.random.key(0)))
