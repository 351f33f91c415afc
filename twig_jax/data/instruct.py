"""Training batches of conversations: read, decoded, tokenised, masked and packed.

Everything up to a sample's arrays is a function of its place in the source, and may run in worker
processes. Packing follows in one place and in the order of reading, so batches do not depend on
how many workers there are.
"""

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from twig_jax.config import LlavaConfig
from twig_jax.data import conversation, images, packing
from twig_jax.data.packing import Batch, Encoded, Shape
from twig_jax.data.sources import NEEDS, BadSample, Sample, Source, check_bad
from twig_jax.data.tokens import Conventions, answer_ids

# Samples that wait to be packed. More make less padding, and take longer to read on resuming.
_POOL = 128
# What one process decodes at a time, and how many samples it keeps ready.
_THREADS, _READY = 4, 16
# Bytes of samples that workers hold ready, in shared memory: a container has 64 MB, unless it is
# given more, and workers die where that is full.
_SHARED = 48 * 2**20
# Samples, or an epoch of fewer, that bad ones are judged by: before, chance would decide.
_ENOUGH = 10_000
# Batches that are made ahead of training.
_AHEAD = 2

_LOG = logging.getLogger(__name__)


class Encoder:
    """Turns samples into what a model with these conventions trains on.

    max_tokens: where a sample is cut off. max_images: the most images that one may have.
    """

    def __init__(
        self,
        tokenizer: Any,
        config: LlavaConfig,
        conventions: Conventions,
        *,
        max_tokens: int,
        max_images: int,
    ) -> None:
        self._tokenizer, self._config, self._conventions = tokenizer, config, conventions
        self._max_tokens, self._max_images = max_tokens, max_images

    def __call__(self, sample: Sample) -> dict[str, np.ndarray]:
        """tokens, is_visual, targets [n] and pixels uint8 [i, H, W, 3] of a sample.

        Targets are the tokens of answers and what ends them. What is longer than max_tokens is
        cut off there, or before an image that would be cut apart.
        Raises BadSample where an image cannot be read, none of the answers is left, or more images
        are left than allowed.
        """
        text, spans = conversation.answers(self._conventions.template, sample.turns)
        tokens_per_image = self._config.vision.num_tokens
        ids, is_visual, is_answer = answer_ids(
            self._tokenizer,
            text,
            spans,
            self._config.image_token_id,
            tokens_per_image,
            tokenize=self._conventions.tokenize,
        )
        cut = min(len(ids), self._max_tokens)
        whole, rest = divmod(int(is_visual[:cut].sum()), tokens_per_image)
        if rest:
            cut = int(np.flatnonzero(is_visual)[whole * tokens_per_image])
        ids, is_visual = ids[:cut], is_visual[:cut]
        targets = np.full(cut, -1, np.int32)
        targets[:-1] = np.where(is_answer[1:cut], ids[1:], -1)
        if (targets < 0).all():
            raise BadSample(sample.id, f"no answer begins within {self._max_tokens} tokens")
        if whole > self._max_images:
            raise BadSample(sample.id, f"has {whole} images, a row has {self._max_images}")
        side = self._config.vision.image_size
        pixels = np.zeros((whole, side, side, 3), np.uint8)
        for slot, image in zip(pixels, sample.images, strict=False):
            try:
                loaded = images.load_image(image)
            except ValueError as error:
                raise BadSample(sample.id, str(error)) from None
            slot[:] = images.fit(
                loaded,
                side,
                self._config.vision.image_mean,
                self._conventions.pad,
                shortest_edge=self._conventions.shortest_edge,
            )
        return {"tokens": ids, "is_visual": is_visual, "targets": targets, "pixels": pixels}


