"""Questions of a benchmark that a model was trained on."""

import hashlib
import re
from collections import Counter
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from twig_jax.data.conversation import IMAGE
from twig_jax.data.sources import BadSample, Source, check_bad
from twig_jax.evaluation.benchmarks.files import Question

# COCO's images have names with and without their split.
_COCO = re.compile(r"^COCO_[a-z]+20\d\d_")
# The number of one of COCO's images, whatever folder it is in: MME has some in two categories.
_NUMBER = re.compile(r"\d{12}")
# The line that says how to answer.
_HOW = re.compile(r"\nAnswer (the question|with the option)[^\n]*$")
# Training data that cannot be read cannot be vouched for.
_BAD = 0.01


def leaks(questions: Sequence[Question], trained: Source) -> list[tuple[Question, str]]:
    """(question, id of the training sample) wherever one image has one question in both.

    An image is known by its file's name, with its folder's where the benchmark has several images
    of that name (but COCO's numbers), or by its content where it has none; a question by its first
    line, without an image by all of it but how to answer, or by its id. An image alone is no leak:
    LLaVA's own training data shares COCO's images with several benchmarks. Raises ValueError where
    over 1 % of the samples are bad.
    """
    files = {i for q in questions for i in q.images if isinstance(i, str | Path)}
    stems = Counter(map(_stem, files))
    shared = {stem for stem, n in stems.items() if n > 1 and not _NUMBER.fullmatch(stem)}
    asked: dict[tuple[str, str], Question] = {}
    for question in questions:
        for image in question.images or ("",):
            name = _image(image, shared)
            asked[name, _words(question.prompt, name)] = question
            asked[name, str(question.id)] = question
    found, bad = [], 0
    for index in range(len(trained)):
        try:
            sample = trained[index]
        except BadSample:
            bad += 1
            check_bad(bad, index + 1, len(trained), _BAD)
            continue
        for image in sample.images or ("",):
            name = _image(image, shared)
            texts = [sample.id, *(_words(text, name) for text, _ in sample.turns)]
            hits = {id(q): q for text in texts if (q := asked.get((name, text))) is not None}
            found += [(question, sample.id) for question in hits.values()]
    return found


def _stem(image: str | Path) -> str:
    return _COCO.sub("", Path(image).stem)


def _image(image: Any, shared: Container[str]) -> str:
    if isinstance(image, str | Path):
        stem = _stem(image)
        return f"{Path(image).parent.name}/{stem}" if stem in shared else stem
    content = image if isinstance(image, bytes) else np.asarray(image).tobytes()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _words(text: str, image: str) -> str:
    text = text.replace(IMAGE, "").strip()
    return (text.split("\n")[0] if image else _HOW.sub("", text)).strip().lower()
