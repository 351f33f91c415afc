"""The model that answers lmms-eval's tasks on this engine."""

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from PIL import Image
from tqdm import tqdm

from twig_jax import api
from twig_jax.decoding.asking import ask_many
from twig_jax.decoding.settings import Request, Result, Settings
from twig_jax.evaluation.pruners.answering import Rival
from twig_jax.runtime import use_compilation_cache

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
            self._answer: Callable[..., list[Result]] = generator.generate_many
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
        settings = []
        for instance in requests:
            _, kwargs, _, *place = instance.args
            # Repeats of a question are to differ where they are sampled.
            settings.append(self._settings(kwargs, repeats[*place]))
            repeats[*place] += 1
        tokens = drafted = matched = 0
        seconds = 0.0

        def ask(i: int) -> Request:
            text, _, doc_to_visual, doc_id, task, split = requests[i].args
            # A data set decodes its images here.
            visuals = doc_to_visual(self.task_dict[task][split][doc_id])
            request = self._request(text, visuals or [])
            # The mode has been checked; this is about the question.
            self.model.generator.batches.prepare([request], replace(settings[i], mode="plain"))
            return replace(request, settings=settings[i])

        def decode(asked: Sequence[Request], told: Callable[[int, Result], Any]) -> None:
            nonlocal seconds
            began = time.perf_counter()
            self._answer(asked, self.settings, self.batch_size, told)
            seconds += time.perf_counter() - began

        with tqdm(total=len(requests), desc="twig_jax", disable=self.rank != 0 or None) as bar:

            def told(i: int, request: Request, result: Result) -> None:
                nonlocal tokens, drafted, matched
                counts = TokenCounts(len(request.ids), len(result.tokens))
                answers[i] = GenerationResult(result.text or "", counts)
                tokens += len(result.tokens)
                drafted += sum(len(drafts) for drafts in result.drafts)
                matched += int(result.matched.sum())
                bar.update()

            def failed(i: int, error: Exception) -> None:
                *_, doc_id, task, _ = requests[i].args
                errors.append(f"{task}, document {doc_id}: {error}")
                logger.error(f"answered by an empty text: {errors[-1]}")
                bar.update()

            ask_many(len(requests), ask, decode, self.batch_size, told, failed)
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
