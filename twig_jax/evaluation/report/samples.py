"""Single questions for the page: what each method kept of the image, and what it answered."""

import html
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from twig_jax.data.images import fit, load_image
from twig_jax.evaluation.benchmarks import BENCHMARKS
from twig_jax.evaluation.benchmarks.files import Key, Question, look_up
from twig_jax.evaluation.benchmarks.pages import Digits
from twig_jax.evaluation.judge import Way
from twig_jax.evaluation.report import page
from twig_jax.evaluation.report.runs import Evaluation

_SIDE = 336  # most pixels that an image is shown with


@dataclass(frozen=True)
class Shown:
    """One question and the lines of its answers.

    images: uint8 [S, S, 3], padded to squares; none where the benchmark's folder is not known.
    points: what each way scores, nothing where only a judge can tell.
    """

    task: str
    key: Key
    images: Sequence[np.ndarray]
    lines: Mapping[Way, Mapping[str, Any]]
    points: Mapping[Way, float]


def choose(
    evaluations: Sequence[Evaluation],
    ways: Mapping[str, Sequence[Way]],
    data: Mapping[str, Path],
    count: int,
) -> list[Shown]:
    """`count` questions, benchmarks in turn, those first where methods differ in being right.

    ways: of each benchmark, to compare. data: folders of benchmarks. Next come questions with
    different answers, then the others; those that some way could not answer are left out.
    Raises ValueError and OSError for questions and images that cannot be found or read.
    """
    ranked: dict[str, list[tuple[int, int, Key]]] = defaultdict(list)
    for i, evaluation in enumerate(evaluations):
        asked = [w for w in ways[evaluation.task] if w in evaluation.ways]
        ranked[evaluation.task] += [(rank, i, key) for rank, key in _ranked(evaluation, asked)]
    turns = zip_longest(*(sorted(found, key=lambda x: x[0]) for found in ranked.values()))
    picked = [x[1:] for x in islice(filter(None, chain.from_iterable(turns)), count)]
    shown = {}
    for i in {i for i, _ in picked}:
        keys = {key for at, key in picked if at == i}
        for one in _read(evaluations[i], ways[evaluations[i].task], keys, data):
            shown[i, one.key] = one
    return [shown[x] for x in picked]


def _ranked(evaluation: Evaluation, ways: Sequence[Way]) -> Iterator[tuple[int, Key]]:
    texts: dict[Key, list[str]] = defaultdict(list)
    for way in ways:
        for key, line in evaluation.ways[way].lines():
            if "error" not in line["metadata"]:
                texts[key].append(line["text"])
    for key, found in texts.items():
        if len(found) == len(ways):
            points = {(evaluation.ways[w].points or {}).get(key) for w in ways}
            yield (0 if len(points) > 1 else 1 if len(set(found)) > 1 else 2), key


def _read(
    evaluation: Evaluation, ways: Sequence[Way], keys: set[Key], data: Mapping[str, Path]
) -> Iterator[Shown]:
    lines: dict[Key, dict[Way, dict[str, Any]]] = {key: {} for key in keys}
    asked = [w for w in ways if w in evaluation.ways]
    for way in asked:
        for key, line in evaluation.ways[way].lines():
            if key in keys:
                lines[key][way] = line
    questions = {q.key: q for q in _questions(evaluation, data)}
    for key in keys:
        where = data.get(evaluation.task, evaluation.folder)
        images = look_up(questions, key, where).images if questions else ()
        points = {w: p[key] for w in asked if (p := evaluation.ways[w].points) is not None}
        yield Shown(evaluation.task, key, [_square(i) for i in images], lines[key], points)


def _questions(evaluation: Evaluation, data: Mapping[str, Path]) -> list[Question]:
    """The benchmark's, for their images; none where its folder is not known."""
    settings = evaluation.settings
    if evaluation.task == "digits":
        return Digits(settings["limit"] or Digits.samples, settings["seed"]).questions()
    if evaluation.task not in data:
        return []
    return BENCHMARKS[evaluation.task](data[evaluation.task]).questions()[: settings["limit"]]


def _square(source: Any) -> np.ndarray:
    image = load_image(source)
    return fit(image, min(max(image.size), _SIDE))


def cards(name: str, shown: Shown, side: int | None) -> str:
    """The question, and a card a way, plain decoding's first. side: patches an image is wide."""
    images = [f"{name}-{i}" for i in range(len(shown.images))]
    plain = next((line for way, line in shown.lines.items() if way.mode == "plain"), None)
    return (
        f"<h3>{html.escape(shown.key.prompt or shown.key.id)}</h3>"
        + page.note(f"{shown.task}, question {shown.key.id}")
        + "".join(map(page.picture, images, shown.images))
        + page.row((_card(way, shown, images, plain, side) for way in shown.lines), small=True)
    )


def _card(
    way: Way,
    shown: Shown,
    images: Sequence[str],
    plain: Mapping[str, Any] | None,
    side: int | None,
) -> str:
    line = shown.lines[way]
    told = line["metadata"]
    score = {None: "", 0.0: ", wrong", 1.0: ", right"}
    points = shown.points.get(way)
    parts = [
        "".join(_pictures(images, told.get("kept"), side)),
        f"<p><b>{html.escape(way.name)}</b>{score.get(points, f', scores {points}')}</p>",
        f"<p>{page.coloured(told['pieces'], told['accepted'])}</p>",
    ]
    if plain is not None and plain["text"] != line["text"]:
        parts.append(page.note(f"plain decoding says: {plain['text']}"))
    return "".join(parts)


def _pictures(images: Sequence[str], kept: Sequence[int] | None, side: int | None) -> Iterator[str]:
    """The images with what was kept of each, empty squares where they are not known."""
    if kept is None or side is None:
        yield from (page.patches(image, None, side or 1) for image in images)
        return
    size = side * side
    for i in range(max(len(images), 1 + max(kept, default=-1) // size)):
        own = [k % size for k in kept if k // size == i]
        yield page.patches(images[i] if images else None, own, side)
