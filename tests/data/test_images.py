"""Reading and preparing images."""

import io

import numpy as np
import pytest
import transformers
from PIL import Image

from twig_jax.data import images


def picture(width=20, height=12, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def test_path_bytes_image_and_array_agree(tmp_path):
    image = picture()
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(image))
    for source in (path, str(path), encoded(image), image, np.asarray(image)):
        loaded = images.load_image(source)
        assert loaded.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(loaded), np.asarray(image))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode):
    if mode == "I;16":
        image = Image.fromarray(np.full((12, 20), 128 << 8, np.uint16))
    else:
        image = Image.new("RGB", (20, 12), (128, 128, 128))
        image = image.convert(mode, palette=Image.Palette.ADAPTIVE)
    form = "TIFF" if mode == "CMYK" else "PNG"
    loaded = images.load_image(encoded(image, form))
    assert (loaded.mode, loaded.size) == ("RGB", (20, 12))
    if mode != "1":
        assert np.abs(np.asarray(loaded).astype(int) - 128).max() <= 2


def test_a_palette_with_transparency_loads_without_warning(recwarn):
    image = picture().convert("P", palette=Image.Palette.ADAPTIVE)
    images.load_image(encoded(image, transparency=bytes([0, 128] * 20)))
    assert not recwarn.list


def test_exif_orientation_is_applied():
    image = picture()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    loaded = images.load_image(encoded(image, exif=exif))
    np.testing.assert_array_equal(np.asarray(loaded), np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize("shape", [(12, 20), (12, 20, 1), (12, 20, 3), (12, 20, 4)])
def test_arrays_of_one_to_four_channels(shape):
    assert images.load_image(np.full(shape, 7, np.uint8)).size == (20, 12)


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 2), np.uint8), np.zeros((0, 4, 3), np.uint8)],
)
def test_other_arrays_are_refused(array):
    with pytest.raises(ValueError, match="must be uint8"):
        images.load_image(array)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_truncated_file_is_refused_by_name(tmp_path, form, share):
    content = encoded(picture(64, 64), form)
    path = tmp_path / "cut.img"
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"cannot read image .*cut\.img"):
        images.load_image(path)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"])
def test_bytes_that_are_no_image_are_refused(content):
    with pytest.raises(ValueError, match=f"cannot read image of {len(content)} bytes"):
        images.load_image(content)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read image .*nowhere\.png"):
        images.load_image(tmp_path / "nowhere.png")


def test_an_open_image_with_a_cut_file_is_refused(tmp_path):
    path = tmp_path / "cut.png"
    path.write_bytes(encoded(picture(64, 64))[:2000])
    with (
        Image.open(path) as image,
        pytest.raises(ValueError, match=r"cannot read image .*cut\.png"),
    ):
        images.load_image(image)


def test_preprocess_normalises_without_resizing():
    image = picture(16, 16)
    pixels = images.preprocess(image, 16)
    expected = (np.asarray(image) / 255 - images.CLIP_MEAN) / images.CLIP_STD
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("width", "height"), [(20, 12), (12, 20)])
def test_preprocess_pads_with_the_mean(width, height):
    pixels = images.preprocess(Image.new("RGB", (width, height), "white"), 20)
    ink = pixels[..., 0] > 1
    assert ink.sum() == width * height
    assert np.abs(pixels[~ink]).max() < 0.02
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    assert (rows[0], columns[0]) == ((20 - height) // 2, (20 - width) // 2)


@pytest.mark.parametrize("size", [(40, 30), (30, 41), (7, 90)])
@pytest.mark.parametrize("pad", [True, False])
def test_preprocess_equals_the_reference_processor(size, pad):
    reference = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    processor = reference(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    image = picture(*size)
    given = image
    if pad:
        given = Image.new("RGB", (max(size),) * 2, tuple(int(255 * x) for x in images.CLIP_MEAN))
        given.paste(image, tuple((max(size) - side) // 2 for side in size))
    expected = np.asarray(processor(given, return_tensors="np")["pixel_values"][0])
    pixels = images.preprocess(image, 24, pad=pad)
    np.testing.assert_allclose(pixels, expected.transpose(1, 2, 0), atol=1e-5)


def test_normalize_has_one_value_per_channel():
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    got = images.normalize(pixels, (0.0, 0.5, 1.0), (1.0, 2.0, 4.0))
    np.testing.assert_allclose(got[0, 0], [0, (1 / 255 - 0.5) / 2, (2 / 255 - 1) / 4], rtol=1e-6)
