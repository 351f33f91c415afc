"""Builds the data set from any source whose images are files."""

import contextlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twig_jax.data import images
from twig_jax.data.sources import NEEDS, BadSample, Source, check_bad

# What is decoded at a time, to see that it can be, and how many samples wait to be written.
_THREADS, _READY = 8, 32


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
    lies beside it, twice for a while.
    Raises ValueError where more than max_bad_fraction of the samples are bad or all are,
    FileExistsError where the data set is there already, ImportError without TFDS.
    """
    try:
        import grain
        import tensorflow_datasets as tfds

        from twig_jax.data.llava_instruct.llava_instruct_dataset_builder import Builder
    except ImportError as error:
        raise ImportError(NEEDS) from error
    target = Path(out).absolute() / Builder.name
    if target.exists():
        raise FileExistsError(f"{target} is there already: remove it or name another folder")
    report = Report()

    def good() -> Iterator[tuple[int, dict[str, Any]]]:
        options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_READY)
        examples = grain.MapDataset.source(_Examples(source)).to_iter_dataset(options)
        for index, example in enumerate(examples):
            if isinstance(example, BadSample):
                report.bad.append(example)
                seen(example)
            else:
                report.written += 1
                yield index, example
                seen(None)
            check_bad(len(report.bad), index + 1, len(source), max_bad_fraction)
        if not report.written:
            raise ValueError("there is no good sample to write")

    tfds.disable_progress_bar()
    parent = Path(out).absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{Path(out).name}.") as folder:
        # It tells of downloads, of which there are none.
        with contextlib.redirect_stdout(io.StringIO()):
            Builder(examples=good(), data_dir=folder).download_and_prepare()
        target.parent.mkdir(exist_ok=True)
        os.replace(Path(folder) / Builder.name, target)
    return report


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
