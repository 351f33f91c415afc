"""Reading images and preparing them for the vision tower."""

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# CLIP's channel statistics, of values 0..1.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

ImageSource = str | Path | bytes | Image.Image | np.ndarray


def load_image(source: ImageSource) -> Image.Image:
    """An image as RGB, upright by its EXIF orientation, fully decoded.

    source: a path, the bytes of an image file, a PIL image, or a uint8 array [H, W] or
    [H, W, 1, 3 or 4].
    Raises ValueError, naming the source, for what cannot be read, is cut short, or is no such
    array.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source).convert("RGB")
    name = _name(source)
    try:
        if isinstance(source, Image.Image):
            return _to_rgb(source)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return _to_rgb(image)
    # Decoders signal damaged data in all of these ways.
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        IndexError,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        raise ValueError(f"cannot read {name}: {error}") from error


def preprocess(
    image: Image.Image,
    size: int,
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
    pad: bool = True,
) -> np.ndarray:
    """Normalised pixels float32 [size, size, 3] of an RGB image.

    pad: pad to a centred square with the mean colour (LLaVA-1.5's training); otherwise the shorter
    side is resized to `size` and the middle is cut out (CLIP's own rule). Resizing is bicubic and
    left out where the size fits.
    """
    if pad:
        image = _pad_to_square(image, tuple(int(channel * 255) for channel in mean))
        resized = (size, size)
    else:
        short = min(image.size)
        resized = (int(size * image.width / short), int(size * image.height / short))
    if image.size != resized:
        image = image.resize(resized, Image.Resampling.BICUBIC)
    if image.size != (size, size):
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return normalize(np.asarray(image), mean, std)


def normalize(pixels: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """(pixels / 255 - mean) / std. pixels: uint8 [..., 3]. Returns float32 [..., 3]."""
    levels = np.arange(256, dtype=np.float64)[:, None] / 255
    table = ((levels - mean) / std).astype(np.float32)  # [256, 3]
    return table[pixels, np.arange(3)]


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
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        # Pillow would clip 16-bit grey values at 255.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square
