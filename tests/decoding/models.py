"""Small random models whose twig often, but not always, agrees with its base."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.pruned_pass import Forced, Prompt, forward
from twig_jax.config import LlavaConfig, TextConfig, TwigConfig, VisionConfig
from twig_jax.decoding.generate import Generator
from twig_jax.decoding.settings import Request, Result, Settings
from twig_jax.models.llava import Llava, init_base
from twig_jax.models.twig import init_twig

M = 9
TWIG = TwigConfig(K=1, T=2, K_f=4)
CONFIG = LlavaConfig(
    vision=VisionConfig(
        image_size=12, patch_size=4, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2
    ),
    text=TextConfig(
        vocab_size=37,
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
def weights(seed: int = 0, damping: float = 0.35, config: LlavaConfig = CONFIG) -> dict[str, Any]:
    """Base parameters. Layers past the twig's are damped, so that a twig of the first layers is
    right about half of the time; the head is scaled so that answers vary."""
    base = init_base(config, jax.random.key(seed))
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
    twig: TwigConfig = TWIG, seed: int = 0, made: dict[str, Any] | None = None, **changed: Any
) -> Generator:
    """Base and twig; `changed` replaces fields of the base's configuration, `made` is for the
    Generator."""
    config = dataclasses.replace(CONFIG, **changed)
    base = weights(seed, config=dataclasses.replace(config, eos_token_id=CONFIG.eos_token_id))
    return Generator(config, base, twig, init_twig(base, config.text, twig), **made or {})


CALL = Settings(mode="ttp_ssd", avg_retained=4, max_new_tokens=14, gamma=3, theta=0.1)


def request(prompt: int, images: int, before: int, after: int, **changes: Any) -> Request:
    """A random prompt, by number: text, then all images, then text. `changes` of CALL are its
    settings."""
    rng = np.random.default_rng(prompt)
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


# Shapes are fixed by a first row with the largest of everything; the rest is data.
LARGEST = request(99, 2, 8, 8, avg_retained=5)


def change(one: Request, **changes: Any) -> Request:
    """The request with some of its settings changed."""
    return dataclasses.replace(one, settings=dataclasses.replace(one.settings or CALL, **changes))


def run(
    requests: Sequence[Request],
    call: Settings = CALL,
    model: Generator | None = None,
    **changed: Any,
) -> list[Result]:
    """Answers a batch; `changed` goes for the call and for rows with settings of their own."""
    rows = [change(r, **changed) if r.settings else r for r in requests]
    return (model or generator()).generate(rows, dataclasses.replace(call, **changed))


def tokens(results: Sequence[Result]) -> list[list[int]]:
    """The tokens of every answer."""
    return [r.tokens.tolist() for r in results]


_forward = jax.jit(forward, static_argnums=(0, 1, 7, 8))


def forced(model: Generator, one: Request, answer: np.ndarray, R: int) -> Forced:
    """The pruned base on an answer int32 [A], with R visual tokens kept, in one pass."""
    config, images = model.config, 0 if one.pixels is None else len(one.pixels)
    visual = jnp.zeros((1, 0, config.text.hidden_size))
    if images:
        visual = Llava(config).apply(
            {"params": model.weights.base}, jnp.asarray(one.pixels)[None], method="encode"
        )
    return _forward(
        config,
        model.twig_config,
        model.weights.base,
        model.weights.twig,
        Prompt(
            jnp.asarray(one.ids)[None],
            jnp.asarray(one.is_visual)[None],
            jnp.asarray([len(one.ids)], jnp.int32),
            visual,
        ),
        jnp.asarray(answer)[None],
        jnp.asarray([R], jnp.int32),
        len(one.ids) - images * M,
        R,
    )
