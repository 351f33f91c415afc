"""From requests to a batch: what is asked for is checked, gets a program, and is padded to it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from twig_jax.config import LlavaConfig, TwigConfig
from twig_jax.decoding.buckets import (
    TEXT_STEP,
    Bucket,
    check_memory,
    device_memory,
    fit,
    program_for,
)
from twig_jax.decoding.network import Program, Weights
from twig_jax.decoding.prefill import Inputs
from twig_jax.decoding.settings import OF_TWIG, Controls, Request, Settings, controls
from twig_jax.hardware import runs_triton
from twig_jax.programs import device_bytes
from twig_jax.pruning.schedule import Schedule


@dataclass(frozen=True)
class Prepared:
    """A batch as its program takes it; visual embeddings are still missing."""

    program: Program
    bucket: Bucket
    inputs: Inputs
    controls: Controls
    settings: list[Settings]


class Need(NamedTuple):
    """What one request takes: its images, text tokens and new tokens."""

    images: int
    text: int
    new: int


@dataclass(frozen=True)
class Batches:
    """Makes the batches of one model.

    All is as in `Generator`. has_tokenizer: whether answers can be read as text. mesh: what batches
    are spread over.
    """

    config: LlavaConfig
    weights: Weights
    twig_config: TwigConfig | None
    schedule: Schedule | None
    buckets: tuple[Bucket, ...]
    has_tokenizer: bool
    mesh: Mesh | None

    @cached_property
    def _weights_bytes(self) -> int:
        return device_bytes(self.weights)

    def prepare(
        self,
        requests: Sequence[Request],
        settings: Settings,
        *,
        bucket: Bucket | None = None,
        resumes: bool = False,
    ) -> Prepared:
        """The program and padded inputs of a batch; bucket, resumes: see `Generator.start`.

        Raises as `Generator.generate` does.
        """
        if not requests:
            raise ValueError("a batch needs at least one request")
        settings.check()
        needs = [self.need(i, r, settings) for i, r in enumerate(requests)]
        own = [
            replace(r.settings or settings, max_new_tokens=n.new)
            for r, n in zip(requests, needs, strict=True)
        ]
        images, texts, news = (max(column) for column in zip(*needs, strict=True))
        need = Bucket(len(requests), texts, images, news)
        chosen = fit(need, self.buckets) if bucket is None else fit(need, [bucket])
        budgets = [self._budget(s, n.images) for s, n in zip(own, needs, strict=True)]
        widest = replace(settings, gamma=max(settings.gamma, *(s.gamma for s in own)))
        device = jax.local_devices()[0]
        self.check(replace(own[0], gamma=widest.gamma))  # the call's may be that of no request
        program = program_for(
            chosen,
            widest,
            self.config,
            self.twig_config,
            schedule=self.schedule,
            retained=tuple(map(max, zip(*budgets, strict=True))),
            resumes=resumes,
            gpu=runs_triton(device),
        )
        own = [replace(s, gamma=min(s.gamma, program.tree.depth)) for s in own]
        limit = device_memory(device)
        itemsize = self.weights.cache_dtype.itemsize
        check_memory(program, chosen, self._weights_bytes, itemsize, limit, self.mesh)
        filled = own + [None] * (chosen.rows - len(own))
        return Prepared(
            program,
            chosen,
            self._inputs(requests, budgets, program, chosen.rows),
            controls(filled, self.config.eos_token_id),
            own,
        )

    def check(self, settings: Settings) -> None:
        """Raises ValueError for settings that this model has no answer to, whatever is asked."""
        settings.check()
        if (settings.prune or settings.draft) and self.schedule is None:
            raise ValueError(f"mode {settings.mode} needs a twig; load one, or use mode plain")
        asks = settings.prune and self._asks
        if self.weights.twig is None and (
            settings.draft or (asks and settings.selector in OF_TWIG)
        ):
            raise ValueError(
                f"mode {settings.mode} with selector {settings.selector!r} needs a twig; this is a "
                'schedule without one, for mode ttp by "fastv" or "given"'
            )
        if asks and settings.selector == "fastv" and self.schedule and not self.schedule.layers[0]:
            raise ValueError('selector "fastv" needs a layer before those that see fewer tokens')
        if settings.prune and settings.avg_retained is None:
            raise ValueError(f"mode {settings.mode} needs avg_retained")
        if not self.has_tokenizer and any(isinstance(s, str) for s in settings.stop):
            raise ValueError("stopping at texts needs a tokenizer; give sequences of token ids")

    @property
    def _asks(self) -> bool:
        """Whether what prunes is asked for by name."""
        return self.schedule is not None and self.schedule.rank is None

    def need(self, i: int, request: Request, call: Settings) -> Need:
        """What request i takes in a call of such settings; ValueError for a bad one."""
        settings = request.settings or call
        self.check(settings)
        if settings.shape != call.shape:
            raise ValueError(
                f"request {i}: one batch has one mode and one way of drafting: mode, adaptive, "
                f"children, expanded and nodes {call.shape} here, not {settings.shape}"
            )
        if len(request.ids) == 0 or len(request.ids) != len(request.is_visual):
            raise ValueError(f"request {i}: ids and is_visual must have one length above 0")
        M = self.config.vision.num_tokens
        V, d = self.config.text.vocab_size, self.config.text.hidden_size
        size = self.config.vision.image_size
        words = request.ids[~request.is_visual]
        if len(words) and not 0 <= words.min() <= words.max() < V:
            raise ValueError(f"request {i}: ids of words must be from 0 to {V - 1}")
        for name, x, shape in (
            ("pixels", request.pixels, (size, size, 3)),
            ("visual", request.visual, (d,)),
        ):
            if x is not None and x.shape[1:] != shape:
                raise ValueError(
                    f"request {i}: {name} must be of shape [.., {str(shape)[1:-1].rstrip(',')}], "
                    f"not {list(x.shape)}"
                )
        if request.scores is not None and len(request.scores) != len(request.ids):
            raise ValueError(
                f"request {i}: {len(request.scores)} scores for {len(request.ids)} tokens"
            )
        if request.pixels is not None and request.visual is not None:
            raise ValueError(f"request {i}: there are both pixels and visual; give one of the two")
        slots = int(request.is_visual.sum())
        asks = settings.prune and self._asks and slots > 0
        if asks and settings.selector == "given" and request.scores is None:
            raise ValueError(f'request {i}: selector "given" needs scores')
        new_slots = int(request.is_visual[request.before :].sum())
        given = sum(
            0 if x is None else f * len(x) for x, f in ((request.pixels, M), (request.visual, 1))
        )
        positions = self.config.text.max_positions
        room = positions - len(request.ids)
        if room < 1:
            raise ValueError(
                f"request {i}: a prompt of {len(request.ids)} tokens leaves no room for an answer "
                f"in the {positions} positions that the model knows"
            )
        if request.is_visual[-1]:
            raise ValueError(f"request {i}: the prompt's last token must be text")
        if new_slots != given:
            raise ValueError(
                f"request {i}: the prompt has {new_slots} image slots but its images give {given} "
                "visual tokens"
            )
        if settings.prune and slots % M:
            raise ValueError(f"request {i}: {slots} visual tokens are no whole images of {M}")
        images = -(-slots // M)
        self._budget(settings, images)
        return Need(images, len(request.ids) - slots, min(settings.max_new_tokens, room))

    def _budget(self, settings: Settings, images: int) -> tuple[int, ...]:
        """R of a row with so many images, in every segment of deep layers."""
        M = self.config.vision.num_tokens
        if not settings.prune:
            return (images * M,)
        assert self.schedule is not None and settings.avg_retained is not None
        L = self.config.text.num_layers
        return self.schedule.budget(settings.avg_retained, L, M, images)

    def _inputs(
        self,
        requests: Sequence[Request],
        budgets: Sequence[tuple[int, ...]],
        program: Program,
        rows: int,
    ) -> Inputs:
        """The requests, padded; further rows are prompts of one token, done from the start."""
        B, slots, segments = rows, program.prompt_slots, len(program.segments)
        S = slots
        if any(r.before for r in requests):
            # Only what is new runs, rounded up as other shapes are.
            new = max(len(r.ids) - r.before for r in requests)
            S = min(slots, -(-new // TEXT_STEP) * TEXT_STEP)
        tokens: Any = np.zeros((B, S), np.int32)
        is_visual: Any = np.zeros((B, S), bool)
        scores: Any = np.zeros((B, slots), np.float32)
        lengths: Any = np.ones(B, np.int32)
        kept: Any = np.zeros((B, segments), np.int32)
        for b, request in enumerate(requests):
            new = len(request.ids) - request.before
            tokens[b, :new] = request.ids[request.before :]
            is_visual[b, :new] = request.is_visual[request.before :]
            lengths[b], kept[b] = new, budgets[b][:segments]
            if request.scores is not None:
                scores[b, : len(request.scores)] = request.scores
        visual: Any = np.zeros((B, 0, self.config.text.hidden_size), self.weights.dtype)
        return Inputs(tokens, is_visual, lengths, visual, kept, scores)
