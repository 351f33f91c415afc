"""Ways to answer a benchmark, judged beside plain decoding: what is lost and what is gained."""

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from twig_jax.config import MODES
from twig_jax.decoding.buckets import state_bytes
from twig_jax.decoding.generate import Generator
from twig_jax.decoding.settings import Request, Result, Settings
from twig_jax.evaluation.answers import answer_share, answered, digest, failure
from twig_jax.evaluation.benchmarks.files import Benchmark, Key, Question, Score, mean, texts
from twig_jax.evaluation.pruners.answering import Rival
from twig_jax.evaluation.scoring import relacc
from twig_jax.evaluation.timing import timed
from twig_jax.programs import device_bytes


@dataclass(frozen=True)
class Way:
    """One way to answer: a mode, and where it prunes, by what and to how many tokens a layer."""

    mode: str
    selector: str | None = None
    avg_retained: float | None = None

    @property
    def name(self) -> str:
        """What its folder is called."""
        if self.selector is None:
            return self.mode
        return f"{self.mode}-{self.selector}-{self.avg_retained:g}"

    def settings(self, common: Settings) -> Settings:
        """The call's settings."""
        return replace(common, mode=self.mode, avg_retained=self.avg_retained)


def ways(modes: Sequence[str], selectors: Sequence[str], budgets: Sequence[float]) -> list[Way]:
    """Every combination, plain decoding first: RelAcc and RelSpd are relative to it."""
    found = []
    for mode in sorted(modes, key=MODES.index):
        if mode in ("ttp", "ttp_ssd"):
            found += [Way(mode, s, b) for s in selectors for b in budgets]
        else:
            found.append(Way(mode))
    return found


