"""Pages of real handwriting: scans of digits in a four by four grid, drawn from a seed.

The scans are the 1,797 digits of 8 x 8 grey values of the UCI set "Optical Recognition of
Handwritten Digits" (see assets/digits/ATTRIBUTION.md). A page is a pure function of (split, seed,
index), so pages are endless and reproducible; the splits share no scan. Questions about a page are
in questions.py.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "digits"

GRID = 4  # cells per side of the page
CELL = 24  # pixels per side of a cell
PATCH = 8  # pixels per side of the patch behind one visual token
PAGE = GRID * CELL  # pixels per side of the page
PATCHES_PER_SIDE = PAGE // PATCH
VISUAL_TOKENS = PATCHES_PER_SIDE**2

ROWS = ("A", "B", "C", "D")
COLUMNS = ("1", "2", "3", "4")
SHADES = ("faint", "dark")
SIZES = ("small", "large")

SPLITS = ("train", "validation", "test")
_TEST_SCANS, _VALIDATION_SCANS = 300, 100

# Drawing ranges; each is clearly apart from the other of its pair, also for a person.
_SIDES = ((12.4, 13.6), (18.4, 19.6))  # pixels, small and large
_STRENGTHS = ((0.45, 0.55), (0.85, 1.0))  # share of the light that ink takes, faint and dark
_ANGLE = np.deg2rad(8.0)
_SHEAR = 0.08
_STRETCH = 0.08
_INK_SHARE = 0.06  # a patch carries a digit when it holds this share of its ink
_ADJACENT_SHARE = 0.5  # how often the next digit is put beside a digit that is there


@dataclass(frozen=True)
class Digit:
    """One handwritten digit on a page.

    row, column: 0..3 from the top left. value: 0..9. shade: 0 faint, 1 dark. size: 0 small, 1
    large.
    scan: index into the embedded scans. patches: the visual tokens (0..143, row by row) that hold
    at least 6 % of its ink, most ink first.
    """

    row: int
    column: int
    value: int
    shade: int
    size: int
    scan: int
    patches: tuple[int, ...]


@dataclass(frozen=True)
class Page:
    """image: uint8 [96, 96, 3]. digits: three to eight, in reading order."""

    image: np.ndarray
    digits: tuple[Digit, ...]


@dataclass(frozen=True)
class Scans:
    """images: float32 [1797, 10, 10], ink 0..1 ringed by zeros. labels: [1797]. splits: indices."""

    images: np.ndarray
    labels: np.ndarray
    splits: dict[str, np.ndarray]


@functools.cache
def scans() -> Scans:
    """The embedded scans and their splits, stratified: 1,397 train, 100 validation, 300 test."""
    with np.load(ASSETS / "scans.npz") as stored:
        images, labels, order = stored["images"], stored["labels"], stored["order"]
    held_out = _TEST_SCANS + _VALIDATION_SCANS
    splits = {
        "test": order[:_TEST_SCANS],
        "validation": order[_TEST_SCANS:held_out],
        "train": order[held_out:],
    }
    ringed = np.pad(images.astype(np.float32) / 16.0, ((0, 0), (1, 1), (1, 1)))
    return Scans(ringed, labels, splits)


def generator(split: str, seed: int, index: int, *stream: int) -> np.random.Generator:
    """The random numbers of one item; `stream` tells apart its page (0) and its questions (1).

    Raises ValueError for an unknown split or a negative seed or index.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}, expected one of {', '.join(SPLITS)}")
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must not be negative, got seed {seed} and index {index}")
    return np.random.default_rng([SPLITS.index(split), seed, index, *stream])


def page(split: str, seed: int, index: int, variant: int = 0) -> Page:
    """Page number `index` of an endless sequence; `variant` counts more pages under its number."""
    return _draw(split, generator(split, seed, index, 0, variant))


def _draw(split: str, rng: np.random.Generator) -> Page:
    cells = _place(rng)
    count = len(cells)
    rows, columns = np.divmod(np.array(cells), GRID)
    pool = scans().splits[split]
    chosen = pool[rng.integers(len(pool), size=count)]
    shades, sizes = rng.integers(2, size=(2, count))
    ink = _ink(scans().images[chosen], sizes, rng)  # [n, 24, 24]

    low, high = np.array(_STRENGTHS)[shades].T
    strength = rng.uniform(low, high)
    canvas = np.zeros((GRID, CELL, GRID, CELL), np.float32)
    canvas[rows, :, columns, :] = strength[:, None, None] * ink

    digits = tuple(
        Digit(*described)
        for described in zip(
            rows.tolist(),
            columns.tolist(),
            scans().labels[chosen].tolist(),
            shades.tolist(),
            sizes.tolist(),
            chosen.tolist(),
            _patches(ink, rows, columns),
            strict=True,
        )
    )
    return Page(_paint(canvas.reshape(PAGE, PAGE), rng), digits)


def _beside(cell: int) -> tuple[int, ...]:
    row, column = divmod(cell, GRID)
    near = ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1))
    return tuple(r * GRID + c for r, c in near if 0 <= r < GRID and 0 <= c < GRID)


