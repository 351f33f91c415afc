"""Benchmarks of multiple choice: MMBench, ScienceQA, MMMU."""

import ast
import base64
import csv
import re
import string
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twig_jax.evaluation.benchmarks.files import (
    Answers,
    Key,
    Question,
    Score,
    collect,
    look_up,
    mean,
    need,
    read_json,
    read_lines,
)

_BY_LETTER = "Answer with the option's letter from the given choices directly."
_BRIEF = "Answer the question using a single word or phrase."

# What a table's reader takes for an empty cell, as the official script's does (pandas' list).
_NOTHING = {
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN",
    "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
}  # fmt: skip
_TURN = 10**6
# Columns of MMBench's table that its upload does not have.
_NOT_UPLOADED = ("hint", "category", "source", "image", "comment", "l2-category")


@dataclass(frozen=True)
class MMBench:
    """mmbench_dev_20230712.tsv, or another table of the same columns: its images are in it.

    The table has every question several times, its options turned, with _TURN added to its index.
    """

    folder: Path
    split: str = "dev_20230712"
    max_new_tokens: int = 128

    def questions(self) -> list[Question]:
        """See `Benchmark`."""
        questions = []
        for row in self._rows():
            options: list[str] = []
            for letter in "ABCD":
                if _says_nothing(row.get(letter, "")):
                    break
                options.append(row[letter])
            hint = row.get("hint", "")
            asked = row["question"] if _says_nothing(hint) else f"{hint}\n{row['question']}"
            lines = [f"{x}. {o}" for x, o in zip("ABCD", options, strict=False)]
            stated = "\n".join([asked, *lines])
            letters = list("ABCD"[: len(options)])
            also = {"round_id": 0, "options": options, "option_char": letters}
            image = base64.b64decode(row["image"])
            prompt = f"{stated}\n{_BY_LETTER}"
            questions.append(Question(int(row["index"]), prompt, (image,), stated, also))
        return questions

    def score(self, answers: Answers) -> Score | None:
        """Share of questions that have the right letter however turned; None without answers.

        Answers are read by the rules with which the official judge (VLMEvalKit) begins; where they
        find no option it asks a language model, and here the answer is wrong.
        """
        right = {int(row["index"]): row.get("answer", "") for row in self._rows()}
        if not any(right.values()):
            return None
        points: dict[Key, float | None] = {}
        whole: dict[int, bool] = defaultdict(lambda: True)
        asked = self.questions()
        for q in asked:
            points[q.key] = None
            if q.key in answers:
                at = _chosen(answers[q.key], q.also["options"])
                points[q.key] = float(at is not None and "ABCD"[at] == right[q.id])
            whole[q.id % _TURN] &= bool(points[q.key])
        score = collect(asked, points)
        return Score({"accuracy": mean(whole.values())}, score.points, score.unanswered)

    def upload(self, answers: Answers) -> tuple[str, Any]:
        """The table without hints and images but with a column `prediction`, for a spreadsheet.

        As pandas writes it, which the official judge reads: numbers, and nothing in empty cells.
        """
        said = {key.id: text for key, text in answers.items()}
        rows = self._rows()
        names = [name for name in rows[0] if name not in (*_NOT_UPLOADED, "index")]
        names.insert(5, "prediction")
        content: list[list[Any]] = [["index", *names]]
        for row in rows:
            index = int(row["index"])
            cells = {**row, "prediction": said.get(str(index), "")}
            content.append([index, *(None if cells[n] in _NOTHING else cells[n] for n in names)])
        return f"mmbench_{self.split}.xlsx", content

    def _rows(self) -> list[dict[str, str]]:
        path = need(self.folder / f"mmbench_{self.split}.tsv", "MMBench's table")
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # images are long fields
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        if not rows:
            raise ValueError(f"{path} has no rows; it should be MMBench's table")
        for number, row in enumerate(rows, 2):
            # What is cut short lacks the last ones.
            missing = [n for n in ("index", "question", "A", "image", *row) if row.get(n) is None]
            if missing:
                raise ValueError(f"{path}: row {number} has no {', '.join(dict.fromkeys(missing))}")
        return rows


