"""Pages: splits, determinism, and what is drawn where."""

import itertools

import numpy as np
import pytest
from sklearn.datasets import load_digits

from twig_jax.data import digits


def pages(split="test", seed=3, count=60):
    return [digits.page(split, seed, index) for index in range(count)]


def cell_of(page, digit):
    top, left = digit.row * digits.CELL, digit.column * digits.CELL
    return page.image[top : top + digits.CELL, left : left + digits.CELL].astype(float)


def darkness(cell):
    """How far each pixel of a cell is below its paper, 0..1."""
    grey = cell.mean(axis=2)
    return 1 - grey / np.percentile(grey, 97)


def test_splits_are_disjoint_complete_and_stratified():
    splits = digits.scans().splits
    assert {name: len(scans) for name, scans in splits.items()} == {
        "train": 1397,
        "validation": 100,
        "test": 300,
    }
    assert sorted(np.concatenate(list(splits.values()))) == list(range(1797))
    for name, scans in splits.items():
        share = np.bincount(digits.scans().labels[scans], minlength=10) / len(scans)
        assert np.abs(share - 0.1).max() < 0.02, name


def test_scans_are_those_of_scikit_learn():
    source = load_digits()
    scans = digits.scans()
    np.testing.assert_array_equal(scans.images[:, 1:-1, 1:-1] * 16, source.images)
    np.testing.assert_array_equal(scans.labels, source.target)
    assert scans.images[:, [0, -1]].max() == 0
    assert scans.images[:, :, [0, -1]].max() == 0


@pytest.mark.parametrize("split", digits.SPLITS)
def test_a_page_uses_scans_of_its_split(split):
    own = set(digits.scans().splits[split].tolist())
    for page in pages(split):
        assert {digit.scan for digit in page.digits} <= own


def test_a_page_is_a_function_of_its_numbers():
    first = digits.page("train", 1, 7)
    again = digits.page("train", 1, 7)
    np.testing.assert_array_equal(first.image, again.image)
    assert first.digits == again.digits
    others = [("train", 1, 8), ("train", 2, 7), ("test", 1, 7), ("train", 7, 1), ("train", 1, 7, 1)]
    for other in others:
        assert digits.page(*other).digits != first.digits


def test_pages_have_three_to_eight_digits_in_distinct_cells_in_reading_order():
    counts = []
    for page in pages(count=200):
        cells = [(digit.row, digit.column) for digit in page.digits]
        assert cells == sorted(set(cells))
        assert all(0 <= row < 4 and 0 <= column < 4 for row, column in cells)
        for digit in page.digits:
            assert digits.scans().labels[digit.scan] == digit.value
        assert page.image.shape == (96, 96, 3)
        assert page.image.dtype == np.uint8
        counts.append(len(cells))
    assert set(counts) == {3, 4, 5, 6, 7, 8}


def test_ink_is_in_filled_cells_only():
    for page in pages():
        filled = {(digit.row, digit.column) for digit in page.digits}
        for row in range(4):
            for column in range(4):
                cell = page.image[row * 24 : row * 24 + 24, column * 24 : column * 24 + 24]
                # Paper is light and its noise is low.
                assert (cell.min() > 200) == ((row, column) not in filled)


def test_shades_and_sizes_are_clearly_apart():
    depth, height = {0: [], 1: []}, {0: [], 1: []}
    for page in pages(count=150):
        for digit in page.digits:
            dark = darkness(cell_of(page, digit))
            depth[digit.shade].append(np.percentile(dark, 98))
            rows = np.flatnonzero((dark > 0.25).any(axis=1))
            height[digit.size].append(rows[-1] - rows[0] + 1)
    assert max(depth[0]) < min(depth[1])
    # Some writers' digits are flat, so that heights touch at the edges, far from the middles.
    assert np.percentile(height[0], 98) < np.percentile(height[1], 2)
    assert len(depth[0]) / len(depth[1]) == pytest.approx(1, abs=0.25)


def test_patches_are_those_with_ink_most_first():
    for page in pages():
        for digit in page.digits:
            mass = darkness(cell_of(page, digit)).clip(0.05) - 0.05  # leaves the noise out
            by_patch = mass.reshape(3, 8, 3, 8).sum(axis=(1, 3))
            share = by_patch / by_patch.sum()
            seen = []
            for patch in digit.patches:
                row, column = divmod(patch, 12)
                assert (row // 3, column // 3) == (digit.row, digit.column)
                seen.append(share[row % 3, column % 3])
            assert 1 <= len(set(digit.patches)) == len(digit.patches) <= 9
            assert min(seen) > 0.03
            assert sum(seen) > 0.75
            assert all(later < earlier + 0.04 for earlier, later in itertools.pairwise(seen))


def test_digits_stand_in_all_places_alike():
    """The jitter moves a small digit's ink over the whole cell."""
    total = np.zeros((24, 24))
    for page in pages(count=150):
        for digit in page.digits:
            if digit.size == 0:
                total += darkness(cell_of(page, digit)) > 0.2
    assert (total[2:-2, 4:-4] > 0).all()


def test_digits_with_neighbours_are_common():
    close = 0
    for page in pages(count=200):
        cells = {(digit.row, digit.column) for digit in page.digits}
        close += any(
            (row, column + 1) in cells or (row + 1, column) in cells for row, column in cells
        )
    assert close / 200 > 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dev", 0, 0), "unknown split 'dev', expected one of train, validation, test"),
        (("train", -1, 0), "must not be negative"),
        (("train", 0, -1), "must not be negative"),
    ],
)
def test_bad_numbers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        digits.page(*arguments)