class InstructBatches:
    """An iterator of packed batches, whose position can be saved; for their content see `fill`.

    source: conversations, see `sources.open_source`. tokenizer, config, conventions: those of the
    base, see `tokens`. batch_size, row_tokens, row_images: rows of a batch on this host, tokens and
    images of a row. max_tokens: where samples are cut off (None: at the length of a row).
    seed: of the order, which is another in each epoch. epochs: None for no end; otherwise the last
    batch is filled up with empty rows, and hosts may end after different numbers of batches.
    shard: (index, count) of this host among those that share the source; every epoch they hold
    other parts of it.
    workers: processes that read ahead, 0 to read in threads of this one.
    by_modality: no row has both samples with images and samples without, as LLaVA groups them.
    max_bad_fraction: the share of bad samples, logged and left out, that is put up with.

    Raises ValueError for settings out of range or a source that is smaller than the number of
    shards, ImportError without grain. `next` raises ValueError where too many samples are bad.
    `close` ends the workers.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Any,
        config: LlavaConfig,
        conventions: Conventions,
        *,
        batch_size: int,
        row_tokens: int,
        row_images: int,
        max_tokens: int | None = None,
        seed: int = 0,
        epochs: int | None = None,
        shard: tuple[int, int] = (0, 1),
        workers: int = 0,
        by_modality: bool = False,
        max_bad_fraction: float = 0.01,
    ) -> None:
        max_tokens = row_tokens if max_tokens is None else max_tokens
        _check(config, batch_size, row_tokens, row_images, max_tokens, shard, max_bad_fraction)
        if len(source) < shard[1]:
            raise ValueError(
                f"the data has {len(source)} samples, which are too few for {shard[1]} shards"
            )
        grain = _grain()
        encoder = Encoder(
            tokenizer, config, conventions, max_tokens=max_tokens, max_images=row_images
        )
        samples = grain.MapDataset.source(_Reader(source, encoder)).shuffle(seed=seed)
        samples = samples.repeat(epochs)
        self._packer = _Packer(
            samples[shard[0] :: shard[1]],
            samples,
            Shape(batch_size, row_tokens, row_images, config.vision.image_size),
            config,
            enough=min(len(source), _ENOUGH),
            origin={"samples": len(source), "seed": seed},
            shard=shard,
            workers=workers,
            by_modality=by_modality,
            max_bad_fraction=max_bad_fraction,
        )
        self._batches = grain.experimental.ThreadPrefetchDatasetIterator(self._packer, _AHEAD)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """The position behind the last batch that was given, to be saved as JSON."""
        return self._batches.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a saved position, with any number of workers.

        Raises ValueError for a position in another source, order or shard.
        """
        self._batches.set_state(state)

    @staticmethod
    def reshard(states: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
        """Positions of `count` shards that together go on where others stopped.

        states: of all those others, by shard. The order of reading is kept and every sample that
        was not in a batch yet will be in one; which samples share a row becomes another.
        """
        others = len(states)
        # All go on at the same place; what some have not read up to there, waits with the rest.
        end = max(state["read"] for state in states) * others
        waiting = [position for state in states for position in state["pool"]]
        for shard, state in enumerate(states):
            waiting += range(state["read"] * others + shard, end, others)
        waiting.sort()
        return [
            {
                **states[0],
                "shard": [shard, count],
                "read": -((shard - end) // count),
                "pool": waiting[shard::count],
                **{
                    name: (sum(state[name] for state in states) + count - 1 - shard) // count
                    for name in ("bad", "rows", "tokens", "images")
                },
            }
            for shard in range(count)
        ]

    @property
    def counters(self) -> dict[str, float]:
        """How far it has come: samples read, bad ones among them, and two shares since the start.

        padding_share: of the tokens of all rows that are padding. unused_image_share: of the images
        of all rows that are empty, which the vision tower encodes all the same.
        """
        state = self.get_state()
        rows = max(state["rows"], 1)
        shape = self._packer.shape
        slots = rows * shape.images
        return {
            "samples": state["read"],
            "bad_samples": state["bad"],
            "padding_share": 1 - state["tokens"] / (rows * shape.tokens),
            "unused_image_share": 1 - state["images"] / slots if slots else 0.0,
        }

    def close(self) -> None:
        """Ends threads and worker processes."""
        self._batches.close()
        self._packer.close()


class _Reader:
    """Samples of a source as arrays; a bad one is its own error, so that it can be counted."""

    def __init__(self, source: Source, encoder: Encoder) -> None:
        self._source, self._encoder = source, encoder

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, np.ndarray] | BadSample:
        try:
            return self._encoder(self._source[index])
        except BadSample as error:
            return error


class _Packer:
    """Packs samples in the order of reading; its state is the numbers of those that wait.

    samples: this shard's; positions are numbers in `everyone`'s, of which it has every so manyth.
    """

    def __init__(
        self,
        samples: Any,
        everyone: Any,
        shape: Shape,
        config: LlavaConfig,
        *,
        enough: int,
        origin: dict[str, Any],
        shard: tuple[int, int],
        workers: int,
        by_modality: bool,
        max_bad_fraction: float,
    ) -> None:
        self.shape = shape
        self._samples, self._everyone, self._config = samples, everyone, config
        self._enough, self._origin, self._shard = enough, origin, list(shard)
        self._workers, self._by_modality = workers, by_modality
        self._max_bad_fraction = max_bad_fraction
        self._counts = {"read": 0, "bad": 0, "rows": 0, "tokens": 0, "images": 0}
        self._pool: list[Encoded] = []
        self._stream: Any = None

    def __next__(self) -> Batch:
        rows = [row for _ in range(self.shape.rows) if (row := self._row())]
        if not rows:
            raise StopIteration
        return packing.fill(rows, self.shape, self._config.pad_token_id)

    def get_state(self) -> dict[str, Any]:
        pool = [sample.position for sample in self._pool]
        return {"origin": self._origin, "shard": self._shard, **self._counts, "pool": pool}

    def set_state(self, state: dict[str, Any]) -> None:
        if state["origin"] != self._origin:
            raise ValueError(
                f"the saved position is one in {state['origin']}, this run reads {self._origin}: "
                "go on with the same data and seed"
            )
        if state["shard"] != self._shard:
            raise ValueError(
                f"the saved position is that of shard {state['shard']}, this is {self._shard}; "
                "reshard the positions of all shards"
            )
        self.close()
        self._counts = {name: state[name] for name in self._counts}
        # Shards that end differ by a sample in length, which resharding does not know of.
        self._counts["read"] = min(state["read"], len(self._samples))
        pool = [position for position in state["pool"] if position < len(self._everyone)]
        with ThreadPoolExecutor(_THREADS) as threads:
            samples = threads.map(self._everyone.__getitem__, pool)
            self._pool = []
            for position, sample in zip(pool, samples, strict=True):
                self._take(position, sample)  # may have become bad since it was read

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _row(self) -> list[Encoded]:
        """The samples of the next row, none at the end."""
        while len(self._pool) < _POOL and self._read():
            pass
        if not self._pool:
            return []
        chosen = packing.choose(self._pool, self.shape, by_modality=self._by_modality)
        row = [self._pool[index] for index in chosen]
        self._pool = [x for index, x in enumerate(self._pool) if index not in chosen]
        self._counts["rows"] += 1
        self._counts["tokens"] += sum(len(sample.tokens) for sample in row)
        self._counts["images"] += sum(len(sample.pixels) for sample in row)
        return row

    def _read(self) -> bool:
        """Reads one sample into the pool, or counts it as bad; False at the end."""
        number = self._counts["read"]
        if number == len(self._samples):
            return False
        if self._stream is None:
            self._stream = self._open(number)
        sample = next(self._stream)
        self._counts["read"] += 1
        shard, count = self._shard
        self._take(number * count + shard, sample)
        counts = self._counts
        check_bad(counts["bad"], counts["read"], self._enough, self._max_bad_fraction)
        return True

    def _take(self, position: int, sample: dict[str, np.ndarray] | BadSample) -> None:
        """Puts a sample into the pool, or counts it as bad."""
        if isinstance(sample, BadSample):
            self._counts["bad"] += 1
            _LOG.warning("left out: %s", sample)
        else:
            # Copies, as arrays from workers hold on to shared memory, of which there is little.
            arrays = {name: np.array(array) for name, array in sample.items()}
            self._pool.append(Encoded(position, **arrays))

    def _open(self, number: int) -> Any:
        grain = _grain()
        options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_READY)
        samples = self._samples[number:].to_iter_dataset(options)
        if self._workers:
            from absl import flags

            if not flags.FLAGS.is_parsed():  # not by a launcher, and grain's workers have flags
                flags.FLAGS.mark_as_parsed()
            # Of each worker grain holds twice as many as it is told, and two more.
            most = max(1, self.shape.images * 3 * self.shape.side**2)  # bytes of a sample
            ready = _SHARED // (self._workers * most) // 2 - 1
            samples = samples.mp_prefetch(
                grain.MultiprocessingOptions(self._workers, max(1, min(ready, _READY))),
                worker_init_fn=_end_with_parent,
            )
        return iter(samples)


