"""A tiny model on real pages."""

import jax
import jax.numpy as jnp
import pytest

from twig_jax import presets
from twig_jax.config import LlavaConfig, TextConfig, TwigConfig, VisionConfig
from twig_jax.data.digits import ASSETS
from twig_jax.data.pipeline import DigitsBatches
from twig_jax.data.tokens import load_tokenizer
from twig_jax.models.llava import init_base
from twig_jax.models.twig import fresh_p_head, init_twig

TINY = (
    LlavaConfig(
        vision=VisionConfig(
            image_size=96,
            patch_size=8,
            hidden_size=16,
            intermediate_size=32,
            num_layers=1,
            num_heads=2,
            feature_layer=-1,
        ),
        text=TextConfig(
            vocab_size=512,
            hidden_size=32,
            intermediate_size=48,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
        ),
        image_token_id=3,
        pad_token_id=0,
    ),
    TwigConfig(K=1, T=1, K_f=2),
)


@pytest.fixture(autouse=True, scope="package")
def tiny_preset():
    """Runs may ask for the preset "tiny"."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "tiny", TINY)
        yield


@pytest.fixture(autouse=True, scope="package")
def standard_promotion():
    """optax raises Python floats to integer step counts, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """A run's curves take a second to draw."""
    monkeypatch.setattr("twig_jax.training.log.curves", lambda path, lines: None)


@pytest.fixture(scope="session")
def base(draw):
    """The tiny base's parameters."""
    config, _ = TINY
    params = draw(jax.eval_shape(lambda key: init_base(config, key), jax.random.key(0)))
    # Logits of a size that answers are not hopeless at.
    return params | {
        "text": params["text"] | {"lm_head": {"kernel": params["text"]["lm_head"]["kernel"] / 4}}
    }


@pytest.fixture(scope="session")
def twig(base, draw):
    """A twig on it, with weights of its own."""
    config, twig = TINY
    return draw(jax.eval_shape(lambda params: init_twig(params, config.text, twig), base), seed=1)


@pytest.fixture(scope="session")
def ours(twig, draw):
    """The tiny twig with a P-Head that has been trained somewhat."""
    head = draw(jax.eval_shape(lambda: fresh_p_head(TINY[0].text)), seed=5)
    return {**twig, "p_head": jax.tree.map(lambda x: 0.1 * x, head)}


@pytest.fixture(scope="session")
def batch():
    """Eight packed pages, rows of 276 tokens."""
    batches = DigitsBatches(
        load_tokenizer(ASSETS / "base"), seed=3, batch_size=8, row_tokens=276, image_token_id=3
    )
    return jax.tree.map(jnp.asarray, next(batches))
