"""How well a model in training answers what it was not trained on."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from twig_jax.config import LlavaConfig, TwigConfig
from twig_jax.decoding.generate import Generator
from twig_jax.decoding.settings import Request, Result, Settings
from twig_jax.evaluation.scoring import acceptance, relacc
from twig_jax.pruning.budget import retained

# Shares of the visual tokens that an average layer sees at the paper's three budgets.
BUDGETS = (1 / 3, 2 / 9, 1 / 9)

_ROWS = 32  # that answer at a time
_NEW_TOKENS = 64  # of an answer at most


@dataclass(frozen=True)
class HeldOut:
    """A question, and the answer that is known."""

    request: Request
    answer: str


class Validation:
    """Answers the same held-out questions again and again, as a model trains.

    What a twig's base answers by itself is remembered, since it does not change.
    """

    def __init__(self, tokenizer: Any, held_out: Sequence[HeldOut]) -> None:
        self._tokenizer, self._held_out = tokenizer, held_out
        self._plain = Settings(mode="plain", max_new_tokens=_NEW_TOKENS)
        self._right: list[bool] = []

    def __call__(self, generator: Generator) -> dict[str, float]:
        """Figures of a model.

        exact: the share of answers that are the known ones word for word. With a twig: tokar,
        drafted tokens that are accepted; mean_accepted, of an iteration; and relacc_R, what is
        left of the base's exact answers where an average layer sees R visual tokens. Those are left
        out where the base answers nothing right or the twig grows too high for R.
        """
        if generator.twig_config is None:
            return {"exact": float(np.mean(self._exact(generator, self._plain)))}
        if not self._right:
            self._right = self._exact(generator, self._plain)
        drafted = self._answers(generator, replace(self._plain, mode="ssd"))
        accepted = acceptance(drafted)
        figures = {
            "exact": float(np.mean(self._right)),
            "tokar": accepted.tokar,
            "mean_accepted": accepted.accepted,
        }
        if any(self._right):
            for budget in _budgets(generator.config, generator.twig_config):
                pruned = replace(self._plain, mode="ttp", avg_retained=budget)
                figures[f"relacc_{budget}"] = relacc(self._exact(generator, pruned), self._right)[0]
        return figures

    def _answers(self, generator: Generator, settings: Settings) -> list[Result]:
        return generator.generate_many([h.request for h in self._held_out], settings, _ROWS)

    def _exact(self, generator: Generator, settings: Settings) -> list[bool]:
        return [
            self._tokenizer.decode(result.tokens, skip_special_tokens=True).strip() == sample.answer
            for sample, result in zip(
                self._held_out, self._answers(generator, settings), strict=True
            )
        ]


def _budgets(base: LlavaConfig, twig: TwigConfig) -> list[int]:
    """The three budgets as visual tokens a layer sees, without those that cannot be reached."""
    tokens, found = base.vision.num_tokens, []
    for share in BUDGETS:
        with contextlib.suppress(ValueError):
            retained(round(share * tokens), twig, base.text.num_layers, tokens)
            found.append(round(share * tokens))
    return found
