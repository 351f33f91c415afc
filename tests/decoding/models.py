"""Small random models whose twig often, but not always, agrees with its base."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from twig_jax.config import LlavaConfig, TextConfig, TwigConfig, VisionConfig
from twig_jax.decoding.generate import Generator
from twig_jax.decoding.settings import Request, Settings
from twig_jax.models.llava import init_base
from twig_jax.models.twig import init_twig

M = 9
TWIG = TwigConfig(K=1, T=2, K_f=4)
CONFIG = LlavaConfig(
    vision=VisionConfig(
        image_size=12, patch_size=4, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2
    ),
    text=TextConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_layers=5,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
    ),
    eos_token_id=2,
)


@functools.cache
def weights(seed: int = 0, damping: float = 0.35) -> dict[str, Any]:
    """Base parameters. Layers past the twig's are damped, so that a twig of the first layers is
    right about half of the time; the head is scaled so that answers vary."""
    base = init_base(CONFIG, jax.random.key(seed))
    keys = iter(jax.random.split(jax.random.key(seed + 1), 400))

    def wide(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        if x.ndim < 2:
            return x
        name = jax.tree_util.keystr(path)
        scale = 1.0 / np.sqrt(x.shape[0])
        if "lm_head" in name:
            scale *= 4.0
        deep = any(f"layers_{i}'" in name for i in range(TWIG.K + TWIG.T, 5)) and "text" in name
        if deep and ("o_proj" in name or "down_proj" in name):
            scale *= damping
        return scale * jax.random.normal(next(keys), x.shape, x.dtype)

    return jax.tree_util.tree_map_with_path(wide, base)


def generator(
    twig: TwigConfig = TWIG, seed: int = 0, mesh: Mesh | None = None, **changed: Any
) -> Generator:
    """Base and twig; `changed` replaces fields of the base's configuration."""
    config = dataclasses.replace(CONFIG, **changed)
    base = weights(seed)
    return Generator(config, base, twig, init_twig(base, config.text, twig), mesh=mesh)


CALL = Settings(mode="ttp_ssd", avg_retained=4, max_new_tokens=14, gamma=3, theta=0.1)


def request(seed: int, images: int, before: int, after: int, /, **changes: Any) -> Request:
    """A random prompt: text, then all images, then text. `changes` of CALL are its settings."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, CONFIG.text.vocab_size, before + images * M + after).astype(np.int32)
    is_visual = np.repeat([False, True, False], [before, images * M, after])
    size = CONFIG.vision.image_size
    pixels = rng.normal(size=(images, size, size, 3)).astype(np.float32) if images else None
    return Request(
        ids,
        is_visual,
        pixels=pixels,
        settings=dataclasses.replace(CALL, **changes) if changes else None,
    )


def mixed() -> list[Request]:
    """Four unlike rows: two images and a short answer, one, none, and a sampled one."""
    return [
        request(99, 2, 8, 8, avg_retained=5),
        request(1, 1, 2, 5, gamma=2),
        request(2, 0, 3, 4, temperature=1.0, top_k=20, seed=5),
        request(3, 1, 5, 1, avg_retained=3.2, max_new_tokens=5, repetition_penalty=1.2),
    ]
