"""The model that answers lmms-eval's tasks on this engine."""

import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from PIL import Image
from tqdm import tqdm

from twig_jax import api
from twig_jax.decoding.settings import Request, Settings
from twig_jax.evaluation.pruners.answering import Rival
from twig_jax.runtime import use_compilation_cache

# Questions whose images are read, and sorted by length, together: so many batches.
_WINDOW = 16
# Fields of `Settings` that are the model's; the others are the task's.
_OWN = set("mode avg_retained gamma theta children expanded nodes adaptive seed".split())
# What is made of a task's generation_kwargs.
_ASKED = set(
    "max_new_tokens until do_sample temperature top_k top_p num_beams repetition_penalty".split()
)


class TwigJax(lmms):
    """The model behind `--model twig_jax`; these arguments are what --model_args takes.

    checkpoint, twig, dtype, conventions, template: as in `twig_jax.load`. settings: mode,
    avg_retained, gamma, theta, children, expanded, nodes, adaptive and seed of `Settings`, by
    default as in `Model.settings`. selector: what prunes in the twig's place, one of `PRUNERS`.
    batch_size: questions answered at once (--batch_size).

    Raises what `twig_jax.load` raises, ValueError for settings that the model cannot follow.
    """

    def __init__(
        self,
        checkpoint: str = "digits",
        twig: str | None = None,
        dtype: str | None = None,
        conventions: str | None = None,
        template: str | None = None,
        selector: str | None = None,
        batch_size: int | str = 1,
        **settings: Any,
    ) -> None:
        super().__init__()
        if not settings.keys() <= _OWN:
            raise ValueError(
                f"no model argument {', '.join(sorted(settings.keys() - _OWN))}; besides those of "
                f"twig_jax.load there are: selector, {', '.join(sorted(_OWN))}"
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("twig_jax runs as one process, without `accelerate launch`")
        use_compilation_cache()
        self.batch_size = int(batch_size)
        self.model = api.load(checkpoint, twig, dtype, conventions=conventions, template=template)
        self.settings = replace(self.model.settings, **settings)
        generator = self.model.generator
        if selector is None:
            self._answer = generator.generate_many
            # Fails now where it would for every question; the image is there for the budget.
            blank = self.model.request("", [Image.new("RGB", (8, 8))])
            generator.batches.prepare([blank], self.settings)
        else:
            self._answer = Rival(generator, selector).answer

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests, with their token counts.

        A question that cannot be asked (an image that cannot be read, `<image>` markers that do not
        match the images, a prompt that is too long) is logged and has an empty answer. Raises
        ValueError where that is so for all of them, and for what the engine cannot do, as beam
        search.
        """
        if unknown := {key for instance in requests for key in instance.args[1]} - _ASKED:
            logger.warning(f"generation_kwargs without effect here: {', '.join(sorted(unknown))}")
        answers, errors = [GenerationResult("")] * len(requests), []
        repeats = Counter[tuple]()
        tokens = drafted = matched = 0
        seconds = 0.0
        window = _WINDOW * self.batch_size
        with tqdm(total=len(requests), desc="twig_jax", disable=self.rank != 0 or None) as bar:
            for first in range(0, len(requests), window):
                asked = {}
                for i, instance in enumerate(requests[first : first + window], first):
                    text, kwargs, doc_to_visual, *place = instance.args
                    doc_id, task, split = place
                    # Repeats of a question are to differ where they are sampled.
                    settings = self._settings(kwargs, repeats[*place])
                    repeats[*place] += 1
                    try:
                        # A data set decodes its images here.
                        visuals = doc_to_visual(self.task_dict[task][split][doc_id])
                        request = self._request(text, visuals or [])
                        # The mode has been checked; this is about the question.
                        plain = replace(settings, mode="plain")
                        self.model.generator.batches.prepare([request], plain)
                        asked[i] = replace(request, settings=settings)
                    except (MemoryError, OSError, ValueError) as error:
                        errors.append(f"{task}, document {doc_id}: {error}")
                        logger.error(f"answered by an empty text: {errors[-1]}")
                        bar.update()
                began = time.perf_counter()
                results = self._answer(
                    list(asked.values()), self.settings, self.batch_size, lambda *_: bar.update()
                )
                seconds += time.perf_counter() - began
                for (i, request), result in zip(asked.items(), results, strict=True):
                    counts = TokenCounts(len(request.ids), len(result.tokens))
                    answers[i] = GenerationResult(result.text or "", counts)
                    tokens += len(result.tokens)
                    drafted += sum(len(drafts) for drafts in result.drafts)
                    matched += int(result.matched.sum())
        if len(errors) == len(requests) > 0:
            raise ValueError(f"none of the questions can be asked, as {errors[0]}")
        more = {"tokar": matched / drafted} if drafted else {}
        log_metrics(seconds, tokens, tokens / seconds, {**more, "unanswered": len(errors)})
        return answers

    def _settings(self, kwargs: dict[str, Any], repeat: int) -> Settings:
        """A task's generation_kwargs, with their meaning in transformers, as `Settings`."""
        asked = {key: value for key, value in kwargs.items() if value is not None}
        if asked.get("num_beams", 1) != 1:
            raise ValueError("there is no beam search here; --gen_kwargs num_beams=1")
        until = [u] if isinstance(u := asked.get("until", []), str) else u
        sampled = asked.get("do_sample", True) and asked.get("temperature", 0) > 0
        return replace(
            self.settings,
            # As lmms-eval's own LLaVA where the task sets none.
            max_new_tokens=asked.get("max_new_tokens", 1024),
            temperature=float(asked["temperature"]) if sampled else 0.0,
            top_k=asked.get("top_k", 0) if sampled else 0,
            top_p=asked.get("top_p", 1.0) if sampled else 1.0,
            repetition_penalty=asked.get("repetition_penalty", 1.0),
            seed=self.settings.seed + repeat,
            # lmms-eval asks for an end at the first empty line where a task says nothing, meant
            # for few-shot prompts of text; its own models leave that out too.
            stop=tuple(text for text in until if text not in ("", "\n\n")),
        )

    def _request(self, text: str, visuals: Sequence[Any]) -> Request:
        for visual in visuals:
            if not isinstance(visual, Image.Image | str):
                raise ValueError(f"an image is needed, not a {type(visual).__name__}")
        return self.model.request(text, visuals)

    def loglikelihood(self, requests: Sequence[Instance]) -> NoReturn:
        """Not there: lmms-eval 0.7 makes texts of any model's likelihoods, and fails at them."""
        raise NotImplementedError("twig_jax answers tasks that generate, not multiple_choice ones")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> NoReturn:
        """Not there."""
        raise NotImplementedError("twig_jax answers tasks of one round")
