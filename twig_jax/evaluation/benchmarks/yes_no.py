"""Benchmarks answered by yes or no: POPE and MME."""

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
    mean,
    need,
    read_lines,
)
from twig_jax.evaluation.benchmarks.short import asked_in


@dataclass(frozen=True)
class Pope:
    """llava_pope_test.jsonl, val2014/ and coco/coco_pope_{random,popular,adversarial}.json.

    The labels of a category stand in the order of its questions.
    """

    folder: Path
    max_new_tokens: int = 128

    @property
    def _file(self) -> Path:
        return self.folder / "llava_pope_test.jsonl"

    def questions(self) -> list[Question]:
        """See `Benchmark`."""
        return asked_in(self._file, self.folder / "val2014")

    def score(self, answers: Answers) -> Score:
        """F1, accuracy, precision, recall and share of yes: means over categories, and of each.

        What is unanswered counts as the wrong one of yes and no.
        """
        of_category: dict[str, dict[str, float]] = {}
        points: dict[Key, float] = {}
        for category, labels in self._labels().items():
            said = [
                _says_yes(answers[key]) if key in answers else not label
                for key, label in labels.items()
            ]
            of_category[category] = _figures(said, list(labels.values()))
            points |= {key: float(s == labels[key]) for key, s in zip(labels, said, strict=True)}
        names = next(iter(of_category.values()))
        figures = {
            name: sum(found[name] for found in of_category.values()) / len(of_category)
            for name in names
        }
        for category, found in of_category.items():
            figures |= {f"{category} {name}": value for name, value in found.items()}
        return Score(figures, points, [key for key in points if key not in answers])

    def upload(self, answers: Answers) -> None:
        """Scored here."""

    def _labels(self) -> dict[str, dict[Key, bool]]:
        """Whether yes is right, by category and question."""
        asked: dict[str, list[Key]] = defaultdict(list)
        lines = read_lines(self._file, "LLaVA's question file", ("category",))
        for question, line in zip(self.questions(), lines, strict=True):
            asked[line["category"]].append(question.key)
        labels = {}
        for category, keys in asked.items():
            path = self.folder / "coco" / f"coco_pope_{category}.json"
            found = [x["label"] for x in read_lines(path, "POPE's labels", ("label",))]
            if len(found) != len(keys):
                raise ValueError(
                    f"{path} has {len(found)} labels for {len(keys)} questions of {self._file}"
                )
            labels[category] = {k: label != "no" for k, label in zip(keys, found, strict=True)}
        return labels


def _says_yes(text: str) -> bool:
    """Whatever does not deny in its first sentence."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def _figures(said: Sequence[bool], right: Sequence[bool]) -> dict[str, float]:
    """Percentages; yes is the positive."""
    found = sum(s and r for s, r in zip(said, right, strict=True))
    precision, recall = found / max(sum(said), 1), found / max(sum(right), 1)
    return {
        "F1": 100 * 2 * precision * recall / max(precision + recall, 1e-12),
        "accuracy": mean(s == r for s, r in zip(said, right, strict=True)),
        "precision": 100 * precision,
        "recall": 100 * recall,
        "yes": mean(said),
    }


_PERCEPTION = (
    "existence", "count", "position", "color", "posters",
    "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
_COGNITION = (
    "commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning",
)  # fmt: skip
_MME_BRIEF = "Answer the question using a single word or phrase."
_MME_YES_NO = "Please answer yes or no."


@dataclass(frozen=True)
class MME:
    """llava_mme.jsonl and MME_Benchmark_release_version/CATEGORY with images and their texts.

    An image has two questions; a text file beside it (or in questions_answers_YN/) has a line
    "question<tab>Yes" or No of each.
    """

    folder: Path
    max_new_tokens: int = 128

    @property
    def _images(self) -> Path:
        return self.folder / "MME_Benchmark_release_version"

    def questions(self) -> list[Question]:
        """See `Benchmark`."""
        return asked_in(self.folder / "llava_mme.jsonl", self._images)

    def score(self, answers: Answers) -> Score:
        """The sums of perception and cognition, their total first, and each category's score.

        A category has 100 points for its questions and 100 for images with both of them right.
        """
        known: dict[tuple[str, str], dict[str, str]] = {}
        points: dict[Key, float] = {}
        images: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for question in self.questions():
            category, _, name = str(question.id).partition("/")
            if (category, name) not in known:
                known[category, name] = self._known(category, Path(name).stem)
            label = self._label(question, known[category, name])
            says = _mme_says(answers[question.key]) if question.key in answers else None
            points[question.key] = float(says == label.lower())
            images[category][name].append(points[question.key])
        of_category = {
            category: mean(p for found in by_image.values() for p in found)
            + mean(all(found) for found in by_image.values())
            for category, by_image in images.items()
        }
        perception = sum(of_category.get(c, 0.0) for c in _PERCEPTION)
        cognition = sum(of_category.get(c, 0.0) for c in _COGNITION)
        figures = {
            "total": perception + cognition,
            "perception": perception,
            "cognition": cognition,
            **of_category,
        }
        return Score(figures, points, [key for key in points if key not in answers])

    def upload(self, answers: Answers) -> tuple[str, Any]:
        """Rows of image, question, known answer and answer: a text file a category."""
        rows: dict[str, str] = defaultdict(str)
        for question in self.questions():
            category, _, name = str(question.id).partition("/")
            known = self._known(category, Path(name).stem)
            file, asked = Path(name).with_suffix(".txt").name, self._asked(question, known)
            # An answer is a cell: no break or tab is left in it.
            text = " ".join(answers.get(question.key, "").split())
            row = (file, asked, self._label(question, known), text)
            rows[f"{category}.txt"] += "\t".join(row) + "\n"
        return "mme", dict(rows)

    def _known(self, category: str, stem: str) -> dict[str, str]:
        """Question -> Yes or No, of an image."""
        folder = self._images / category
        inner = folder / "questions_answers_YN"
        path = (inner if inner.is_dir() else folder) / f"{stem}.txt"
        lines = need(path, "MME's questions about an image").read_text().splitlines()
        return dict(line.strip().split("\t") for line in lines if line.strip())

    def _asked(self, question: Question, known: dict[str, str]) -> str:
        """MME's wording of a question in LLaVA's."""
        asked = question.stated.replace(_MME_BRIEF, "").strip()
        if _MME_YES_NO not in asked:
            asked = f"{asked} {_MME_YES_NO}"
        if asked not in known:
            asked = asked.replace(f" {_MME_YES_NO}", f"  {_MME_YES_NO}")
        return asked

    def _label(self, question: Question, known: dict[str, str]) -> str:
        asked = self._asked(question, known)
        if asked not in known:
            raise ValueError(f"{self._images} has no question {asked!r} about {question.id}")
        return known[asked]


def _mme_says(text: str) -> str:
    """yes, no, or other, of the whole answer or its first four letters."""
    start = text.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"
