"""Reading images and preparing them for the vision tower."""

import contextlib
import io
import math
import threading
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from twig_jax.config import CLIP_MEAN, CLIP_STD

# The most pixels that Pillow reads, and that an image may have on its way: 4 bytes each.
_MOST_PIXELS = 2 * 1024**3 // 4 // 3
# Warnings are muted for the whole process, so by one thread at a time, which reads no file then.
_MUTED = threading.Lock()

ImageSource = str | Path | bytes | bytearray | memoryview | Image.Image | np.ndarray


def load_image(source: ImageSource) -> Image.Image:
    """An image as RGB, upright by its EXIF orientation, fully decoded.

    Transparency is dropped, as LLaVA's convert("RGB") does; the orientation is not applied there,
    but photographs of phones would lie on their side. Of 16 bits the upper 8 are kept.

    source: a path, the bytes of an image file, a PIL image, or a uint8 array [H, W] or
    [H, W, 1, 3 or 4].
    Raises ValueError, naming the source, for what cannot be read, is cut short, has more pixels
    than Pillow's limit, or is no such array.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source).convert("RGB")
    if isinstance(source, bytearray | memoryview):
        source = bytes(source)
    name = _name(source)
    try:
        if isinstance(source, Image.Image):
            return _to_rgb(source)
        if not isinstance(source, bytes):
            source = Path(source).expanduser().read_bytes()
        with _open(source) as image:
            return _to_rgb(image)
    except UnidentifiedImageError:
        raise ValueError(f"cannot read {name}: it is of no format that Pillow knows") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"cannot read {name}; scale it down: {error}") from error
    except Exception as error:  # decoders signal damaged data in all the ways there are
        raise ValueError(f"cannot read {name}: {error}") from error


def preprocess(
    image: Image.Image,
    size: int,
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
    pad: bool = True,
    *,
    shortest_edge: int | None = None,
) -> np.ndarray:
    """Normalised pixels float32 [size, size, 3] of an RGB image: `fit`, then `normalize`."""
    return normalize(fit(image, size, mean, pad, shortest_edge=shortest_edge), mean, std)


def fit(
    image: Image.Image,
    size: int,
    mean: tuple[float, ...] = CLIP_MEAN,
    pad: bool = True,
    *,
    shortest_edge: int | None = None,
) -> np.ndarray:
    """Pixels uint8 [size, size, 3] of an RGB image of any shape.

    The shorter side is resized to `shortest_edge` (None: to `size`) and the middle is cut out, with
    black around it where the image is smaller: transformers' CLIP image processor. Resizing is
    bicubic and left out where the size fits.
    pad: before that, the image is padded to a centred square with the mean colour (LLaVA-1.5's
    training, its expand2square).
    """
    if pad:
        image = _pad_to_square(image, tuple(int(channel * 255) for channel in mean))
    image = _resize(image, size if shortest_edge is None else shortest_edge, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def normalize(pixels: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """(pixels / 255 - mean) / std. pixels: uint8 [..., 3]. Returns float32 [..., 3]."""
    levels = np.arange(256, dtype=np.float64)[:, None] / 255
    table = ((levels - mean) / std).astype(np.float32)  # [256, 3]
    return table[pixels, np.arange(3)]


def _open(content: bytes) -> Image.Image:
    # Pillow warns from half of its limit on; images up to the limit are meant to be read.
    with _MUTED, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(content))


def _name(source: str | Path | bytes | Image.Image) -> str:
    if isinstance(source, bytes):
        return f"image of {len(source)} bytes"
    if isinstance(source, Image.Image):
        return f"image {getattr(source, 'filename', '') or 'object'}"
    return f"image {source}"


def _from_array(array: np.ndarray) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    if (
        array.dtype != np.uint8
        or array.ndim not in (2, 3)
        or channels not in (1, 3, 4)
        or not array.size
    ):
        raise ValueError(
            "an image array must be uint8 [H, W] or [H, W, 1, 3 or 4], "
            f"got {array.dtype} {list(array.shape)}"
        )
    return Image.fromarray(array[..., 0] if array.ndim == 3 and channels == 1 else array)


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    # Grey values of 16 bits come as "I;16", or of these formats as 32-bit ones.
    has_16_bits = image.mode.startswith("I;16") or image.format in ("PNG", "PPM")
    image = image.copy()  # a caller's stays as it is
    # Turned in place, as the EXIF that is written anew behind it may be damaged elsewhere.
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F" or (image.mode == "I" and not has_16_bits):
        what = "floats" if image.mode == "F" else "numbers of 32 bits"
        raise ValueError(f"its pixels are {what}, of which nothing says what is white")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow would clip them at 255.
        grey = np.asarray(image).clip(0, 65535) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    longest = math.isqrt(_MOST_PIXELS)
    if max(image.size) > longest:
        # Far finer than any vision tower sees, and its square would not fit in memory.
        image = image.reduce(-(-max(image.size) // longest))
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _resize(image: Image.Image, edge: int, size: int) -> Image.Image:
    """The image with its shorter side `edge` long; of a huge one, the `size` in its middle."""
    short = min(image.size)
    width, height = (int(edge * side / short) for side in image.size)
    if (width, height) == image.size:
        return image
    if width * height <= _MOST_PIXELS:
        return image.resize((width, height), Image.Resampling.BICUBIC)
    # A line of pixels: the whole would not fit in memory.
    left, top = max(width - size, 0) // 2, max(height - size, 0) // 2
    right, bottom = min(left + size, width), min(top + size, height)
    x, y = image.width / width, image.height / height
    return image.resize(
        (right - left, bottom - top),
        Image.Resampling.BICUBIC,
        box=(left * x, top * y, right * x, bottom * y),
    )
