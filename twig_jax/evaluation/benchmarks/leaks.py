"""Questions of a benchmark that a model was trained on."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from twig_jax.data.conversation import IMAGE
from twig_jax.data.sources import BadSample, Source, check_bad
from twig_jax.evaluation.benchmarks.files import Question

# COCO's images have names with and without their split.
_COCO = re.compile(r"^COCO_[a-z]+20\d\d_")
# Training data that cannot be read cannot be vouched for.
_BAD = 0.01


def leaks(questions: Sequence[Question], trained: Source) -> list[tuple[Question, str]]:
    """(question, id of the training sample) wherever one image has one question in both.

    An image is known by its file's name, or by its content where it has none; a question by its
    first line, or by its id. An image alone is no leak: LLaVA's own training data shares COCO's
    images with several benchmarks. Raises ValueError where over 1 % of the samples are bad.
    """
    asked: dict[tuple[str, str], Question] = {}
    for question in questions:
        for image in question.images or ("",):
            asked[_image(image), _words(question.prompt)] = question
            asked[_image(image), str(question.id)] = question
    found, bad = [], 0
    for index in range(len(trained)):
        try:
            sample = trained[index]
        except BadSample:
            bad += 1
            continue
        texts = [sample.id, *(_words(text) for text, _ in sample.turns)]
        for image in sample.images or ("",):
            name = _image(image)
            hits = {id(q): q for text in texts if (q := asked.get((name, text))) is not None}
            found += [(question, sample.id) for question in hits.values()]
    check_bad(bad, len(trained), len(trained), _BAD)
    return found


def _image(image: Any) -> str:
    if isinstance(image, str | Path):
        return _COCO.sub("", Path(image).stem)
    content = image if isinstance(image, bytes) else np.asarray(image).tobytes()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _words(text: str) -> str:
    lines = text.replace(IMAGE, "").strip().split("\n")
    return lines[0].strip().lower()
