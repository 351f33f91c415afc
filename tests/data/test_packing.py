"""Rows made of samples."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from twig_jax.data.packing import Encoded, Shape, choose, fill

SHAPE = Shape(rows=3, tokens=20, images=3, side=2)


def encoded(length, images=0, position=0):
    rng = np.random.default_rng([length, images, position])
    return Encoded(
        position,
        rng.integers(5, 99, length, np.int32),
        rng.random(length) < 0.5,
        rng.integers(-1, 99, length, np.int32),
        rng.integers(0, 256, (images, 2, 2, 3), np.uint8),
    )


sizes = st.lists(st.tuples(st.integers(2, 20), st.integers(0, 3)), min_size=1, max_size=30)


@given(sizes, st.booleans())
def test_a_row_holds_the_first_and_what_fits(sizes, by_modality):
    pool = [encoded(*size) for size in sizes]
    chosen = choose(pool, SHAPE, by_modality=by_modality)
    assert chosen[0] == 0
    assert len(set(chosen)) == len(chosen)
    tokens = SHAPE.tokens - sum(sizes[index][0] for index in chosen)
    images = SHAPE.images - sum(sizes[index][1] for index in chosen)
    assert tokens >= 0 and images >= 0
    if by_modality:
        assert len({sizes[index][1] > 0 for index in chosen}) == 1
    # Nothing is left that would still fit.
    for index in {*range(len(pool))} - {*chosen}:
        alike = not by_modality or (sizes[index][1] > 0) == (sizes[0][1] > 0)
        assert not (alike and sizes[index][0] <= tokens and sizes[index][1] <= images)


def test_the_longest_that_fits_comes_next_and_the_oldest_of_these():
    pool = [encoded(n, position=k) for k, n in enumerate((5, 9, 12, 12, 3, 16, 3))]
    assert choose(pool, SHAPE) == [0, 2, 4]


@settings(max_examples=50)
@given(st.lists(sizes, max_size=3))
def test_a_batch_holds_its_rows_one_sample_after_another(pools):
    rows = []
    for sizes in pools:
        pool = [encoded(*size, position=k) for k, size in enumerate(sizes)]
        rows.append([pool[index] for index in choose(pool, SHAPE)])
    batch = fill(rows, SHAPE, pad_id=7)
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        "pixels": ((3, 3, 2, 2, 3), np.uint8),
        "tokens": ((3, 20), np.int32),
        "is_visual": ((3, 20), bool),
        "positions": ((3, 20), np.int32),
        "segments": ((3, 20), np.int32),
        "targets": ((3, 20), np.int32),
    }
    empty = {"tokens": 7, "is_visual": 0, "positions": 0, "segments": 0, "targets": -1}
    for index in range(SHAPE.rows):
        samples = rows[index] if index < len(rows) else []
        padding = SHAPE.tokens - sum(len(sample.tokens) for sample in samples)
        expected = {
            "tokens": [sample.tokens for sample in samples],
            "is_visual": [sample.is_visual for sample in samples],
            "targets": [sample.targets for sample in samples],
            "positions": [range(len(sample.tokens)) for sample in samples],
            "segments": [[n] * len(sample.tokens) for n, sample in enumerate(samples, 1)],
        }
        for name, parts in expected.items():
            row = np.concatenate([*parts, [empty[name]] * padding])
            np.testing.assert_array_equal(batch[name][index], row, err_msg=name)
        pixels = [image for sample in samples for image in sample.pixels]
        unused = [np.zeros((2, 2, 3))] * (SHAPE.images - len(pixels))
        np.testing.assert_array_equal(batch["pixels"][index], [*pixels, *unused])
