"""A conversation of several turns, whose earlier turns are not computed again.

Between turns the trunk's and the twig's keys and values stay, and the layer-K states of all tokens.
A new question runs through trunk and twig alone; then the visual tokens are chosen anew, for this
question, and the deep layers run over all text and what was chosen.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from twig_jax.decoding.cache import Cache, Caches, State, pick
from twig_jax.decoding.draft import catch_up
from twig_jax.decoding.generate import Generator
from twig_jax.decoding.network import Program, Weights
from twig_jax.decoding.prefill import Past, Signals
from twig_jax.decoding.running import Running
from twig_jax.decoding.settings import Request, Result, Settings
from twig_jax.pruning.select import take


class Session:
    """One conversation. `ids` int32 [S] and `is_visual` bool [S] are all of its tokens so far.

    The answers are those of decoding the whole conversation's ids from the beginning. With
    reprune=False the first question's choice of visual tokens is kept for all later ones, and
    nothing is computed twice. Raises ValueError for a schedule that ranks by itself.
    """

    def __init__(self, generator: Generator, settings: Settings, *, reprune: bool = True) -> None:
        settings.check()
        schedule = generator.schedule
        if settings.prune and schedule is not None and schedule.rank is not None:
            raise ValueError("ranking within the decoder cannot be asked again: use generate")
        self.generator = generator
        self.settings = settings
        self.reprune = reprune
        self.ids = np.zeros(0, np.int32)
        self.is_visual = np.zeros(0, bool)
        self._running: Running | None = None
        self._cached = 0  # tokens whose keys and values are kept
        self._kept = np.zeros(0, np.int32)
        self._retained = settings.avg_retained  # of the last turn

    def ask(
        self,
        ids: np.ndarray,
        is_visual: np.ndarray,
        pixels: np.ndarray | None = None,
        settings: Settings | None = None,
        watch: Callable[[Running], Any] | None = None,
    ) -> Result:
        """Answers the next tokens int32 [S], with image slots bool [S] and the images that are new.

        settings: for this turn, in the session's mode. watch: as in `Generator.generate`. Raises as
        `Generator.generate` does, and ValueError for another mode and for new images where reprune
        is off.
        """
        own = settings or self.settings
        if own.mode != self.settings.mode:
            raise ValueError(f"a session keeps its mode, {self.settings.mode}, not {own.mode}")
        if own.draft != self.settings.draft and not own.prune:
            raise ValueError("a session drafts in all turns or in none, but gamma is 0 in one")
        keeps = own.prune and not self.reprune and self._running is not None
        if keeps and is_visual.any():
            raise ValueError("new images need a new choice of visual tokens: leave reprune on")
        if keeps:  # the number of visual tokens, as their choice
            own = replace(own, avg_retained=self._retained)
        request = Request(
            np.concatenate([self.ids, ids]).astype(np.int32),
            np.concatenate([self.is_visual, is_visual]),
            pixels=pixels,
            settings=own,
            before=self._cached,
        )
        earlier = self._running
        running = self.generator.start(
            [request],
            own,
            resumes=True,
            past=None if earlier is None else lambda program: self._past(earlier, program),
        )
        (result,) = self.generator.finish(running, watch)
        if own.prune and self.reprune:  # the next turn chooses anew, and runs these layers again
            caches = running.state.caches._replace(deep=())
            running.state = running.state._replace(caches=caches)
        appended = earlier is not None and (keeps or not own.prune)
        kept = np.concatenate([self._kept, result.kept]) if appended else result.kept
        emitted = result.tokens
        if result.stopped_by == "eos":
            emitted = np.append(emitted, np.int32(self.generator.config.eos_token_id))
        # The last token emitted is pending: its keys and values come with the next turn.
        self._running, self._kept, self._retained = running, kept, own.avg_retained
        self._cached = len(request.ids) + max(len(emitted) - 1, 0)
        self.ids = np.concatenate([request.ids, emitted])
        self.is_visual = np.concatenate([request.is_visual, np.zeros(len(emitted), bool)])
        return replace(result, kept=kept)

    def _past(self, earlier: Running, program: Program) -> Past:
        row = earlier.rows[0]
        assert row is not None
        with self.generator.context():
            return _repack(
                earlier.program,
                program,
                program.prune and self.reprune,
                self.generator.weights,
                earlier.state,
                row.signals,
                np.array([self._cached], np.int32),
            )


def repack(
    old: Program,
    new: Program,
    reprune: bool,
    weights: Weights,
    state: State,
    signals: Signals,
    lengths: jax.Array,
) -> Past:
    """The first lengths[b] tokens of prompt and answer, as the beginning of a longer prompt.

    signals: of the prompt; lengths int32 [B].
    """
    asked = state.prompt.lengths
    answered = jnp.where(state.controls.max_new > 0, lengths - asked, 0)  # not of free rows
    if old.keeps_twig:
        if weights.int8 is not None:
            # What is kept next must not depend on it: the answer runs through the exact twig.
            state = state._replace(in_twig=jnp.zeros_like(state.in_twig))
        state = catch_up(old, weights._replace(int8=None), state, answered)

    def joined(slots: int, first: jax.Array, generated: int, size: int) -> jax.Array:
        """Where in (slots, generated slots) the tokens are, int32 [B, size]; past it for none."""
        to = jnp.arange(size)
        from_answer = slots + to - first[:, None]
        index = jnp.where(to < first[:, None], to, from_answer)
        return jnp.where(to < (first + answered)[:, None], index, slots + generated)

    P, G = old.prompt_slots, old.generated_slots
    index = joined(P, asked, G, new.prompt_slots)

    def of_prompt(prompt: jax.Array, answer: jax.Array) -> jax.Array:
        pad = ((0, 0), (0, G - answer.shape[1])) + ((0, 0),) * (answer.ndim - 2)
        return take(jnp.concatenate([prompt, jnp.pad(answer, pad)], axis=1), index)

    in_deep = [mask.sum(1, dtype=jnp.int32) for mask in state.prompt.deep]
    deep: tuple[Cache, ...] = ()
    if not reprune:
        deep = tuple(
            pick(cache, joined(mask.shape[1], held, G, new.text_slots + segment.slots))
            for cache, mask, held, segment in zip(
                state.caches.deep, state.prompt.deep, in_deep, new.segments, strict=True
            )
        )
    nothing = jnp.int32(new.base.text.vocab_size)
    return Past(
        caches=Caches(pick(state.caches.trunk, index), pick(state.caches.twig, index), deep),
        states=of_prompt(signals.states, state.states),
        gates=of_prompt(signals.gates, signals.gates[:, :0]),
        context=jnp.where(index < P + G, of_prompt(state.context, state.tokens), nothing),
        is_visual=of_prompt(signals.is_visual, jnp.zeros_like(state.tokens, bool)),
        lengths=lengths,
        deep=tuple(held + answered for held in in_deep),
    )


_repack = jax.jit(repack, static_argnums=(0, 1, 2))
