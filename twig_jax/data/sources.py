"""Conversations about images, read one at a time from where they lie.

A source has a length and gives any item by its index. It can be pickled, so that worker processes
read for themselves, and holds no more than where each item begins.
"""

import functools
import json
import mmap
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from twig_jax.data import digits, questions
from twig_jax.data.conversation import IMAGE
from twig_jax.data.images import ImageSource

NEEDS = "reading real data needs more packages: pip install -e '.[data]'"

# The parts of JSON that tell where a row of a list begins and ends: whole texts, and brackets.
_JSON_PARTS = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[\]{}]', re.DOTALL)


@dataclass(frozen=True)
class Sample:
    """A conversation: turns of (question, answer), and an image for each marker in the questions.

    A question's only marker leads it, as LLaVA trains; several stay where they are.
    """

    id: str
    turns: tuple[tuple[str, str], ...]
    images: tuple[ImageSource, ...]


class BadSample(ValueError):
    """A conversation that cannot be trained on. id: the sample's. cause: what is wrong with it."""

    def __init__(self, id: str, cause: str) -> None:
        super().__init__(id, cause)
        self.id, self.cause = id, cause

    def __str__(self) -> str:
        return f"sample {self.id}: {self.cause}"


def check_bad(bad: int, read: int, enough: int, limit: float) -> None:
    """Raises ValueError where more than the share `limit` of the samples is bad.

    enough: how many are judged together, also where some of them are not read yet: bad ones may
    come first.
    """
    judged = -(-read // enough) * enough
    if bad > limit * judged:
        raise ValueError(
            f"{bad} of the first {read} samples are bad, more than max_bad_fraction {limit} "
            f"allows of {judged}; each is named above"
        )


class Source(Protocol):
    """Conversations by index. An item that is no good raises BadSample, when it is read."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


def open_source(path: str | Path, images: str | Path | None = None) -> Source:
    """The source that a path names.

    `digits` is the embedded pages; a file .json or .jsonl has LLaVA's instruction format, and its
    images lie in the folder `images` (None: the file's own); a folder is what
    `launch.build_dataset` writes, images included.
    Raises FileNotFoundError for a path or an image folder that is not there, ValueError for
    anything else, ImportError where a package to read it is missing.
    """
    if str(path) == "digits":
        return DigitsSource()
    path = Path(path)
    if path.suffix in (".json", ".jsonl") and path.is_file():
        return InstructionFile(path, images)
    if path.is_dir():
        return BuiltDataset(path)
    if not path.exists():
        raise FileNotFoundError(f"no data at {path}: expected digits, a .json or .jsonl, a folder")
    raise ValueError(f"cannot tell what {path} is: expected .json, .jsonl or a folder")


class InstructionFile:
    """A file of LLaVA's instruction data, read in place.

    path: .json with a list of rows, or .jsonl with a row per line. images: the folder that the
    rows' images are relative to (None: the file's own).
    A row is {"id", "image": path or list of paths or absent, "conversations": [{"from": "human" or
    "gpt", "value": text}]}.

    Raises FileNotFoundError for a missing file or folder, ValueError for a file that is no list of
    rows or is cut short.
    """

    def __init__(self, path: str | Path, images: str | Path | None = None) -> None:
        self._path = Path(path).absolute()
        self._images = self._path.parent if images is None else Path(images).absolute()
        if not self._images.is_dir():
            raise FileNotFoundError(f"no image folder {self._images}")
        find = _lines if self._path.suffix == ".jsonl" else _rows
        self._spans = np.array(find(self._path), np.int64).reshape(-1, 2)  # bytes, begin and end

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Sample:
        begin, end = self._spans[_checked(index, len(self))].tolist()
        with self._path.open("rb") as file:
            file.seek(begin)
            text = file.read(end - begin)
        name = f"in row {index}"
        try:
            row = json.loads(text)
        except (RecursionError, ValueError) as error:
            raise BadSample(name, f"is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise BadSample(name, "is no JSON object")
        if row.get("id") is not None:
            name = str(row["id"]).encode(errors="backslashreplace").decode()  # half a character
        paths = row.get("image") or []
        paths = paths if isinstance(paths, list) else [paths]
        if not all(isinstance(path, str) for path in paths):
            raise BadSample(name, f"image is {row['image']!r}, expected a path or a list of paths")
        images = tuple(self._images / path for path in paths)
        for image in images:
            if not os.path.isfile(image):  # Path.is_file raises where a name is too long
                raise BadSample(name, f"image {image} is missing")
        return _sample(name, row.get("conversations"), images)


class BuiltDataset:
    """A data set in TFDS's format with the features of `llava_instruct`, images included.

    folder: the data set's, or one that holds it alone. Needs TFDS, but not TensorFlow.
    Raises FileNotFoundError for a folder without a data set or split, ValueError for several data
    sets or one that is not whole, ImportError without TFDS.
    """

    def __init__(self, folder: str | Path, split: str = "train") -> None:
        found = sorted(Path(folder).absolute().rglob("dataset_info.json"))
        if not found:
            raise FileNotFoundError(f"{folder} holds no data set: build one with build_dataset")
        if len(found) > 1:
            parents = ", ".join(str(path.parent) for path in found)
            raise ValueError(f"{folder} holds {len(found)} data sets, name one: {parents}")
        self._folder, self._split = found[0].parent, split
        self._length = len(self._records)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        record = self._records[_checked(index, len(self))]
        said = record["conversations"]
        turns = [
            {"from": speaker.decode(), "value": text.decode()}
            for speaker, text in zip(said["from"], said["value"], strict=True)
        ]
        return _sample(record["id"].decode(), turns, tuple(record["images"]))

    def __getstate__(self) -> dict[str, Any]:
        # Files are opened anew in every process.
        return {name: value for name, value in vars(self).items() if name != "_records"}

    @functools.cached_property
    def _records(self) -> Any:
        try:
            import tensorflow_datasets as tfds
            from array_record.python.array_record_module import ArrayRecordReader
        except ImportError as error:
            raise ImportError(NEEDS) from error

        class Encoded(tfds.decode.SkipDecoding):
            """Leaves images as the bytes of their files, also in a sequence."""

            def decode_batch_example_np(self, serialized_example: Any) -> Any:
                return serialized_example

        builder = tfds.builder_from_directory(self._folder)
        if self._split not in builder.info.splits:
            splits = ", ".join(builder.info.splits)
            raise FileNotFoundError(f"{self._folder} has no split {self._split!r}, only {splits}")
        split = builder.info.splits[self._split]
        for path, length in zip(split.filepaths, split.shard_lengths, strict=True):
            # A file without its end has no records, which nothing else tells.
            if not path.is_file() or ArrayRecordReader(str(path)).num_records() != length:
                raise ValueError(f"{path} is missing or cut short: copy or build it again")
        return builder.as_data_source(self._split, decoders={"images": Encoded()})


class DigitsSource:
    """Conversations about the embedded pages, each a function of (split, seed, index).

    pages: how many there are. turns: questions about each.
    """

    def __init__(
        self, split: str = "train", seed: int = 0, *, pages: int = 10_000, turns: int = 4
    ) -> None:
        self._split, self._seed, self._pages, self._turns = split, seed, pages, turns

    def __len__(self) -> int:
        return self._pages

    def __getitem__(self, index: int) -> Sample:
        page = digits.page(self._split, self._seed, _checked(index, len(self)))
        rng = digits.generator(self._split, self._seed, index, 1)
        asked = questions.questions(page, rng, self._turns)
        turns = [(question.text, question.answer) for question in asked]
        turns[0] = (f"{IMAGE}\n{turns[0][0]}", turns[0][1])
        return Sample(f"{self._split}-{self._seed}-{index}", tuple(turns), (page.image,))


def _checked(index: int, length: int) -> int:
    if not 0 <= index < length:
        raise IndexError(f"no item {index} among {length}")
    return index


def _sample(name: str, conversation: Any, images: tuple[ImageSource, ...]) -> Sample:
    """A sample from a row's conversation. Raises BadSample, see `InstructionFile`."""
    turns = _turns(name, conversation)
    for number, (_, answer) in enumerate(turns, 1):
        if IMAGE in answer:
            raise BadSample(name, f"the answer of turn {number} has an image marker")
    markers = sum(question.count(IMAGE) for question, _ in turns)
    if markers != len(images):
        raise BadSample(name, f"has {markers} image markers for {len(images)} images")
    return Sample(name, tuple((_led(question), answer) for question, answer in turns), images)


def _turns(name: str, conversation: Any) -> list[tuple[str, str]]:
    if not isinstance(conversation, Sequence) or not conversation:
        raise BadSample(name, "has no turns")
    said = []
    for part in conversation:
        if not isinstance(part, Mapping) or not isinstance(part.get("value"), str):
            raise BadSample(name, f"has {part!r} where a speaker and a text are expected")
        said.append((part.get("from"), part["value"]))
    if said[0][0] == "gpt":
        # A conversation that was cut into pieces may begin with an answer; LLaVA leaves it out.
        said = said[1:]
    for index, (speaker, _) in enumerate(said):
        expected = ("human", "gpt")[index % 2]
        if speaker != expected:
            raise BadSample(name, f"part {index + 1} is by {speaker!r} instead of {expected!r}")
    texts = [text for _, text in said]
    for number, text in enumerate(texts, 1):
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can have half a character
            raise BadSample(name, f"the text of part {number} is not Unicode: {error}") from None
    turns = list(zip(texts[::2], texts[1::2], strict=False))
    if not turns or len(texts) % 2:
        raise BadSample(name, f"turn {len(turns) + 1} has no answer" if texts else "has no turns")
    for number, (_, answer) in enumerate(turns, 1):
        if not answer.strip():
            raise BadSample(name, f"the answer of turn {number} is empty")
    return turns


def _led(question: str) -> str:
    """A question with its only marker at its front, as LLaVA's preprocess_multimodal puts it."""
    if question.count(IMAGE) != 1:
        return question
    return f"{IMAGE}\n{question.replace(IMAGE, '').strip()}".strip()


def _lines(path: Path) -> list[tuple[int, int]]:
    """Where the lines lie that are not blank."""
    spans, begin = [], 0
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                spans.append((begin, begin + len(line)))
            begin += len(line)
    return spans


def _rows(path: Path) -> list[tuple[int, int]]:
    """Where the rows of a JSON list lie; their content is not looked at, nor kept in memory."""
    spans: list[tuple[int, int]] = []
    depth = begin = end = 0
    with path.open("rb") as file:
        if not path.stat().st_size:  # cannot be mapped
            raise ValueError(f"{path} is empty, expected a JSON list of rows")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            for part in _JSON_PARTS.finditer(text):
                mark = text[part.start()]
                opens, closes = mark in b"[{", mark in b"]}"
                if depth == 0 and (mark != ord("[") or text[end : part.start()].strip()):
                    raise ValueError(f"{path} is no JSON list of rows, at byte {end}")
                if depth == 1:
                    between = text[end : part.start()].strip()
                    if between != (b"," if spans and not closes else b"") or mark not in b"{]":
                        raise ValueError(f"{path} has something else than a row at byte {end}")
                    begin = part.start()
                depth += opens - closes
                if depth == 1:
                    end = part.end()
                    if closes:
                        spans.append((begin, end))
                elif depth == 0:
                    end = part.end()
            if depth or text[end:].strip() or not end:
                raise ValueError(f"{path} is no JSON list, or is cut short after {len(spans)} rows")
    return spans