@dataclass(frozen=True)
class Judge:
    """A model on the questions of one benchmark.

    model: an `api.Model`. folder: has one folder of answers a way. common: settings of all ways;
    max_new_tokens is the benchmark's own unless told otherwise. notes: what else answers depend on,
    kept beside them. limited: the questions are some of the benchmark's, so that only its accuracy
    can be told.
    """

    model: Any
    task: str
    benchmark: Benchmark
    questions: Sequence[Question]
    folder: Path
    common: Settings
    batch: int
    model_id: str
    notes: Mapping[str, Any]
    limited: bool = False

    def check(self, way: Way) -> None:
        """Raises ValueError for a way that cannot be, before anything is answered."""
        settings = way.settings(self.common)
        if way.selector is None:
            self.model.generator.batches.check(settings)
        else:
            settings.check()
            rival = self._rival(way.selector)
            rival.engine(settings)
            rival.budget(settings, images=1)

    def answers(
        self,
        way: Way,
        share: tuple[int, int] = (0, 1),
        told: Callable[[int], Any] = lambda _: None,
    ) -> dict[Key, str]:
        """The lines of a way's answers, after this process' share; see `answer_share`."""
        settings = way.settings(self.common)
        many = self.model.generator.generate_many
        if way.selector is not None:
            many = self._rival(way.selector).answer
        return answer_share(
            self.folder / way.name,
            self.questions,
            share,
            self._ask,
            lambda requests, told: many(requests, settings, self.batch, told),
            batch=self.batch,
            model_id=self.model_id,
            settings={
                "mode": way.mode,
                "selector": way.selector,
                "avg_retained": way.avg_retained,
                "weights": self.weights,
                **self.notes,
            },
            detokenize=self.model.generator.detokenize,
            told=told,
        )

    def answered(self, way: Way) -> dict[Key, str]:
        """The lines of a way's answers so far, by whatever process."""
        return answered(self.folder / way.name, self.questions)

    def row(
        self, way: Way, lines: Mapping[Key, str], base: Score | None
    ) -> tuple[dict[str, Any], Score | None]:
        """A way's figures for a result file, and its score; base: plain decoding's score.

        Shares are fractions, `figures` in the benchmark's own unit. There is an interval where the
        main one is the mean over questions. What each question adds, if it counts, and its group
        are written to points.json beside the answers, in the questions' order. Raises ValueError
        where none of the questions could be asked.
        """
        drafted = matched = rounds = kept = 0
        errors: list[tuple[str, str]] = []
        for question in self.questions:
            told = json.loads(lines[question.key])["metadata"]
            if "error" in told:
                errors.append((question.key.id, told["error"]))
                continue
            drafted += sum(told["drafted"])
            matched += sum(told["matched"])
            rounds += len(told["matched"])
            kept = max(kept, told["retained"])
        if errors and len(errors) == len(self.questions):
            raise ValueError(f"none of the questions can be asked, as {errors[0][1]}")
        tokens = self.model.config.vision.num_tokens
        row: dict[str, Any] = {
            "task": self.task,
            "mode": way.mode,
            "selector": way.selector,
            "avg_retained": way.avg_retained,
            "pruned": 0.0 if way.avg_retained is None else 1 - way.avg_retained / tokens,
            "retained": kept,
            "samples": len(self.questions),
            "unanswered": [asked for asked, _ in errors],
            "tokar": matched / drafted if drafted else None,
            "mean_drafted": drafted / rounds if drafted else None,
            "mean_accepted": matched / rounds if drafted else None,
        }
        score = self.benchmark.score(said(lines))
        if score is None:
            return row, None
        groups = {q.key: q.group for q in self.questions if q.key in score.points}
        if not groups:
            return row, None  # none of the few that were asked counts
        points = [score.points[k] for k in groups]
        content = [[score.points.get(q.key), q.group] for q in self.questions]
        (self.folder / way.name / "points.json").write_text(json.dumps(content) + "\n")
        if self.limited:
            # ScienceQA counts those with images alone, and has a name for that.
            whole = len(groups) == len(self.questions)
            name = "accuracy" if whole else next(iter(score.figures))
            score = replace(score, figures={name: mean(points)})
        row |= {"exact": float(np.mean(points)), "figures": score.figures}
        if base is not None or way.mode == "plain":
            of = base or score
            main = next(iter(score.figures))
            low = high = None
            if score.is_mean and of.is_mean:
                base_points = [of.points[k] for k in groups]
                _, low, high = relacc(points, base_points, list(groups.values()))
            ratio = score.figures[main] / of.figures[main] if of.figures[main] else None
            figures = {"relacc": ratio, "relacc_low": low, "relacc_high": high}
            # A base without a right answer has no ratio.
            row |= {k: None if x is None or x != x else x for k, x in figures.items()}
        return row, score

    def speeds(
        self,
        asked: Sequence[Way],
        samples: int,
        repeats: int,
        told: Callable[[], Any] = lambda: None,
    ) -> dict[Way, dict[str, Any]]:
        """Speed and memory of every way, at batch 1 on the first `samples` questions.

        Each call has a plain one right before it, `repeats` times over. What a rival takes for its
        ranking is left out where the engine does not rank itself, and the vision tower too where
        the rival makes embeddings of its own: there, its speed is the most it could reach.
        memory_bytes: parameters, and one row's caches and largest intermediates.
        """
        requests = []
        for question in self.questions:
            with contextlib.suppress(MemoryError, OSError, ValueError):
                requests.append(self._ask(question))
            if len(requests) == samples:
                break
        ready = {way: self._ready(way, requests) for way in (Way("plain"), *asked)}

        def call(way: Way) -> Callable[[int], Result]:
            generator, settings, found = ready[way]
            return lambda i: generator.generate([found[i]], settings)[0]

        found = timed(call(Way("plain")), {w: call(w) for w in asked}, len(requests), repeats, told)
        return {
            way: {
                "timed_samples": len(requests),
                **found[way].figures(),
                "memory_bytes": _memory(*ready[way]),
            }
            for way in asked
        }

    def _ask(self, question: Question) -> Request:
        """The request; ValueError, OSError or MemoryError for a question that cannot be asked."""
        request = self.model.request(question.prompt, question.images)
        self.model.generator.batches.prepare([request], replace(self.common, mode="plain"))
        return request

    def _ready(
        self, way: Way, requests: Sequence[Request]
    ) -> tuple[Generator, Settings, Sequence[Request]]:
        """What answers, how, and the requests with what they are ranked by."""
        settings = way.settings(self.common)
        if way.selector is None:
            return self.model.generator, settings, requests
        rival = self._rival(way.selector)
        ranked = rival.ranked(requests, settings, 1)
        return rival.engine(settings), replace(settings, selector=rival.pruner.selector), ranked

    def _rival(self, selector: str) -> Rival:
        if selector not in self._rivals:
            self._rivals[selector] = Rival(self.model.generator, selector)
        return self._rivals[selector]

    @cached_property
    def weights(self) -> str:
        """What answers are told apart by if paths and settings are the same; see `digest`."""
        return digest(self.model.generator.weights)

    @cached_property
    def _rivals(self) -> dict[str, Rival]:
        return {}


def _memory(generator: Generator, settings: Settings, requests: Sequence[Request]) -> int:
    program = generator.batches.prepare(requests[:1], settings).program
    itemsize = generator.weights.cache_dtype.itemsize
    weights = generator.weights if program.runs_twig else generator.weights.base
    return device_bytes(weights) + round(state_bytes(program, 1, itemsize))


def said(lines: Mapping[Key, str]) -> dict[Key, str]:
    """The answers' texts, without those of questions that could not be asked."""
    return texts({key: line for key, line in lines.items() if failure(line) is None})
