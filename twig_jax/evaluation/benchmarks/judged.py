"""Benchmarks that a judge scores: MM-Vet and LLaVA-Bench (in the wild)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twig_jax.evaluation.benchmarks.files import Answers, Question
from twig_jax.evaluation.benchmarks.short import asked_in


@dataclass(frozen=True)
class Judged:
    """A question file and an image folder; answers are long."""

    folder: Path
    file: str
    prefix: str | None  # of ids in the file for the judge, None where it reads the answers file
    max_new_tokens: int = 1024

    def questions(self) -> list[Question]:
        """See `Benchmark`."""
        return asked_in(self.folder / self.file, self.folder / "images")

    def score(self, answers: Answers) -> None:
        """Only a judge can tell."""

    def upload(self, answers: Answers) -> tuple[str, Any] | None:
        """MM-Vet's evaluator reads id -> answer."""
        if self.prefix is None:
            return None
        said = {q.key.id: answers.get(q.key, "") for q in self.questions()}
        return "mm-vet.json", {f"{self.prefix}{i}": text for i, text in said.items()}


def mm_vet(folder: Path) -> Judged:
    """llava-mm-vet.jsonl and images/."""
    return Judged(folder, "llava-mm-vet.jsonl", "v1_")


def llava_bench(folder: Path) -> Judged:
    """questions.jsonl and images/; the judge's script reads the answers file itself."""
    return Judged(folder, "questions.jsonl", None)
