"""Reading and preparing images."""

import io
import os
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
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


@pytest.mark.parametrize(
    ("header", "orientation", "turns"),
    [(b"II*\0", 6, -1), (b"II*\0", 9, 0), (b"\1I*\0", 6, 0)],
    ids=["damaged beside it", "no orientation", "no header"],
)
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_damaged_exif_leaves_the_image(form, header, orientation, turns):
    """Pillow reads such files, but cannot write their EXIF again: a resolution is a text."""
    tags = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)
    tags += struct.pack("<HHI4s", 0x011A, 2, 2, b"a\0\0\0")
    exif = b"Exif\0\0" + header + struct.pack("<IH", 8, 2) + tags + bytes(4)
    whole = encoded(picture(), form, exif=exif)
    expected = np.rot90(np.asarray(images.load_image(encoded(picture(), form))), turns)
    np.testing.assert_array_equal(np.asarray(images.load_image(whole)), expected)
    with Image.open(io.BytesIO(whole)) as image:
        np.testing.assert_array_equal(np.asarray(images.load_image(image)), expected)
        assert image.size == (20, 12)


@pytest.mark.parametrize("form", ["PNG", "PPM", "TIFF"])
@pytest.mark.parametrize("turned", [False, True])
def test_sixteen_bits_keep_their_upper_eight(form, turned):
    levels = np.arange(240, dtype=np.uint16).reshape(12, 20) << 8
    options = {}
    if turned and form != "PPM":
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 3
    loaded = np.asarray(images.load_image(encoded(Image.fromarray(levels + 99), form, **options)))
    expected = np.rot90(levels >> 8, 2 if options else 0)
    np.testing.assert_array_equal(loaded, np.repeat(expected[..., None], 3, axis=2))


def test_levels_of_sixteen_bits_keep_their_upper_ones():
    """Of a format that Pillow gives 32-bit numbers of; of others nothing says what is white."""
    content = b"P5 3 1 65535\n" + np.array([0, 300, 65535], ">u2").tobytes()
    with Image.open(io.BytesIO(content)) as image:
        assert image.mode == "I"
        for source in (content, image, bytearray(content), memoryview(content)):
            assert np.asarray(images.load_image(source))[0, :, 0].tolist() == [0, 1, 255]
    with pytest.raises(ValueError, match="its pixels are numbers of 32 bits, of which nothing"):
        images.load_image(Image.fromarray(np.full((2, 2), 200, np.int32)))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_dropped(mode):
    image = picture().convert(mode)
    image.putalpha(0)
    expected = np.asarray(picture().convert(mode[:-1]).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(images.load_image(encoded(image))), expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1)])
@pytest.mark.parametrize("pad", [True, False])
def test_images_of_one_pixel_or_one_line(size, pad):
    pixels = images.preprocess(images.load_image(encoded(picture(*size))), 24, pad=pad)
    assert pixels.shape == (24, 24, 3)


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
    with pytest.raises(ValueError, match=f"cannot read image of {len(content)} bytes: it is of no"):
        images.load_image(content)


