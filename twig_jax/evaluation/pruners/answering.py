"""Answers with any pruner, by the engine that answers with the twig."""

import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from twig_jax.config import LlavaConfig, TwigConfig
from twig_jax.decoding.generate import Generator
from twig_jax.decoding.settings import OF_TWIG, Request, Result, Settings
from twig_jax.evaluation.pruners import PRUNERS
from twig_jax.evaluation.pruners.probe import Probe, Pruner
from twig_jax.models.llava import Params
from twig_jax.pruning.schedule import Ranked

_STEP = 32  # prompts are padded to multiples of it


class Rival:
    """A generator that prunes by one of `PRUNERS`.

    generator: the base with its twig, or with a twig's schedule. Raises ValueError for an unknown
    name.
    """

    def __init__(self, generator: Generator, name: str) -> None:
        if name not in PRUNERS:
            raise ValueError(f"no selector {name!r}; there are: {', '.join(PRUNERS)}")
        twig = generator.twig_config
        if twig is None:
            raise ValueError("pruners need a twig, or its schedule, to be compared with")
        self.name, self.pruner, self.twig = name, PRUNERS[name], twig
        self._with_twig = self.generator = generator
        self.schedule = self.pruner.schedule(generator.config.text.num_layers, twig)
        self._drafts = self.schedule.layers == (twig.K, twig.K_f)
        if self.pruner.selector not in OF_TWIG:
            self.generator = Generator(
                generator.config,
                generator.weights.base,
                schedule=self.schedule,
                mesh=generator.mesh,
                detokenize=generator.detokenize,
            )

    def answer(
        self,
        requests: Sequence[Request],
        settings: Settings,
        batch: int = 32,
        told: Callable[[int, Result], Any] = lambda *_: None,
    ) -> list[Result]:
        """As `Generator.generate_many`; the pruner looks at the prompts first.

        Raises ValueError for a mode that drafts where the pruner has not the twig's schedule.
        """
        settings = replace(settings, selector=self.pruner.selector)
        generator = self.engine(settings)
        found = self.ranked(requests, settings, batch)
        return generator.generate_many(found, settings, batch, told)

    def engine(self, settings: Settings) -> Generator:
        """What answers `ranked` requests in a mode; ValueError as for `answer`."""
        if settings.draft and settings.prune and not self._drafts:
            raise ValueError(f"{self.name} prunes at other layers than the twig; use mode ttp")
        return self._with_twig if settings.draft else self.generator

    def ranked(
        self, requests: Sequence[Request], settings: Settings, batch: int = 32
    ) -> list[Request]:
        """The requests with the pruner's scores, and merged embeddings where it has any."""
        found, kinds = list(requests), defaultdict(list)
        for i, request in enumerate(requests):
            own = replace(request.settings or settings, selector=self.pruner.selector)
            if request.settings is not None:
                found[i] = replace(request, settings=own)
            if self.pruner.rank is None or not settings.prune:
                continue
            if request.visual is not None:
                raise ValueError(f"request {i}: pruners look at pixels, not at embeddings")
            images = 0 if request.pixels is None else len(request.pixels)
            if images:
                kinds[images, self.budget(own, images)].append(i)
            else:
                found[i] = replace(found[i], scores=np.zeros(len(request.ids), np.float32))
        for (_, R), of in kinds.items():
            for first in range(0, len(of), batch):
                part = of[first : first + batch]
                filled = part + part[-1:] * (batch - len(part))
                scores, visual = self._look([requests[i] for i in filled], R)
                for row, i in enumerate(part):
                    full = np.zeros(len(requests[i].ids), np.float32)
                    full[requests[i].is_visual] = scores[row]
                    found[i] = replace(found[i], scores=full)
                    if visual is not None:
                        found[i] = replace(found[i], pixels=None, visual=visual[row])
        return found

    def budget(self, settings: Settings, images: int) -> int:
        """R of the first layers that see a choice; ValueError where none gives the average."""
        if settings.avg_retained is None:
            raise ValueError(f"mode {settings.mode} needs avg_retained")
        L, M = self.generator.config.text.num_layers, self.generator.config.vision.num_tokens
        return self.schedule.budget(settings.avg_retained, L, M, images)[0]

    def _look(self, requests: list[Request], R: int) -> tuple[Any, Any]:
        B = len(requests)
        longest = max(len(r.ids) for r in requests)
        P = -(-longest // _STEP) * _STEP
        tokens, is_visual = np.zeros((B, P), np.int32), np.zeros((B, P), bool)
        for b, request in enumerate(requests):
            tokens[b, : len(request.ids)] = request.ids
            is_visual[b, : len(request.ids)] = request.is_visual
        weights = self.generator.weights
        with self.generator.context():
            ranked = _rank(
                self.generator.config,
                self.schedule.layers[0],
                self.twig,
                self.pruner,
                R,
                weights.base,
                tokens,
                is_visual,
                np.array([len(r.ids) for r in requests], np.int32),
                np.stack([np.asarray(r.pixels) for r in requests]).astype(weights.dtype),
                np.array([_seed(r) for r in requests], np.uint32),
            )
        return jax.device_get(ranked)


def _seed(request: Request) -> int:
    return zlib.crc32(np.asarray(request.pixels).tobytes(), zlib.crc32(request.ids.tobytes()))


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _rank(
    config: LlavaConfig,
    K: int,
    twig: TwigConfig,
    pruner: Pruner,
    retained: int,
    base: Params,
    *prompt: jax.Array,
) -> Ranked:
    assert pruner.rank is not None
    return pruner.rank(Probe(config, K, twig, base, *prompt), retained)
