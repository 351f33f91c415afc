"""The batches of a run, on this host."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from twig_jax.config import LlavaConfig
from twig_jax.data.instruct import InstructBatches
from twig_jax.data.packing import Batch
from twig_jax.data.pipeline import DigitsBatches
from twig_jax.data.sources import open_source
from twig_jax.data.tokens import conventions, load_tokenizer
from twig_jax.training.config import TrainConfig
from twig_jax.training.step import batch_sharding

State = dict[str, Any]


class Batches(Protocol):
    """An iterator of batches whose position is JSON; `reshard` makes positions for more hosts."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def get_state(self) -> State: ...

    def set_state(self, state: State) -> None: ...

    @staticmethod
    def reshard(states: Sequence[State], count: int) -> list[State]: ...

    @property
    def counters(self) -> dict[str, float]: ...

    def close(self) -> None: ...


def open_batches(
    config: TrainConfig,
    base: LlavaConfig,
    shard: tuple[int, int] = (0, 1),
    *,
    validation: bool = False,
) -> Batches:
    """The training batches of a shard, or those held out for validation.

    They are read by the tokenizer of the base's folder, or digits', and by its conventions unless
    data.conventions says otherwise.
    Raises what the sources and the tokenizers raise for what is not there or does not fit.
    """
    data, folder = config.data, config.reads_as()
    rows = data.batch_size // shard[1]
    tokenizer = load_tokenizer(folder)
    if data.source is None:
        return DigitsBatches(
            tokenizer,
            split="validation" if validation else "train",
            seed=config.seed,
            batch_size=rows,
            row_tokens=data.row_tokens,
            image_token_id=base.image_token_id,
            mix=None if data.mix is None else dict(data.mix),
            shard=shard,
        )
    if config.stage != "twig":
        raise ValueError(f"conversations train a twig; the {config.stage} stage trains on digits")
    path = data.validation if validation else data.source
    if path is None:
        raise ValueError("nothing is held out: set data.validation")
    return InstructBatches(
        open_source(path, data.images),
        tokenizer,
        base,
        conventions(folder, data.conventions),
        batch_size=rows,
        row_tokens=data.row_tokens,
        row_images=data.row_images,
        max_tokens=data.max_tokens,
        seed=config.seed,
        shard=shard,
        workers=data.workers,
        by_modality=data.by_modality,
        max_bad_fraction=data.max_bad_fraction,
    )


def row_shard(mesh: Mesh, rows: int) -> tuple[int, int]:
    """(index, count): which part of a batch of so many rows this host's devices hold.

    Hosts whose devices hold the same rows get the same part. Raises ValueError where only some of
    them are the same.
    """
    held = defaultdict(set)
    sharding = batch_sharding(mesh)
    for device, (index,) in sharding.devices_indices_map((rows,)).items():
        held[device.process_index].add(index.indices(rows)[0])  # type: ignore[attr-defined]
    parts = sorted({tuple(sorted(starts)) for starts in held.values()})
    if sum(map(len, parts)) != len(set().union(*held.values())):
        raise ValueError("hosts hold overlapping rows: let the tensor axis divide a host's devices")
    return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


def on_mesh(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
    """The global batch that hosts' parts of it make, its rows over the mesh."""
    rows = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(rows, x) for name, x in batch.items()}
