"""Benchmarks whose answers are a word or a phrase: GQA, VQAv2, TextVQA.

Questions lie in files that LLaVA's evaluation guide hands out (haotian-liu/LLaVA,
docs/Evaluation.md), with the prompt's suffix, and for TextVQA its OCR line, in their text.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twig_jax.evaluation.benchmarks import normalise
from twig_jax.evaluation.benchmarks.files import (
    Answers,
    Key,
    Question,
    Score,
    collect,
    look_up,
    read_json,
    read_lines,
)

_BRIEF = "\nAnswer the question using a single word or phrase."


def asked_in(path: Path, images: Path) -> list[Question]:
    """The questions of one of LLaVA's question files; `image` names lie in a folder."""
    return [
        Question(
            line["question_id"],
            line["text"],
            (images / line["image"],) if line.get("image") else (),
            line["text"],
        )
        for line in read_lines(path, "LLaVA's question file", ("question_id", "text"))
    ]


@dataclass(frozen=True)
class GQA:
    """llava_gqa_testdev_balanced.jsonl, data/images, data/testdev_balanced_questions.json."""

    folder: Path
    max_new_tokens: int = 128

    def questions(self) -> list[Question]:
        """See `Benchmark`."""
        images = self.folder / "data" / "images"
        return asked_in(self.folder / "llava_gqa_testdev_balanced.jsonl", images)

    def score(self, answers: Answers) -> Score:
        """Equal to the known answer, letter for letter."""
        path = self.folder / "data" / "testdev_balanced_questions.json"
        known = read_json(path, "GQA's questions with their answers")
        points: dict[Key, float | None] = {
            key: float(_gqa(text) == look_up(known, key.id, path)["answer"])
            for key, text in answers.items()
        }
        return collect(self.questions(), points)

    def upload(self, answers: Answers) -> tuple[str, Any]:
        """What GQA's own eval.py reads."""
        said = [(q.key.id, _gqa(answers.get(q.key, ""))) for q in self.questions()]
        content = [{"questionId": i, "prediction": text} for i, text in said]
        return "testdev_balanced_predictions.json", content


def _gqa(text: str) -> str:
    return text.rstrip(".").lower()


@dataclass(frozen=True)
class VQAv2:
    """The test-dev questions, whose answers are uploaded.

    llava_vqav2_mscoco_test-dev2015.jsonl, llava_vqav2_mscoco_test2015.jsonl and test2015/.
    """

    folder: Path
    max_new_tokens: int = 128

    def questions(self) -> list[Question]:
        """See `Benchmark`."""
        path = self.folder / "llava_vqav2_mscoco_test-dev2015.jsonl"
        return asked_in(path, self.folder / "test2015")

    def score(self, answers: Answers) -> None:
        """Only EvalAI can."""

    def upload(self, answers: Answers) -> tuple[str, Any]:
        """A line for every question of the whole test set, empty where it is not of test-dev."""
        said = {key.id: normalise.textvqa(text) for key, text in answers.items()}
        path = self.folder / "llava_vqav2_mscoco_test2015.jsonl"
        every = read_lines(path, "LLaVA's question file", ("question_id",))
        found = [x["question_id"] for x in every]
        return "vqav2_test_upload.json", [
            {"question_id": i, "answer": said.get(str(i), "")} for i in found
        ]


@dataclass(frozen=True)
class VQAv2Val:
    """The validation questions, in VQA's own files.

    v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json and val2014/.
    """

    folder: Path
    max_new_tokens: int = 128

    def questions(self) -> list[Question]:
        """Prompts have the suffix of LLaVA's test questions."""
        path = self.folder / "v2_OpenEnded_mscoco_val2014_questions.json"
        questions = []
        for found in read_json(path, "VQAv2's validation questions")["questions"]:
            image = self.folder / "val2014" / f"COCO_val2014_{found['image_id']:012}.jpg"
            text = found["question"] + _BRIEF
            questions.append(Question(found["question_id"], text, (image,), text))
        return questions

    def score(self, answers: Answers) -> Score:
        """The official accuracy over ten annotators; where they agree, of answers as written."""
        path = self.folder / "v2_mscoco_val2014_annotations.json"
        known = {
            str(found["question_id"]): found["answers"]
            for found in read_json(path, "VQAv2's annotations")["annotations"]
        }
        points: dict[Key, float | None] = {}
        for key, text in answers.items():
            annotators = [normalise.blank(a["answer"]) for a in look_up(known, key.id, path)]
            rule = normalise.vqa if len(set(annotators)) > 1 else normalise.blank
            points[key] = normalise.consensus(rule(text), [rule(a) for a in annotators])
        return collect(self.questions(), points)

    def upload(self, answers: Answers) -> tuple[str, Any]:
        """What the VQA evaluation reads."""
        content = [
            {"question_id": q.id, "answer": answers.get(q.key, "")} for q in self.questions()
        ]
        return "v2_OpenEnded_mscoco_val2014_results.json", content


@dataclass(frozen=True)
class TextVQA:
    """llava_textvqa_val_v051_ocr.jsonl, train_images, TextVQA_0.5.1_val.json."""

    folder: Path
    max_new_tokens: int = 128

    def questions(self) -> list[Question]:
        """See `Benchmark`."""
        path = self.folder / "llava_textvqa_val_v051_ocr.jsonl"
        return asked_in(path, self.folder / "train_images")

    def score(self, answers: Answers) -> Score:
        """Annotations are found by image and question: the id of a question file is the image's."""
        path = self.folder / "TextVQA_0.5.1_val.json"
        known = {
            (found["image_id"], found["question"].lower()): found["answers"]
            for found in read_json(path, "TextVQA's annotations")["data"]
        }
        points: dict[Key, float | None] = {}
        for key, text in answers.items():
            found = look_up(known, (key.id, _question(key.prompt)), path)
            annotators = [normalise.textvqa(a) for a in found]
            points[key] = normalise.consensus(normalise.textvqa(text), annotators)
        return collect(self.questions(), points)

    def upload(self, answers: Answers) -> None:
        """Scored here."""


def _question(prompt: str) -> str:
    """The question in a prompt with or without an OCR line, as LLaVA's scorer finds it."""
    if prompt.startswith("OCR tokens: "):
        found = re.search("Question: (.*?) Short answer:", prompt, re.DOTALL)
        lines = [found.group(1)] if found else []
    elif "Reference OCR token: " in prompt and len(prompt.split("\n")) == 3:
        lines = prompt.split("\n")
        lines = lines[1:] if prompt.startswith("Reference OCR token:") else lines
    else:
        lines = prompt.split("\n") if len(prompt.split("\n")) == 2 else []
    if not lines:
        raise ValueError(f"no question can be told in the TextVQA prompt {prompt!r}")
    return lines[0].lower()