_BESIDE = tuple(_beside(cell) for cell in range(GRID * GRID))


def _place(rng: np.random.Generator) -> list[int]:
    """Three to eight distinct cells, a little in favour of neighbours, in reading order.

    Eight are eleven times as likely as three: where few digits stand on a page, keeping all its ink
    is enough, and a selector needs no question.
    """
    count = 3 + int(6 * np.sqrt(rng.random()))
    free = list(range(GRID * GRID))
    cells: list[int] = []
    for beside, pick in rng.random((count, 2)).tolist():
        options = free
        if cells and beside < _ADJACENT_SHARE:
            near = {cell for taken in cells for cell in _BESIDE[taken]}
            options = [cell for cell in free if cell in near]
        cell = options[int(pick * len(options))]
        cells.append(cell)
        free.remove(cell)
    return sorted(cells)


def _ink(images: np.ndarray, sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Resample scans into cells by one affine map each, bilinear.

    images: float32 [n, 10, 10] with a ring of zeros; sizes: [n]. Returns float32 [n, 24, 24], ink
    0..1.
    """
    count = len(images)
    low, high = np.array(_SIDES)[sizes].T
    side = rng.uniform(low, high)
    angle, shear, stretch_x, stretch_y, x, y = rng.uniform(-1.0, 1.0, (6, count))
    cosine, sine = np.cos(angle * _ANGLE), np.sin(angle * _ANGLE)
    shear = shear * _SHEAR
    scale_x, scale_y = side / 8 * (1 + stretch_x * _STRETCH), side / 8 * (1 + stretch_y * _STRETCH)
    # Scan to page: rotate(shear(stretch(.))), columns of the 2 x 2 matrix [[a, b], [c, d]].
    a, b = cosine * scale_x, (cosine * shear - sine) * scale_y
    c, d = sine * scale_x, (sine * shear + cosine) * scale_y

    half = 4 * np.stack([np.abs(a) + np.abs(b), np.abs(c) + np.abs(d)])  # of the bounding box
    fit = np.minimum(1.0, CELL / 2 / half.max(axis=0))
    a, b, c, d = a * fit, b * fit, c * fit, d * fit
    centre_x, centre_y = CELL / 2 + (CELL / 2 - half * fit) * np.stack([x, y])

    inverse = np.stack([d, -b, -c, a]) / (a * d - b * c)
    p, q, r, s = inverse.astype(np.float32)[:, :, None, None]
    pixels = np.arange(CELL) + 0.5
    dx = (pixels - centre_x[:, None]).astype(np.float32)[:, None, :]  # [n, 1, 24]
    dy = (pixels - centre_y[:, None]).astype(np.float32)[:, :, None]  # [n, 24, 1]
    # The scan's centre is 4.5 in the ringed array; clipping to the ring reads zeros outside.
    source_x = np.clip(p * dx + q * dy + np.float32(4.5), 0, 9)  # [n, 24, 24]
    source_y = np.clip(r * dx + s * dy + np.float32(4.5), 0, 9)
    left = np.minimum(source_x.astype(np.int32), 8)
    top = np.minimum(source_y.astype(np.int32), 8)
    source_x -= left
    source_y -= top
    corner = np.arange(count)[:, None, None] * 100 + top * 10 + left
    flat = images.ravel()
    upper_left, lower_left = flat.take(corner), flat.take(corner + 10)
    upper = upper_left + (flat.take(corner + 1) - upper_left) * source_x
    lower = lower_left + (flat.take(corner + 11) - lower_left) * source_x
    return upper + (lower - upper) * source_y


def _patches(ink: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> list[tuple[int, ...]]:
    """The visual tokens that carry each digit, most ink first. ink: [n, 24, 24]."""
    per_cell = CELL // PATCH
    mass = ink.reshape(-1, per_cell, PATCH, per_cell, PATCH).sum(axis=(2, 4)).reshape(len(ink), -1)
    share = mass / mass.sum(axis=1, keepdims=True)
    order = np.argsort(-share, axis=1, kind="stable")
    down, across = np.divmod(order, per_cell)
    token = (
        (rows[:, None] * per_cell + down) * PATCHES_PER_SIDE + columns[:, None] * per_cell + across
    )
    carried = (share >= _INK_SHARE).sum(axis=1)
    return [tuple(tokens[:n]) for tokens, n in zip(token.tolist(), carried.tolist(), strict=True)]


def _paint(ink: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Ink on light, slightly coloured, slightly noisy paper.

    ink: float32 [96, 96], the share of light taken. Returns uint8 [96, 96, 3].
    """
    paper = rng.uniform(0.88, 0.95) + rng.uniform(-0.03, 0.03, (3, 1, 1)).astype(np.float32)
    absorbed = rng.uniform(0.92, 1.0, (3, 1, 1)).astype(np.float32)
    light = rng.random((3, PAGE, PAGE), dtype=np.float32)  # channels first, for long inner loops
    light *= 0.04
    light += paper - 0.02  # at most 1
    light *= 1 - ink * absorbed
    light *= 255
    return np.ascontiguousarray(light.astype(np.uint8).transpose(1, 2, 0))
