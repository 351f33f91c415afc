"""The main comparison: modes, budgets and selectors on the same questions."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np

from twig_jax.decoding.generate import Generator
from twig_jax.decoding.settings import Result, Settings
from twig_jax.evaluation.scoring import acceptance, ceiling, relacc
from twig_jax.evaluation.tasks import Sample, answer, exact
from twig_jax.evaluation.timing import Call, Timed, beside, total_speed
from twig_jax.evaluation.timing import timed as interleaved

Progress = Callable[[str], None]  # is told what has one more answer


class Model(Protocol):
    """What is compared: `api.Model` is one."""

    @property
    def generator(self) -> Generator:
        """Base and twig."""

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""


@dataclass(frozen=True)
class Run:
    """One way to answer: a mode, the share of visual tokens pruned, and who chooses them."""

    mode: str
    pruned: float = 0.0
    selector: str = "twig"

    def settings(self, model: Model, common: Settings) -> Settings:
        """The call's settings; `pruned` is a share of the M tokens an image has a layer."""
        average = model.generator.config.vision.num_tokens * (1 - self.pruned)
        return replace(common, mode=self.mode, avg_retained=round(average))


@dataclass(frozen=True)
class Row:
    """One line of the tables and the result file; shares are fractions, None is not measured."""

    task: str
    pruned: float
    mode: str
    selector: str | None
    samples: int  # that `exact` and `relacc` are over
    exact: float
    relacc: float | None = None
    relacc_low: float | None = None
    relacc_high: float | None = None
    timed_samples: int = 0  # that all of the following are over
    tokens_per_s: float | None = None
    tokens_per_s_total: float | None = None
    relspd: float | None = None
    ceiling: float | None = None
    tokar: float | None = None
    tokar_content: float | None = None
    tokar_wording: float | None = None
    mean_drafted: float | None = None
    mean_accepted: float | None = None
    retained: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values; nan becomes null."""
        return {
            k: None if isinstance(v, float) and np.isnan(v) else v for k, v in asdict(self).items()
        }


def accuracy_rows(
    model: Model,
    samples: Sequence[Sample],
    runs: Sequence[Run],
    common: Settings,
    *,
    batch: int,
    progress: Progress = lambda *_: None,
) -> list[Row]:
    """Exact match of every run on every sample, and RelAcc against the first run.

    A row each for task "short", "long" and "all".
    """
    right: dict[Run, list[bool]] = {}
    results: dict[Run, list[Result]] = {}
    for run in runs:
        name = f"{run.mode} {run.pruned:.1%} {run.selector}"
        results[run] = answer(
            model.generator,
            samples,
            run.settings(model, common),
            selector=run.selector,
            batch=batch,
            told=lambda *_, name=name: progress(name),
        )
        right[run] = [
            exact(model.tokenizer, s, r) for s, r in zip(samples, results[run], strict=True)
        ]
    return [
        _scored(run, task, of, [results[run][i] for i in of], right[run], right[runs[0]])
        for run in runs
        for task, of in _tasks(samples)
    ]


def blank_exact(
    model: Model, blank: Sequence[Sample], common: Settings, *, batch: int
) -> float | None:
    """Plain decoding's exact match on pages that were blanked, yes-or-no questions left out.

    Near the one in ten of a guessed digit, or else the base knows answers without looking, and
    which tokens are kept could not matter. None where there are no other questions.
    """
    asked = [sample for sample in blank if sample.question.kind != "compare"]
    if not asked:
        return None
    plain = replace(common, mode="plain")
    results = answer(model.generator, asked, plain, batch=batch)
    return float(
        np.mean([exact(model.tokenizer, s, r) for s, r in zip(asked, results, strict=True)])
    )


def _tasks(samples: Sequence[Sample]) -> list[tuple[str, list[int]]]:
    """Which samples belong to task "short", "long" and "all"; tasks without any are left out."""
    every = {
        task: [i for i, s in enumerate(samples) if task in ("all", s.question.task)]
        for task in ("short", "long", "all")
    }
    return [(task, of) for task, of in every.items() if of]


def _scored(
    run: Run,
    task: str,
    of: Sequence[int],
    results: Sequence[Result],
    right: Sequence[bool],
    base: Sequence[bool],
) -> Row:
    """A run's accuracy on samples `of`; `right` and `base` are over all samples."""
    ours = [right[i] for i in of]
    share, low, high = relacc(ours, [base[i] for i in of])
    return Row(
        task=task,
        pruned=run.pruned,
        mode=run.mode,
        selector=run.selector if run.pruned else None,
        samples=len(of),
        exact=float(np.mean(ours)),
        relacc=share,
        relacc_low=low,
        relacc_high=high,
        retained=len(results[0].kept),
    )