def test_a_file_with_a_header_that_nothing_reads_is_refused(tmp_path):
    """Pillow raises NotImplementedError there, and RuntimeError and TypeError elsewhere."""
    content = bytearray(encoded(picture(), "DDS"))
    content[80:84] = bytes(4)  # flags of its pixels
    path = tmp_path / "odd.dds"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read image .*odd\.dds: Unknown pixel format"):
        images.load_image(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read image .*nowhere\.png"):
        images.load_image(tmp_path / "nowhere.png")


def test_files_are_read_side_by_side(tmp_path):
    """Each of these comes when all are being read, as those of a slow disk do."""
    everyone = threading.Barrier(4)

    def serve(path):
        with path.open("wb") as file:
            everyone.wait(timeout=60)
            file.write(encoded(picture()))

    paths = [tmp_path / f"{n}.png" for n in range(4)]
    for path in paths:
        os.mkfifo(path)
        threading.Thread(target=serve, args=(path,), daemon=True).start()
    with ThreadPoolExecutor(4) as threads:
        for image in threads.map(images.load_image, paths):
            np.testing.assert_array_equal(image, picture())


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


def reference(image, size, edge, pad):
    """Pixels [size, size, 3] of transformers' image processor after LLaVA's padding."""
    if pad:
        width, height = image.size
        side = max(width, height)
        square = Image.new("RGB", (side, side), (122, 116, 104))
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        image = square
    kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    processor = kind(size={"shortest_edge": edge}, crop_size={"height": size, "width": size})
    return np.asarray(processor(image, return_tensors="np")["pixel_values"][0]).transpose(1, 2, 0)


@st.composite
def sizes(draw):
    """Sides of 1 to 600 with ratios up to 50."""
    short = draw(st.integers(1, 600))
    sides = [short, draw(st.integers(short, min(600, 50 * short)))]
    return draw(st.permutations(sides))


@settings(max_examples=60, deadline=None)
@given(sizes(), st.booleans(), st.sampled_from([(24, 24), (24, 40), (24, 15), (25, 18)]))
@example([7, 600], False, (24, 24))
@example([1, 50], True, (25, 18))
def test_preprocess_equals_the_reference_processor(shape, pad, sides):
    size, edge = sides
    image = picture(*shape)
    pixels = images.preprocess(image, size, pad=pad, shortest_edge=edge)
    np.testing.assert_allclose(pixels, reference(image, size, edge, pad), atol=1e-5)


def test_an_edge_shorter_than_the_cut_leaves_black_around():
    pixels = images.preprocess(Image.new("RGB", (30, 20), "white"), 24, pad=False, shortest_edge=10)
    white = pixels[..., 0] > 0
    rows, columns = np.flatnonzero(white.any(axis=1)), np.flatnonzero(white.any(axis=0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (7, 16, 5, 19)
    black = -np.array(images.CLIP_MEAN) / images.CLIP_STD
    np.testing.assert_allclose(pixels[~white], np.tile(black, ((~white).sum(), 1)), rtol=1e-6)


def slope(width, height):
    """A picture without detail."""
    level = np.add.outer(np.linspace(0, 100, height), np.linspace(0, 150, width))
    return Image.fromarray(np.repeat(level[..., None], 3, axis=2).astype(np.uint8))


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("shape", [(600, 20), (20, 600), (300, 200), (1, 500)])
def test_images_too_large_on_their_way_look_the_same(monkeypatch, shape, pad):
    expected = images.preprocess(slope(*shape), 24, std=(1.0,) * 3, pad=pad)
    monkeypatch.setattr(images, "_MOST_PIXELS", 200**2 if pad else 24 * 30)
    pixels = images.preprocess(slope(*shape), 24, std=(1.0,) * 3, pad=pad)
    if pad:  # its edge lies between two of the coarse pixels
        assert np.abs(pixels - expected).mean() < 2 / 255
    else:
        assert np.abs(pixels - expected).max() <= 1.01 / 255


def test_a_line_too_large_on_its_way_may_be_thinner_than_the_cut(monkeypatch):
    def pixels():
        return images.fit(slope(1, 500), 24, pad=False, shortest_edge=10).astype(int)

    expected = pixels()
    monkeypatch.setattr(images, "_MOST_PIXELS", 24 * 30)
    assert np.abs(pixels() - expected).max() <= 1


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("shape", [(20000, 20), (1, 60000)])
def test_very_long_images_fit_in_memory(shape, pad):
    pixels = images.preprocess(images.load_image(encoded(Image.new("RGB", shape))), 336, pad=pad)
    assert pixels.shape == (336, 336, 3)
    assert np.isfinite(pixels).all()


def test_large_images_load_up_to_pillow_s_limit(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20 * 12 - 1)
    assert images.load_image(encoded(picture(20, 12))).size == (20, 12)
    with pytest.raises(
        ValueError, match=r"image of \d+ bytes; scale it down.* limit of 478 pixels"
    ):
        images.load_image(encoded(picture(40, 12)))


def test_pixels_of_floats_are_refused():
    """Pillow would clip them at 255, to black where they are shares."""
    with pytest.raises(ValueError, match="its pixels are floats"):
        images.load_image(Image.new("F", (4, 4), 0.5))


def test_normalize_has_one_value_per_channel():
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    got = images.normalize(pixels, (0.0, 0.5, 1.0), (1.0, 2.0, 4.0))
    np.testing.assert_allclose(got[0, 0], [0, (1 / 255 - 0.5) / 2, (2 / 255 - 1) / 4], rtol=1e-6)