def _says_nothing(cell: str) -> bool:
    """Whether a cell is empty to LLaVA's script, which prints no such option or hint."""
    return cell in _NOTHING or cell.lower() in ("nan", "none")


def _chosen(text: str, options: Sequence[str]) -> int | None:
    """Which option an answer names: by the only letter among its last four words, or in words."""
    letters = "ABCD"[: len(options)]
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    named = [letter for letter in letters if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return letters.index(named[0])
    if len(text) > 2 * sum(map(len, options)):
        return None
    there = [i for i, option in enumerate(options) if option.lower() in text.lower()]
    return there[0] if len(there) == 1 else None


@dataclass(frozen=True)
class ScienceQA:
    """llava_test_CQM-A.json, images/test, problems.json, pid_splits.json."""

    folder: Path
    max_new_tokens: int = 128

    def questions(self) -> list[Question]:
        """See `Benchmark`."""
        found = read_json(self.folder / "llava_test_CQM-A.json", "LLaVA's ScienceQA questions")
        questions = []
        for line in found:
            text = line["conversations"][0]["value"].replace("<image>", "").strip()
            text = f"{text}\n{_BY_LETTER}"
            image = line.get("image")
            stated = f"<image>\n{text}" if image else text
            images = (self.folder / "images" / "test" / image,) if image else ()
            questions.append(Question(line["id"], text, images, stated))
        return questions

    def score(self, answers: Answers) -> Score:
        """Accuracy over the questions with an image, which RelAcc compares, and over all."""
        problems = read_json(self.folder / "problems.json", "ScienceQA's problems")
        path = self.folder / "pid_splits.json"
        split = set(read_json(path, "ScienceQA's splits")["test"])
        asked = [q for q in self.questions() if q.key.id in split]
        points: dict[Key, float | None] = {}
        for q in asked:
            if q.key in answers:
                problem = look_up(problems, q.key.id, self.folder / "problems.json")
                letter = _science(answers[q.key])
                right = "ABCDE"[problem["answer"]]
                points[q.key] = float(letter == right)
        score = collect(asked, points)
        seen = {q.key: score.points[q.key] for q in asked if q.images}
        if not seen:
            return score
        figures = {"IMG-accuracy": mean(seen.values()), **score.figures}
        return Score(figures, seen, score.unanswered)

    def upload(self, answers: Answers) -> None:
        """Scored here."""


def _science(text: str) -> str | None:
    """The letter alone, before a period, or in "The answer is X."."""
    if text in tuple("ABCDE"):
        return text
    if len(text) >= 3 and text[0] in "ABCDE" and text[1:3] == ". ":
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else None


@dataclass(frozen=True)
class MMMU:
    """mmmu_SPLIT.jsonl: MMMU's rows, a line each, with image_1 .. image_7 as files beside it.

    Prompts are those of MMMU's own configuration for LLaVA-1.5, but for the images: it puts the
    first alone before the text, here all stand where the text names them. (The data set is
    published as Parquet: a row's images are saved, and their names written in their place.)
    """

    folder: Path
    split: str = "val"
    max_new_tokens: int = 128

    def questions(self) -> list[Question]:
        """See `Benchmark`; a question may have several images, or one several times."""
        questions = []
        for row in self._rows():
            options = _options(row)
            text = row["question"]
            if row["question_type"] == "multiple-choice":
                lines = "".join(f"({x}) {o}\n" for x, o in options.items())
                text = f"{text}\n{lines}\n{_BY_LETTER}"
            else:
                text = f"{text}\n{_BRIEF}"
            names = re.findall(r"<image ([1-7])>", text)
            images = []
            for n in names:
                if not row.get(f"image_{n}"):
                    raise ValueError(f"{self._file}: question {row['id']} has no image_{n}")
                images.append(self.folder / row[f"image_{n}"])
            prompt = re.sub(r"<image [1-7]>", "<image>", text)
            questions.append(Question(row["id"], prompt, tuple(images), text))
        return questions

    def score(self, answers: Answers) -> Score:
        """MMMU's own rules, but a choice that cannot be read is wrong, not drawn at random."""
        asked = self.questions()
        points: dict[Key, float | None] = {}
        for q, row in zip(asked, self._rows(), strict=True):
            if q.key not in answers:
                continue
            if row["question_type"] == "multiple-choice":
                right = parse_choice(answers[q.key], _options(row)) == row["answer"]
            else:
                right = open_right(answers[q.key], _known(row["answer"]))
            points[q.key] = float(right)
        return collect(asked, points)

    def upload(self, answers: Answers) -> tuple[str, Any]:
        """What MMMU's main_eval_only.py reads: letters, and open answers as they are."""
        content = {}
        for q, row in zip(self.questions(), self._rows(), strict=True):
            text = answers.get(q.key, "")
            choice = row["question_type"] == "multiple-choice"
            content[q.key.id] = parse_choice(text, _options(row)) or "" if choice else text
        return f"mmmu_{self.split}.json", content

    @property
    def _file(self) -> Path:
        return self.folder / f"mmmu_{self.split}.jsonl"

    def _rows(self) -> list[dict[str, Any]]:
        fields = ("id", "question", "question_type", "answer")
        return list(read_lines(self._file, "MMMU's rows", fields))


def _options(row: dict[str, Any]) -> dict[str, str]:
    """Letter -> option."""
    return dict(zip(string.ascii_uppercase, _known(row.get("options", [])), strict=False))


def _known(found: Any) -> list[str]:
    """One or several texts; the data set writes a list as Python does."""
    if isinstance(found, str):
        several = found.startswith(("['", '["', "[]"))
        found = ast.literal_eval(found) if several else [found]
    return [str(one) for one in found]


def parse_choice(text: str, options: dict[str, str]) -> str | None:
    """The last letter in brackets, or else between spaces, or else the last option's words.

    The rules of MMMU's parse_multi_choice_response; None where it would draw a letter at random.
    """
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    ways = [(text, {x: f"({x})" for x in options}), (text, {x: f" {x} " for x in options})]
    if len(text.split()) > 5:
        ways.append((text.lower(), {x: o.lower() for x, o in options.items()}))
    for where, marks in ways:
        at = {x: where.rfind(mark) for x, mark in marks.items() if mark in where}
        if at:
            return max(at, key=lambda x: at[x])  # the first of equals, as options come
    return None


_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBER = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # with commas
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # with an exponent
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def open_right(text: str, known: Sequence[str]) -> bool:
    """Whether an open answer has a known one among what it may mean, by MMMU's rules.

    What an answer may mean: what follows its last "is", "so", ... and every number in that.
    """
    text = text.strip().strip(".").lower()
    # The official pattern looks for capitals in small letters: only line breaks part sentences.
    sentences = text.split("\n")
    found = []
    for i, sentence in enumerate(sentences):
        keys = (*_KEYS, "=") if i == len(sentences) - 1 else _KEYS
        tails = [sentence.split(key)[-1].strip() for key in keys if key in sentence]
        shortest = ""
        for tail in tails:
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in tuple(":,.!?;'"):
            found.append(shortest)
    found = found or [text]
    numbers = [n for part in found for pattern in _NUMBER for n in re.findall(pattern, part)]
    meant = [x for part in (*found, *numbers) for x in _normal(part)]
    answers = [x for one in known for x in _normal(one)]
    return any(
        any(isinstance(a, str) and a in m for a in answers) if isinstance(m, str) else m in answers
        for m in meant
    )


def _normal(text: str) -> list[str | float]:
    """A number to two digits, or small letters; a single letter only beside a space."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
