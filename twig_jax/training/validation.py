"""How well a model in training answers what it was not trained on."""

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from twig_jax.api import Model
from twig_jax.config import LlavaConfig, TwigConfig
from twig_jax.data.sources import BadSample, open_source
from twig_jax.data.tokens import conventions, load_tokenizer
from twig_jax.decoding.generate import Generator
from twig_jax.decoding.settings import Request, Result, Settings
from twig_jax.evaluation import tasks
from twig_jax.evaluation.scoring import acceptance, relacc
from twig_jax.models.llava import Params
from twig_jax.pruning.budget import retained
from twig_jax.sharding.mesh import make_mesh
from twig_jax.training.config import TrainConfig
from twig_jax.training.data import open_batches, row_shard
from twig_jax.training.loop import VALIDATION_LOSS, stage_loss, summarise
from twig_jax.training.step import batch_sharding

# Shares of the visual tokens that an average layer sees at the paper's three budgets.
BUDGETS = (1 / 3, 2 / 9, 1 / 9)

_BATCHES = 4  # that the loss is a mean over
_ROWS = 32  # that answer at a time
_NEW_TOKENS = 64

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class _HeldOut:
    """A question, and the answer that is known."""

    request: Request
    answer: str


def validation(
    config: TrainConfig, base: Params | None
) -> Callable[[int, Params], dict[str, float]]:
    """A callback(step, params) that gives `validation/...` figures of held-out data.

    loss: over a few batches. exact: the share of first questions answered word for word as known,
    in up to 64 tokens. For a twig, on its whole `base`: tokar, drafted tokens that are accepted;
    mean_accepted, of an iteration; and relacc_R, what is left of the base's exact answers where an
    average layer sees R visual tokens. Those are left out where the base answers nothing right or
    the twig grows too high for R.
    """
    base_config, twig_config = config.model()
    mesh = make_mesh(*config.mesh)
    rows = batch_sharding(mesh)
    loss = jax.jit(stage_loss(config))
    shard = row_shard(rows, config.data.batch_size)
    folder = config.reads_as()
    tokenizer = load_tokenizer(folder)
    reader = Model(Generator(base_config, {}), tokenizer, conventions(folder))
    held_out = _held_out(config, reader)
    plain = Settings(mode="plain", max_new_tokens=_NEW_TOKENS)

    def exact(results: Sequence[Result]) -> list[bool]:
        return [
            tokenizer.decode(result.tokens, skip_special_tokens=True).strip() == sample.answer
            for sample, result in zip(held_out, results, strict=True)
        ]

    def answers(generator: Generator, settings: Settings) -> list[Result]:
        return generator.generate_many([sample.request for sample in held_out], settings, _ROWS)

    budgets = _budgets(base_config, twig_config)
    right: list[bool] = []  # what the frozen base answers right does not change

    def of_twig(params: Params) -> dict[str, float]:
        params = jax.tree.map(lambda x: x.astype(config.base_dtype), params)
        generator = Generator(base_config, base, twig_config, params, mesh=mesh)
        if not right:
            right.extend(exact(answers(generator, plain)))
        drafted = answers(generator, replace(plain, mode="ssd"))
        accepted = acceptance(drafted, [()] * len(drafted))
        figures = {"exact": float(np.mean(right)), "tokar": accepted.tokar}
        figures["mean_accepted"] = accepted.accepted
        if any(right):
            for budget in budgets:
                pruned = answers(generator, replace(plain, mode="ttp", avg_retained=budget))
                figures[f"relacc_{budget}"] = relacc(exact(pruned), right)[0]
        return figures

    def validate(step: int, params: Params) -> dict[str, float]:
        batches = open_batches(config, base_config, shard, validation=True)
        pairs = []
        for _, local in zip(range(_BATCHES), batches, strict=False):
            batch = {k: jax.make_array_from_process_local_data(rows, x) for k, x in local.items()}
            value, metrics = jax.device_get(loss(params, base, batch))
            pairs.append(
                {VALIDATION_LOSS: np.array([value * metrics["weight"], metrics["weight"]])}
            )
        batches.close()
        figures = summarise(pairs)
        if config.stage == "twig":
            own = of_twig(params)
        elif config.stage == "base":
            generator = Generator(base_config, params, mesh=mesh)
            own = {"exact": float(np.mean(exact(answers(generator, plain))))}
        else:
            own = {}  # the decoder does not answer yet
        return figures | {f"validation/{name}": value for name, value in own.items()}

    return validate


def _budgets(base: LlavaConfig, twig: TwigConfig) -> list[int]:
    """The three budgets as visual tokens a layer sees, without those that cannot be reached."""
    tokens, found = base.vision.num_tokens, []
    for share in BUDGETS:
        with contextlib.suppress(ValueError):
            retained(round(share * tokens), twig, base.text.num_layers, tokens)
            found.append(round(share * tokens))
    return found


def _held_out(config: TrainConfig, reader: Model) -> list[_HeldOut]:
    """The first held-out samples, each with its first question."""
    data, n = config.data, config.validation_samples
    if data.source is None:
        samples = tasks.load_samples(reader.tokenizer, reader.config, n, split="validation")
        return [_HeldOut(sample.request, sample.question.answer) for sample in samples]
    assert data.validation is not None
    source = open_source(data.validation, data.images)
    found: list[_HeldOut] = []
    for index in range(len(source)):
        if len(found) == n:
            break
        try:
            sample = source[index]
        except BadSample as error:
            _LOG.warning("left out: %s", error)
            continue
        question, answer = sample.turns[0]
        images: Any = sample.images[: question.count("<image>")]
        found.append(_HeldOut(reader.request(question, images), answer.strip()))
    return found
