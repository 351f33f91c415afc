"""Visual embeddings by image: encoded in programs of few sizes, remembered by content."""

import hashlib
import threading
from collections import OrderedDict
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from twig_jax.config import LlavaConfig
from twig_jax.hardware import runs_triton
from twig_jax.models.attention import attend
from twig_jax.models.fused_attention import fused_attend
from twig_jax.models.llava import Llava, Params
from twig_jax.sharding.placement import spread

AT_ONCE = 8  # images of the largest program; the others take powers of two below


class ImageEncoder:
    """Encodes images, and remembers up to `remembered` of them by the hash of their pixels."""

    def __init__(self, config: LlavaConfig, remembered: int = 0) -> None:
        self.config = config
        self.remembered = remembered
        self.encoded = 0  # images that went through the vision tower
        self._known: OrderedDict[bytes, jax.Array] = OrderedDict()
        self._lock = threading.Lock()  # threads that share a generator forget each other's images

    def __call__(self, base: Params, images: list[np.ndarray], dtype: jnp.dtype) -> list[jax.Array]:
        """Normalised pixels [H, W, 3] of each image -> visual embeddings [M, d] of each."""
        if not self.remembered:
            return self._encode(base, images, dtype)
        keys = [hashlib.blake2b(x.tobytes(), digest_size=16).digest() for x in images]
        with self._lock:
            found = {key: self._known[key] for key in keys if key in self._known}
        missing = {k: x for k, x in zip(keys, images, strict=True) if k not in found}
        encoded = self._encode(base, list(missing.values()), dtype)
        found |= zip(missing, encoded, strict=True)
        with self._lock:
            for key in keys:
                self._known[key] = found[key]
                self._known.move_to_end(key)
            while len(self._known) > self.remembered:
                self._known.popitem(last=False)
        return [found[key] for key in keys]

    def warm_up(self, base: Params, size: int, dtype: jnp.dtype) -> None:
        """Compiles what so many images need."""
        pixels = np.zeros((self.config.vision.image_size,) * 2 + (3,), np.float32)
        self._encode(base, [pixels] * size, dtype)

    def _encode(self, base: Params, images: list[np.ndarray], dtype: jnp.dtype) -> list[jax.Array]:
        out: list[jax.Array] = []
        gpu = runs_triton(jax.local_devices()[0])
        while len(out) < len(images):
            part = images[len(out) : len(out) + AT_ONCE]
            size = 1 << (len(part) - 1).bit_length()
            pixels = np.zeros((size, *part[0].shape), np.float32)
            for i, image in enumerate(part):
                pixels[i] = image
            visual = encode(self.config, base, pixels, dtype, gpu)
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
