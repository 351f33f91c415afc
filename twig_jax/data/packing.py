"""Packing samples of different lengths into rows of one length.

A row of two samples, the first with an image of three visual tokens:

    tokens     BOS # # # What ? Seven </s> | BOS Who ? Me </s> | pad pad
    segments   1   1 1 1 1    1 1     1    | 2   2   2 2  2    | 0   0
    positions  0   1 2 3 4    5 6     7    | 0   1   2 3  4    | 0   0
    targets    -1 -1-1-1 -1   Seven </s> -1| -1 -1  Me </s> -1 | -1  -1
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Batch = dict[str, np.ndarray]

# The segment of tokens that all segments of their row see.
SHARED = -1


@dataclass(frozen=True)
class Encoded:
    """A sample as arrays, with n tokens and i images.

    position: its number in the order of reading, over all shards. tokens, targets: int32 [n], as
    in a batch. is_visual: bool [n]. pixels: uint8 [i, H, W, 3].
    """

    position: int
    tokens: np.ndarray
    is_visual: np.ndarray
    targets: np.ndarray
    pixels: np.ndarray


@dataclass(frozen=True)
class Shape:
    """rows: of a batch. tokens, images: most of a row. side: pixels of an image's side."""

    rows: int
    tokens: int
    images: int
    side: int


def choose(pool: Sequence[Encoded], shape: Shape, *, by_modality: bool = False) -> list[int]:
    """Which samples of a pool make the next row: the first, then the longest that fits, and on.

    The first is the one that waits longest, so that none waits for ever. by_modality: a row holds
    samples with images or samples without.
    Returns indices into the pool, in the order of the row. Every sample must fit into a row.
    """
    chosen, tokens, slots = [0], shape.tokens, shape.images
    free = list(range(1, len(pool)))
    if by_modality:
        illustrated = len(pool[0].pixels) > 0
        free = [index for index in free if (len(pool[index].pixels) > 0) == illustrated]
    while True:
        tokens -= len(pool[chosen[-1]].tokens)
        slots -= len(pool[chosen[-1]].pixels)
        free = [
            index
            for index in free
            if index != chosen[-1]
            and len(pool[index].tokens) <= tokens
            and len(pool[index].pixels) <= slots
        ]
        if not free:
            return chosen
        chosen.append(max(free, key=lambda index: len(pool[index].tokens)))


def fill(rows: Sequence[Sequence[Encoded]], shape: Shape, pad_id: int) -> Batch:
    """The batch of these rows, with B, S, I, H = W of the shape; rows that are missing are empty.

    pixels     uint8 [B, I, H, W, 3]  those of a row's samples in their order; 0 where unused
    tokens     int32 [B, S]  image slots hold the image token, padding the pad id
    is_visual  bool [B, S]
    positions  int32 [B, S]  from 0 in every sample, 0 at padding
    segments   int32 [B, S]  1.. samples of the row, 0 padding
    targets    int32 [B, S]  the next token where it belongs to an answer, else -1
    """
    size = (shape.rows, shape.tokens)
    batch: Batch = {
        "pixels": np.zeros((shape.rows, shape.images, shape.side, shape.side, 3), np.uint8),
        "tokens": np.full(size, pad_id, np.int32),
        "is_visual": np.zeros(size, bool),
        "positions": np.zeros(size, np.int32),
        "segments": np.zeros(size, np.int32),
        "targets": np.full(size, -1, np.int32),
    }
    for row, samples in enumerate(rows):
        end = image = 0
        for segment, sample in enumerate(samples, 1):
            begin, end = end, end + len(sample.tokens)
            batch["tokens"][row, begin:end] = sample.tokens
            batch["is_visual"][row, begin:end] = sample.is_visual
            batch["positions"][row, begin:end] = np.arange(end - begin)
            batch["segments"][row, begin:end] = segment
            batch["targets"][row, begin:end] = sample.targets
            for pixels in sample.pixels:
                batch["pixels"][row, image] = pixels
                image += 1
    return batch