def timed(
    model: Model,
    samples: Sequence[Sample],
    runs: Sequence[Run],
    common: Settings,
    *,
    repeats: int,
    progress: Progress = lambda *_: None,
) -> dict[Run, Timed]:
    """Times each run at batch 1, a plain run right before each of its runs."""

    def call(settings: Settings) -> Call:
        return lambda i: model.generator.generate([samples[i].request], settings)[0]

    return interleaved(
        call(replace(common, mode="plain")),
        {run: call(run.settings(model, common)) for run in runs},
        len(samples),
        repeats,
        lambda: progress("timing"),
    )


def speed_rows(
    model: Model,
    samples: Sequence[Sample],
    timings: dict[Run, Timed],
) -> list[Row]:
    """A row each for plain decoding and every timed run, for task "short", "long" and "all"."""
    twig, layers = model.generator.twig_config, model.generator.config.text.num_layers
    assert twig is not None
    rows = []
    flags = [content_tokens(model.tokenizer, sample) for sample in samples]
    everything = {Run("plain"): beside(list(timings.values())), **timings}
    right = {
        run: [exact(model.tokenizer, s, r) for s, r in zip(samples, t.results, strict=True)]
        for run, t in everything.items()
    }
    for task, of in _tasks(samples):
        for run, t in everything.items():
            results = [t.results[i] for i in of]
            row = replace(
                _scored(run, task, of, results, right[run], right[Run("plain")]),
                timed_samples=len(of),
                tokens_per_s=float(t.speeds[of].mean()),
                tokens_per_s_total=total_speed(results, t.speeds[of]),
                relspd=float(t.speeds[of].mean() / t.plain_speeds[of].mean()),
            )
            if run.mode in ("ssd", "ttp_ssd"):
                a = acceptance(results, [flags[i] for i in of])
                row = replace(
                    row,
                    ceiling=ceiling(twig, layers, a.levels, a.accepted),
                    tokar=a.tokar,
                    tokar_content=a.content,
                    tokar_wording=a.wording,
                    mean_drafted=a.drafted,
                    mean_accepted=a.accepted,
                )
            rows.append(row)
    return rows


def merged(accuracy: Sequence[Row], speed: Sequence[Row]) -> list[Row]:
    """One row per task, mode, budget and selector: accuracy from the larger set of samples."""
    accurate = {(r.task, r.pruned, r.mode, r.selector): r for r in accuracy}
    rows = []
    for row in speed:
        better = accurate.pop((row.task, row.pruned, row.mode, row.selector), row)
        fields = ("samples", "exact", "relacc", "relacc_low", "relacc_high")
        rows.append(replace(row, **{f: getattr(better, f) for f in fields}))
    return rows + list(accurate.values())


def content_tokens(tokenizer: Any, sample: Sample) -> list[bool]:
    """Which tokens of the known answer depend on the page."""
    flags: list[bool] = []
    for word, content in zip(sample.question.answer.split(), sample.question.content, strict=True):
        tokens = tokenizer.encode(f" {word}", add_special_tokens=False)
        flags += [content] + [False] * (len(tokens) - 1)
    return flags


def unequal(fast: Sequence[Result], slow: Sequence[Result]) -> list[int]:
    """Samples whose tokens differ; empty for a lossless pair."""
    return [
        i
        for i, (a, b) in enumerate(zip(fast, slow, strict=True))
        if not np.array_equal(a.tokens, b.tokens)
    ]
