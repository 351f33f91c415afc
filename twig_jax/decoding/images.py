"""Visual embeddings by image: encoded in programs of few sizes, remembered by content."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from twig_jax.config import LlavaConfig
from twig_jax.decoding.network import Weights
from twig_jax.decoding.settings import Request
from twig_jax.hardware import runs_triton
from twig_jax.models.attention import attend
from twig_jax.models.fused_attention import fused_attend
from twig_jax.models.llava import Llava, Params
from twig_jax.sharding.placement import spread

PROGRAMS = 1, 2, 4, 8  # images of each program


class ImageEncoder:
    """Encodes images, and remembers up to `remembered` of them by the hash of their pixels."""

    def __init__(self, config: LlavaConfig, weights: Weights, remembered: int = 0) -> None:
        self.config, self.weights = config, weights
        self.remembered = remembered
        self.encoded = 0  # images that went through the vision tower
        self._known: OrderedDict[bytes, jax.Array] = OrderedDict()
        self._lock = threading.Lock()  # threads that share a generator forget each other's images

    def __call__(self, images: list[np.ndarray]) -> list[jax.Array]:
        """Normalised pixels [H, W, 3] of each image -> visual embeddings [M, d] of each."""
        if not self.remembered:
            return self._encode(images)
        keys = [hashlib.blake2b(x.tobytes(), digest_size=16).digest() for x in images]
        with self._lock:
            found = {key: self._known[key] for key in keys if key in self._known}
        missing = {k: x for k, x in zip(keys, images, strict=True) if k not in found}
        encoded = self._encode(list(missing.values()))
        found |= zip(missing, encoded, strict=True)
        with self._lock:
            for key in keys:
                self._known[key] = found[key]
                self._known.move_to_end(key)
            while len(self._known) > self.remembered:
                self._known.popitem(last=False)
        return [found[key] for key in keys]

    def embed(self, requests: Sequence[Request], rows: int, images: int) -> Any:
        """Visual embeddings [rows, images * M, d]; what has fewer images is padded at its end."""
        d, M = self.config.text.hidden_size, self.config.vision.num_tokens
        if not images:
            return np.zeros((rows, 0, d), self.weights.dtype)
        # Rows that only fill a batch up are one request several times.
        pixels = {id(r.pixels): r.pixels for r in requests if r.pixels is not None}
        encoded = iter(self([x for one in pixels.values() for x in one]))
        found = {which: [next(encoded) for _ in one] for which, one in pixels.items()}
        table: list[list[jax.Array]] = []
        for request in requests:
            row: list[jax.Array] = []
            if request.visual is not None:
                whole = np.zeros((-(-len(request.visual) // M) * M, d), self.weights.dtype)
                whole[: len(request.visual)] = np.asarray(request.visual).astype(self.weights.dtype)
                row += [upload(x) for x in whole.reshape(-1, M, d)]
            row += found.get(id(request.pixels), [])
            table.append(row + [self._nothing] * (images - len(row)))
        table += [[self._nothing] * images] * (rows - len(table))
        return place(table)

    def warm_up(self, count: int) -> None:
        """Compiles what any number of images up to `count` needs."""
        _ = self._nothing
        pixels = np.zeros((self.config.vision.image_size,) * 2 + (3,), np.float32)
        for size in PROGRAMS:
            if size < 2 * count:  # as numbers between are rounded up
                self._encode([pixels] * size)

    @cached_property
    def _nothing(self) -> jax.Array:
        """Embeddings [M, d] in an image's place, for rows that have fewer than others."""
        shape = self.config.vision.num_tokens, self.config.text.hidden_size
        return upload(np.zeros(shape, self.weights.dtype))

    def _encode(self, images: list[np.ndarray]) -> list[jax.Array]:
        out: list[jax.Array] = []
        gpu = runs_triton(jax.local_devices()[0])
        while len(out) < len(images):
            part = images[len(out) : len(out) + PROGRAMS[-1]]
            size = 1 << (len(part) - 1).bit_length()
            pixels = np.zeros((size, *part[0].shape), np.float32)
            for i, image in enumerate(part):
                pixels[i] = image
            visual = encode(self.config, self.weights.base, pixels, self.weights.dtype, gpu)
            out += visual[: len(part)]
            self.encoded += len(part)
        return out


@partial(jax.jit, static_argnums=(0, 3, 4))
def encode(
    config: LlavaConfig, base: Params, pixels: jax.Array | np.ndarray, dtype: jnp.dtype, gpu: bool
) -> list[jax.Array]:
    """Pixels [n, H, W, 3] -> one [M, d] an image, computed in `dtype`. gpu: see `Program`."""
    # Rounded on the device, as hosts take a third of a millisecond an image for it.
    pixels = spread(jnp.asarray(pixels, dtype), "rows")
    attention = fused_attend if gpu else attend
    visual = Llava(config).apply({"params": base}, pixels[:, None], attention, method="encode")
    return [spread(x) for x in visual]


@jax.jit
def upload(x: np.ndarray) -> jax.Array:
    """An embedding that was given, where `encode` puts its own."""
    return spread(jnp.asarray(x))


@jax.jit
def place(rows: list[list[jax.Array]]) -> jax.Array:
    """Embeddings [M, d], I of each row -> [B, I·M, d]."""
    return jnp.stack([jnp.concatenate(row) for row in rows])
