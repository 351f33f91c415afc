"""Questions with known answers, as requests, and how well they were answered."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from twig_jax.config import LlavaConfig
from twig_jax.data import conversation, digits, images, questions
from twig_jax.data.tokens import prompt_ids
from twig_jax.decoding.generate import Generator
from twig_jax.decoding.settings import Request, Result, Settings

# What the decoding programs compute themselves, and their name for it; other scores are given.
_COMPUTED = {"twig": "twig", "base_K": "fastv"}
SELECTORS = (*_COMPUTED, "random", "oracle")
_TEMPLATE = "llava_hf"


@dataclass(frozen=True)
class Sample:
    """A test page with one question, tokenised."""

    index: int
    page: digits.Page
    question: questions.Question
    request: Request


def load_samples(
    tokenizer: Any,
    config: LlavaConfig,
    n: int,
    *,
    split: str = "test",
    seed: int = 0,
    start: int = 0,
    task: str | None = None,
    blank: bool = False,
) -> list[Sample]:
    """Samples start .. start + n - 1 of the digits set; `task` "short", "long" or None for both.

    `blank` hides the page from the model: an empty sheet with the same question.
    """
    v = config.vision
    samples = []
    for index in range(start, start + n):
        page, question = questions.example(split, seed, index, task)
        image = page.image
        if blank:
            image = np.broadcast_to(np.median(image, axis=(0, 1)).astype(np.uint8), image.shape)
        pixels = images.normalize(image[None], v.image_mean, v.image_std)
        text = conversation.prompt(_TEMPLATE, [(question.text, None)], images=1)
        ids, is_visual = prompt_ids(tokenizer, text, config.image_token_id, v.num_tokens, 1)
        samples.append(Sample(index, page, question, Request(ids, is_visual, pixels=pixels)))
    return samples


def with_scores(sample: Sample, selector: str, seed: int = 0) -> Request:
    """The request with the scores of a selector that the model does not compute.

    "random" ranks all visual tokens at random; "oracle" ranks those that show the digits the
    question needs first, round robin over the digits, and the rest at random.
    """
    if selector in _COMPUTED:
        return sample.request
    if selector not in SELECTORS:
        raise ValueError(f"no selector {selector!r}; there are: {', '.join(SELECTORS)}")
    rng = np.random.default_rng([seed, sample.index])
    scores = rng.random(digits.VISUAL_TOKENS)
    if selector == "oracle":
        needed = list(questions.ranked_patches(sample.question))
        scores[needed] += np.arange(len(needed), 0, -1)
    full = np.zeros(len(sample.request.ids), np.float32)
    full[sample.request.is_visual] = scores
    return replace(sample.request, scores=full)


def answer(
    generator: Generator,
    samples: Sequence[Sample],
    settings: Settings,
    *,
    selector: str = "twig",
    batch: int = 32,
    told: Callable[[int, Result], Any] = lambda *_: None,
) -> list[Result]:
    """Results in order; `told` as in `Generator.generate_many`."""
    settings = replace(settings, selector=_COMPUTED.get(selector, "given"))
    requests = [with_scores(sample, selector) for sample in samples]
    return generator.generate_many(requests, settings, batch, told)


def exact(tokenizer: Any, sample: Sample, result: Result) -> bool:
    """Whether the answer is the known one, word for word."""
    text = tokenizer.decode(result.tokens, skip_special_tokens=True)
    return text.strip() == sample.question.answer
