"""The embedded digits as a benchmark: unseen pages, answers known word for word."""

from dataclasses import dataclass

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
        found = []
        for index in range(self.start, self.start + self.samples):
            page, question = questions.example("test", self.seed, index)
            name, also = f"test-{self.seed}-{index}", {"task": question.task}
            found.append(Question(name, question.text, (page.image,), question.text, also))
        return found

    def score(self, answers: Answers) -> Score:
        """Exact match."""
        points: dict[Key, float | None] = {}
        asked = self.questions()
        for index, q in enumerate(asked, self.start):
            if q.key in answers:
                _, question = questions.example("test", self.seed, index)
                points[q.key] = float(answers[q.key].strip() == question.answer)
        return collect(asked, points)

    def upload(self, answers: Answers) -> None:
        """Scored here."""
