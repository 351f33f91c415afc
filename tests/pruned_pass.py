"""The pruned model on a known answer, in one pass: what decoding computes step by step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from twig_jax.config import LlavaConfig, TwigConfig
from twig_jax.models.llava import Llava, Params
from twig_jax.models.twig import twig_decoder
from twig_jax.pruning.select import first_of, select, take


class Prompt(NamedTuple):
    """A batch of right-padded prompts with their visual embeddings."""

    tokens: jax.Array  # int32 [B, P]
    is_visual: jax.Array  # bool [B, P]
    lengths: jax.Array  # int32 [B]
    visual: jax.Array  # [B, I·M, d]


class Forced(NamedTuple):
    """Results of `forward`. Token j of the answer is predicted by logits[:, j]."""

    logits: jax.Array  # float32 [B, A + 1, V]
    scores: jax.Array  # float32 [B, P], what the twig ranks by
    kept: jax.Array  # int32 [B, Q], prompt slots seen by layers K .. K_f - 1, P where unused
    states_K: jax.Array  # [B, P, d], residual stream after layer K - 1
    states_K_f: jax.Array  # [B, N, d], the prompt's residual stream into layer K_f


def forward(
    config: LlavaConfig,
    twig_config: TwigConfig,
    base: Params,
    twig: Params,
    prompt: Prompt,
    answers: jax.Array,
    retained: jax.Array,
    text_slots: int,
    retained_slots: int,
    scores: jax.Array | None = None,
) -> Forced:
    """Teacher-forced logits of the base pruned by its twig (paper, section 3.3).

    answers int32 [B, A]; retained int32 [B] (R of each row, at most `retained_slots`); `scores`
    float32 [B, P] replaces the twig's.
    """
    model, decoder = Llava(config), twig_decoder(config.text, twig_config)
    K, K_f = twig_config.K, twig_config.K_f
    B, P = prompt.tokens.shape
    A = answers.shape[1]
    variables = {"params": base}
    slots = jnp.arange(P)
    real = slots < prompt.lengths[:, None]
    end = (prompt.lengths - 1)[:, None]
    after = prompt.lengths[:, None] + jnp.arange(A)  # positions of the answer

    def causal(positions: jax.Array, valid: jax.Array) -> jax.Array:
        return (positions[:, None, :] <= positions[:, :, None]) & valid[:, None, :]

    def joined(prompt_part: jax.Array, answer_part: jax.Array) -> jax.Array:
        return jnp.concatenate([prompt_part, answer_part], axis=1)

    x = model.apply(variables, prompt.tokens, prompt.is_visual, prompt.visual, method="merge")
    words = model.apply(variables, answers, method="embed")
    everywhere = jnp.ones((B, A), bool)
    at = joined(jnp.broadcast_to(slots, (B, P)), after)
    mask = causal(at, joined(real, everywhere))
    x, _ = model.apply(variables, joined(x, words), at, mask, 0, K, method="run")
    states_K = x[:, :P]

    if scores is None:
        run = {"params": twig}
        lower = (states_K, at[:, :P], mask[:, :P, :P])
        y, _ = decoder.apply(run, *lower, 0, twig_config.T - 1, method="run")
        _, (kv,) = decoder.apply(run, y, *lower[1:], twig_config.T - 1, method="run")
        asked = (take(y, end), end, kv.k)
        if twig_config.p_head:
            gates = decoder.apply(run, y, method="key_gates")
            found = decoder.apply(
                run, *asked, gates, prompt.is_visual[:, None], method="visual_scores"
            )
        else:
            found = decoder.apply(
                run, twig_config.T - 1, *asked, real[:, None], method="attention_rows"
            ).mean(1)
        scores = found[:, 0]
    kept = select(scores, prompt.is_visual, prompt.lengths, retained, text_slots, retained_slots)
    Q = kept.shape[1]
    at = joined(kept, after)
    x = joined(take(states_K, kept), x[:, P:])
    x, _ = model.apply(
        variables, x, at, causal(at, joined(kept < P, everywhere)), K, K_f, method="run"
    )
    text = first_of(take(~prompt.is_visual, kept), text_slots)
    at = joined(jnp.where(text < Q, take(kept, text), P), after)
    x = joined(take(x[:, :Q], text), x[:, Q:])
    states_K_f = x[:, :text_slots]
    valid = joined(text < Q, everywhere)
    x, _ = model.apply(variables, x, at, causal(at, valid), K_f, method="run")
    last = valid[:, :text_slots].sum(1, dtype=jnp.int32)[:, None] - 1
    logits = model.apply(variables, joined(take(x, last), x[:, text_slots:]), method="logits")
    return Forced(logits, scores, kept, states_K, states_K_f)
