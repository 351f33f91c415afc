"""Small bases with random parameters."""

import jax
import pytest

from twig_jax.config import LlavaConfig, TextConfig, TwigConfig, VisionConfig
from twig_jax.models.llava import init_base
from twig_jax.models.twig import init_twig

CONFIG = LlavaConfig(
    vision=VisionConfig(
        image_size=24,
        patch_size=8,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=2,
        image_mean=(0.5, 0.25, 0.125),
    ),
    text=TextConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=36,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=10,
        rope_theta=500.0,
        rms_norm_eps=2e-5,
        max_positions=77,
    ),
    image_token_id=3,
    bos_token_id=5,
    eos_token_id=6,
    pad_token_id=7,
)
TWIG = TwigConfig(K=1, T=2, K_f=3)


@pytest.fixture(scope="session")
def config():
    """Every field differs from its default where that is cheap."""
    return CONFIG


@pytest.fixture(scope="session")
def base(draw):
    """Parameters of `config`, float32."""
    return draw(jax.eval_shape(lambda key: init_base(CONFIG, key), jax.random.key(0)))


@pytest.fixture(scope="session")
def twig_config():
    """A twig for `config`."""
    return TWIG


@pytest.fixture(scope="session")
def twig(base, draw):
    """Parameters of the twig, float32."""
    shapes = jax.eval_shape(lambda params: init_twig(params, CONFIG.text, TWIG), base)
    return draw(shapes, seed=1)
