"""Images into visual embeddings, and those into their slots."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twig_jax.models.llava import Llava


def encode(config, params, pixels):
    return jax.jit(functools.partial(Llava(config).apply, method="encode"))(
        {"params": params}, pixels
    )


def merge(config, params, *args):
    return Llava(config).apply({"params": params}, *args, method="merge")


@pytest.fixture(scope="module")
def pixels():
    return jax.random.normal(jax.random.key(5), (2, 3, 24, 24, 3))


def test_images_of_a_row_follow_each_other(config, base, pixels):
    whole = encode(config, base, pixels)
    assert whole.shape == (2, 3 * config.vision.num_tokens, config.text.hidden_size)
    single = encode(config, base, pixels[1:, 2:])
    np.testing.assert_allclose(whole[1:, 2 * config.vision.num_tokens :], single, atol=1e-5)


def test_every_patch_is_its_own_pixels(config, base, pixels):
    """Before any attention (feature layer 0), one pixel changes one token: row by row order."""
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, feature_layer=0))
    changed = pixels[:1, :1].at[0, 0, 9, 20].add(1.0)  # second row of patches, third column
    before, after = (encode(config, base, p) for p in (pixels[:1, :1], changed))
    assert np.flatnonzero(np.any(before != after, axis=(0, 2))).tolist() == [5]


@pytest.mark.parametrize(("feature", "used"), [(-2, 2), (-1, 3), (0, 0)])
def test_layers_above_the_feature_layer_are_never_run(config, base, pixels, feature, used):
    vision = dataclasses.replace(config.vision, feature_layer=feature)
    config = dataclasses.replace(config, vision=vision)
    assert vision.layers_used == used
    spoiled = {**base, "vision": dict(base["vision"])}
    for i in range(used, vision.num_layers):
        spoiled["vision"][f"layers_{i}"] = jax.tree.map(
            lambda x: x * jnp.nan, base["vision"][f"layers_{i}"]
        )
    out = encode(config, spoiled, pixels)
    np.testing.assert_array_equal(out, encode(config, base, pixels))
    if used:
        spoiled["vision"]["layers_0"] = jax.tree.map(jnp.zeros_like, base["vision"]["layers_0"])
        assert not np.allclose(out, encode(config, spoiled, pixels))


def test_merge_fills_slots_in_order(config, base):
    tokens = jnp.array([[1, 3, 3, 7, 3, 3], [1, 5, 3, 3, 0, 0]])
    visual = jnp.arange(2 * 4 * 24, dtype=jnp.float32).reshape(2, 4, 24)
    merged = merge(config, base, tokens, tokens == 3, visual)
    words = base["text"]["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(merged[0, jnp.array([1, 2, 4, 5])], visual[0])
    np.testing.assert_array_equal(merged[1, 2:4], visual[1, :2])
    text = np.array([0, 1, 4, 5])
    np.testing.assert_array_equal(merged[1, text], words[tokens[1, text]])


def test_text_alone_needs_no_image(config, base):
    tokens = jnp.array([[1, 3, 4]])
    none = jnp.zeros((1, 0, 24))
    out = merge(config, base, tokens, jnp.zeros((1, 3), bool), none)
    np.testing.assert_array_equal(out, base["text"]["embed_tokens"]["embedding"][tokens])