def _end_with_parent(index: int, count: int) -> None:
    """Lets a worker end with its parent, however that ends, and not before.

    Signals often go to all processes of a job. The parent still needs samples then, to save behind
    a step, and closes its workers itself.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def end() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=end, daemon=True, name="parent").start()


def _check(
    config: LlavaConfig,
    batch_size: int,
    row_tokens: int,
    row_images: int,
    max_tokens: int,
    shard: tuple[int, int],
    max_bad_fraction: float,
) -> None:
    if batch_size < 1 or row_images < 0:
        raise ValueError(
            f"batch_size {batch_size} must be positive, row_images {row_images} not negative"
        )
    if not 1 < max_tokens <= row_tokens:
        raise ValueError(f"max_tokens {max_tokens} must be 2 to row_tokens {row_tokens}")
    if max_tokens > config.text.max_positions:
        raise ValueError(
            f"max_tokens {max_tokens} is more than the {config.text.max_positions} of the model"
        )
    if not 0 <= shard[0] < shard[1]:
        raise ValueError(f"shard {shard} is not (index, count) with 0 <= index < count")
    if not 0 <= max_bad_fraction < 1:
        raise ValueError(f"max_bad_fraction is {max_bad_fraction}, expected 0 to less than 1")


def _grain() -> Any:
    try:
        import grain
    except ImportError as error:
        raise ImportError(NEEDS) from error
    return grain
