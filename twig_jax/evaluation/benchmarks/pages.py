"""The embedded digits as a benchmark: unseen pages, answers known word for word."""

from dataclasses import dataclass
from functools import cached_property

from twig_jax.data import questions
from twig_jax.evaluation.benchmarks.files import Answers, Key, Question, Score, collect


@dataclass(frozen=True)
class Digits:
    """Test questions start .. start + samples - 1 of a seed; the short and the long ones mixed."""

    samples: int = 1024
    seed: int = 0
    start: int = 0
    max_new_tokens: int = 64

    def questions(self) -> list[Question]:
        """See `Benchmark`."""
        return [question for question, _ in self._known]

    def score(self, answers: Answers) -> Score:
        """Exact match."""
        points: dict[Key, float | None] = {
            q.key: float(answers[q.key].strip() == known)
            for q, known in self._known
            if q.key in answers
        }
        return collect(self.questions(), points)

    @cached_property
    def _known(self) -> list[tuple[Question, str]]:
        """Questions with their answers; drawing the pages takes longer than scoring answers."""
        found = []
        for index in range(self.start, self.start + self.samples):
            page, question = questions.example("test", self.seed, index)
            name, also = f"test-{self.seed}-{index}", {"task": question.task}
            asked = Question(name, question.text, (page.image,), question.text, also)
            found.append((asked, question.answer))
        return found

    def upload(self, answers: Answers) -> None:
        """Scored here."""
