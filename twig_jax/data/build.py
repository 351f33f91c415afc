"""A data set of TFDS from any source whose images are files, images included."""

import io
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twig_jax.data import images
from twig_jax.data.sources import NEEDS, BadSample, Source, check_bad

NAME, VERSION = "llava_instruct", "1.0.0"

# What is decoded at a time, to see that it can be, and how many samples wait to be written.
_THREADS, _READY = 8, 32
# Samples of a file. With the photographs of LLaVA-665K it has about 600 MB.
_FILE = 4096


@dataclass
class Report:
    """written: samples in the data set. bad: those that were left out."""

    written: int = 0
    bad: list[BadSample] = field(default_factory=list)


def build(
    source: Source,
    out: str | Path,
    *,
    max_bad_fraction: float = 0.01,
    seen: Callable[[BadSample | None], None] = lambda bad: None,
) -> Report:
    """Writes the good samples of a source to out/llava_instruct/<version>, images included.

    Every image is decoded to see that it can be, and copied as it is. seen: called after each
    sample, with the error of a bad one. The folder appears when it is whole; until then the data
    lies beside it.
    Raises ValueError for a bucket, or where more than max_bad_fraction of the samples are bad or
    all are, FileExistsError where the data set is there already, whole or not, ImportError without
    TFDS.
    """
    try:
        import grain
        import tensorflow_datasets  # noqa: F401
    except ImportError as error:
        raise ImportError(NEEDS) from error
    if "://" in str(out):
        raise ValueError(f"{out} is no folder of this machine: build in one, then copy it")
    target = Path(out).absolute() / NAME
    if target.exists():
        raise FileExistsError(f"{target} is there already: remove it or name another folder")
    report = Report()

    def good() -> Iterator[dict[str, Any]]:
        options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_READY)
        examples = grain.MapDataset.source(_Examples(source)).to_iter_dataset(options)
        for index, example in enumerate(examples):
            if isinstance(example, BadSample):
                report.bad.append(example)
                seen(example)
            else:
                report.written += 1
                yield example
                seen(None)
            check_bad(len(report.bad), index + 1, len(source), max_bad_fraction)
        if not report.written:
            raise ValueError("there is no good sample to write")

    part = target.parent.with_name(f".{target.parent.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        part.mkdir()
    except FileExistsError:
        raise FileExistsError(
            f"{part} is there: another call is writing this data set, or was killed; where none "
            "is, remove it"
        ) from None
    try:
        _write(good(), part / NAME / VERSION)
        target.parent.mkdir(exist_ok=True)
        os.replace(part / NAME, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return report


def _write(examples: Iterator[dict[str, Any]], folder: Path) -> None:
    """Writes a data set in the order given, as it comes.

    TFDS's builders would sort it first, by keys and in memory, which is as much as the data.
    """
    import tensorflow_datasets as tfds

    features = tfds.features
    said = {"from": features.Text(), "value": features.Text()}
    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(NAME, tfds.core.Version(VERSION), str(folder), __name__),
        description="Conversations about images, in the format of LLaVA's instruction data.",
        features=features.FeaturesDict(
            {
                "id": features.Text(),
                "images": features.Sequence(features.Image(shape=(None, None, None))),
                "conversations": features.Sequence(said),
            }
        ),
        disable_shuffling=True,  # training shuffles, and samples are found by their number
    )
    folder.mkdir(parents=True)
    writer = tfds.core.SequentialWriter(info, _FILE, file_format="array_record")
    writer.initialize_splits(["train"])
    try:
        writer.add_examples({"train": examples})
    finally:
        writer.close_all()


class _Examples:
    """A source's samples as the data set has them; a bad one is its own error."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any] | BadSample:
        try:
            sample = self._source[index]
        except BadSample as error:
            return error
        files = []
        try:
            for image in sample.images:
                images.load_image(image)
                files.append(image if isinstance(image, bytes) else Path(str(image)).read_bytes())
        except (OSError, ValueError) as error:
            return BadSample(sample.id, str(error))
        said = []
        for question, answer in sample.turns:
            said.append({"from": "human", "value": question})
            said.append({"from": "gpt", "value": answer})
        return {"id": sample.id, "images": list(map(io.BytesIO, files)), "conversations": said}
