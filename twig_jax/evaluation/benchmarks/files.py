"""Questions, answers and scores, and the files they lie in.

An answers file has a JSON object a line, with the fields that LLaVA's evaluation scripts write:
question_id, prompt, text, answer_id, model_id, metadata, and for some benchmarks more.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol


class Key(NamedTuple):
    """What tells questions apart: an id may have several prompts (MME)."""

    id: str
    prompt: str


@dataclass(frozen=True)
class Question:
    """One question.

    prompt: the user's turn, `<image>` at the images' places where they do not lead. images: paths,
    encoded bytes or uint8 arrays [H, W, 3]. stated: what the answers file gives as prompt. also:
    more fields of its line.
    """

    id: Any
    prompt: str
    images: tuple[Any, ...] = ()
    stated: str = ""
    also: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """Its key in the answers."""
        return Key(str(self.id), self.stated)

    @property
    def group(self) -> str:
        """The same for all questions about its images, by path or content; its own without any."""
        known = hashlib.sha256()
        for part in self.images or self.key:
            name = isinstance(part, str | Path)
            known.update(hashlib.sha256(str(part).encode() if name else bytes(part)).digest())
        return known.hexdigest()[:16]


@dataclass(frozen=True)
class Score:
    """Figures in the benchmark's own unit, the one that RelAcc compares first.

    points: what each question that counts adds, from 0 to 1. unanswered: counted as wrong.
    """

    figures: dict[str, float]
    points: dict[Key, float]
    unanswered: list[Key]

    @property
    def is_mean(self) -> bool:
        """Whether the first figure is the mean of the points, unlike MME's sum or POPE's F1."""
        return math.isclose(next(iter(self.figures.values())), mean(self.points.values()))


Answers = Mapping[Key, str]


class Benchmark(Protocol):
    """One benchmark in its folder."""

    @property
    def max_new_tokens(self) -> int:
        """The most tokens of an answer."""

    def questions(self) -> list[Question]:
        """All questions, in their file's order."""

    def score(self, answers: Answers) -> Score | None:
        """What the official script gives on these answers; None where only a judge can tell."""

    def upload(self, answers: Answers) -> tuple[str, Any] | None:
        """Name and content of the file for the official judge; None where there is none.

        It has every question, an empty answer where there is none: judges stop at missing ones, or
        leave them out of the score.
        """


def mean(points: Iterable[float]) -> float:
    """The mean in percent."""
    found = list(points)
    return 100 * sum(found) / len(found)


def collect(asked: Sequence[Question], points: Mapping[Key, float | None]) -> Score:
    """A score whose one figure is the accuracy; a question without points was not answered."""
    known = {q.key: points.get(q.key) for q in asked}
    filled = {key: value or 0.0 for key, value in known.items()}
    unanswered = [key for key, value in known.items() if value is None]
    return Score({"accuracy": mean(filled.values())}, filled, unanswered)


def need(path: Path, what: str) -> Path:
    """The path; FileNotFoundError that says what belongs there."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; it should be {what}")
    return path


def read_json(path: Path, what: str) -> Any:
    """A JSON file; ValueError where it is none."""
    try:
        return json.loads(need(path, what).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def look_up(known: Mapping[Any, Any], key: Any, path: Path) -> Any:
    """What is known of a question; ValueError where it is not in the file."""
    if key not in known:
        raise ValueError(f"{path} has no question {key!r}, which was asked")
    return known[key]


def read_lines(path: Path, what: str, fields: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file.

    ValueError names the line that is none or lacks a field, and an empty file.
    """
    empty = True
    with open(need(path, what)) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                empty = False
                yield _parsed(line, f"{path}:{number}", fields)
    if empty:
        raise ValueError(f"{path} is empty; it should be {what}")


def _parsed(line: str, where: str, fields: Sequence[str]) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: no JSON: {error}") from error
    missing = [f for f in fields if not isinstance(found, dict) or f not in found]
    if missing:
        raise ValueError(f"{where}: no {', '.join(missing)}")
    return found


def answer_line(question: Question, text: str, model_id: str, metadata: Mapping[str, Any]) -> str:
    """A line of the answers file. Its answer_id follows from the model and the question."""
    key = json.dumps([model_id, *question.key])
    return json.dumps(
        {
            "question_id": question.id,
            "prompt": question.stated,
            "text": text,
            "answer_id": hashlib.sha256(key.encode()).hexdigest()[:22],
            "model_id": model_id,
            "metadata": dict(metadata),
            **question.also,
        }
    )


def read_answers(path: Path, asked: Sequence[Question]) -> dict[Key, str]:
    """The lines of an answers file by question.

    The last line may be cut off, as after a kill, and is then left out. Raises ValueError, naming
    the line, for other lines that are no answers, and for answers to no question or a second time.
    """
    keys = {q.key for q in asked}
    found: dict[Key, str] = {}
    lines = path.read_text().split("\n")
    for number, line in enumerate(lines[:-1], 1):  # behind the last newline: nothing, or a part
        where = f"{path}:{number}"
        answer = _parsed(line, where, ("question_id", "prompt", "text"))
        key = Key(str(answer["question_id"]), answer["prompt"])
        if key not in keys:
            raise ValueError(
                f"{where}: no question has id {key.id!r} and this prompt; the answers here are to "
                "other questions or to more of them: choose another folder or a larger limit"
            )
        if key in found:
            raise ValueError(f"{where}: a second answer to question {key.id!r}")
        found[key] = line
    return found


def texts(lines: Mapping[Key, str]) -> dict[Key, str]:
    """The answers' texts."""
    return {key: json.loads(line)["text"] for key, line in lines.items()}


def write_answers(path: Path, asked: Sequence[Question], lines: Mapping[Key, str]) -> None:
    """All lines in the questions' order, in one step: the old file is there until then."""
    part = path.with_name(f"{path.name}.{os.getpid()}")  # another process may write it too
    part.write_text("".join(f"{lines[q.key]}\n" for q in asked if q.key in lines))
    os.replace(part, path)


def write_upload(folder: Path, name: str, content: Any) -> Path:
    """A file for an official judge: a spreadsheet of rows, a folder of texts by name, or JSON."""
    path = folder / name
    if path.suffix == ".xlsx":
        from openpyxl import Workbook
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

        book = Workbook()
        for row in content:
            book.active.append(
                [ILLEGAL_CHARACTERS_RE.sub("", x) if isinstance(x, str) else x for x in row]
            )
        book.save(path)
    elif path.suffix:
        path.write_text(json.dumps(content))
    else:
        path.mkdir(exist_ok=True)
        for file, text in content.items():
            (path / file).write_text(text)
    return path
