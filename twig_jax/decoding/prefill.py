"""From a prompt to the first accepted tokens: trunk, twig, selection, drafts, and one deep pass."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from twig_jax.decoding.accept import accept, empty_trace
from twig_jax.decoding.cache import Cache, Caches, Limits, Prompt, State, grow
from twig_jax.decoding.draft import Committed, Drafts, draft, scratch
from twig_jax.decoding.network import Program, Weights
from twig_jax.pruning.select import select, take, text_indices


class Inputs(NamedTuple):
    """A batch of prompts, right-padded to P slots."""

    tokens: jax.Array  # int32 [B, P], any id in visual slots
    is_visual: jax.Array  # bool [B, P]
    lengths: jax.Array  # int32 [B]
    visual: jax.Array  # [B, I·M, d], visual embeddings in order
    retained: jax.Array  # int32 [B], R of each row
    scores: jax.Array  # float32 [B, P], what the selector "given" ranks
    selector: jax.Array  # int32 [], index into SELECTORS


class Signals(NamedTuple):
    """What selection saw and chose, for reports."""

    scores: jax.Array  # float32 [B, P]
    kept: jax.Array  # int32 [B, Q], prompt slots that went on, P where unused


SELECTORS = ("twig", "fastv", "given")


def prefill(
    program: Program, weights: Weights, inputs: Inputs, limits: Limits
) -> tuple[State, Signals, jax.Array]:
    """Runs prompt and first drafts: (state, signals, base logits at the last prompt token [B, V]).

    The first verification and the prompt share one pass through the deep layers. Its node 0 is the
    prompt's last token, so that this iteration is like all others.
    """
    p = program
    B, P = inputs.tokens.shape
    slots = jnp.arange(P)
    real = slots < inputs.lengths[:, None]
    positions = jnp.broadcast_to(slots, (B, P))
    end = inputs.lengths - 1
    causal = (slots <= slots[:, None]) & real[:, None]  # [B, P, P]

    with jax.named_scope("trunk"):
        x = p.base_apply(weights, "merge", inputs.tokens, inputs.is_visual, inputs.visual)
        x, trunk, fastv = _scored(
            p, weights, "base", p.K, x, positions, causal, real, end, score=p.prune
        )
    twig: Cache = ()
    scores = inputs.scores
    if p.runs_twig:
        with jax.named_scope("twig"):
            _, twig, own = _scored(
                p, weights, "twig", p.twig.T, x, positions, causal, real, end, score=p.prune
            )
    with jax.named_scope("select"):
        if p.prune:
            scores = jnp.stack([own, fastv, inputs.scores])[inputs.selector]
            kept = select(
                scores,
                inputs.is_visual,
                inputs.lengths,
                inputs.retained,
                p.text_slots,
                p.retained_slots,
            )
        else:
            kept = jnp.where(real, slots, P)
        text = text_indices(~take(~inputs.is_visual, kept), p.text_slots)
    prompt = Prompt(trunk=real, middle=kept < P, top=text < kept.shape[1], lengths=inputs.lengths)

    with jax.named_scope("draft"):
        dtype = x.dtype
        first = take(x, end[:, None])  # [B, 1, d]
        W = p.width
        drafts = Drafts(
            tokens=jnp.zeros((B, W), jnp.int32),
            probs=jnp.zeros((B, W - 1), jnp.float32),
            drafted=jnp.zeros((B,), jnp.int32),
            states=jnp.pad(first, ((0, 0), (0, W - 1), (0, 0))),
            trunk=jax.tree.map(
                lambda a: jnp.pad(take(a, end[:, None]), ((0, 0), (0, W - 1), (0, 0), (0, 0))),
                trunk,
            ),
            twig=scratch(p, p.twig.T if p.draft else 0, B, W + 1, dtype),
        )
        if p.draft:
            before = slots < end[:, None]  # the last token is node 0
            drafts = draft(
                p,
                weights,
                drafts,
                Committed(trunk, before, twig, before),
                first[:, 0],
                jnp.zeros((B,), bool),
                end,
                jnp.minimum(limits.gamma, limits.max_new - 1),
                limits,
            )

    with jax.named_scope("verify"):
        nodes = jnp.arange(W)
        node_positions = end[:, None] + nodes
        Q = kept.shape[1]
        y = x if not p.prune else take(x, kept)
        y = jnp.concatenate([y, drafts.states], axis=1)
        place = jnp.concatenate([kept, node_positions], axis=1)  # [B, Q + W]
        y, middle = p.layers(
            weights, p.K, p.K_f, y, place, _prompt_and_nodes(kept, kept < P, end, W)
        )
        top: Cache = ()
        if p.K_f < p.L:
            kept_text = jnp.where(text < Q, take(kept, text), P)
            y = jnp.concatenate([take(y[:, :Q], text), y[:, Q:]], axis=1)
            place = jnp.concatenate([kept_text, node_positions], axis=1)
            y, top = p.layers(
                weights, p.K_f, p.L, y, place, _prompt_and_nodes(kept_text, text < Q, end, W)
            )
        logits = p.base_apply(weights, "logits", y[:, -W:])  # [B, W, V]

    G = p.generated_slots
    state = State(
        caches=Caches(
            grow(trunk, G),
            grow(twig if p.draft else (), G),
            grow(_part(middle, slice(None, -W)), G),
            grow(_part(top, slice(None, -W)), G),
        ),
        prompt=prompt,
        n=jnp.zeros((B,), jnp.int32),
        pending=jnp.zeros((B,), jnp.int32),
        last=first[:, 0],
        tokens=jnp.zeros((B, p.max_new), jnp.int32),
        done=limits.max_new <= 0,
        iterations=jnp.zeros((B,), jnp.int32),
        trace=empty_trace(B, p.max_new, W),
    )
    nodes_of = slice(-W, None)
    state = accept(p, state, drafts, _part(middle, nodes_of), _part(top, nodes_of), logits, limits)
    return state, Signals(scores, kept), logits[:, 0]


def _scored(
    p: Program,
    weights: Weights,
    which: str,
    layers: int,
    x: jax.Array,
    positions: jax.Array,
    mask: jax.Array,
    real: jax.Array,
    end: jax.Array,
    *,
    score: bool,
) -> tuple[jax.Array, Cache, jax.Array]:
    """Layers 0 .. layers-1 of base or twig, and the last one's attention from token end[b].

    The score [B, P] is the mean over heads; zeros where there is no layer or none is wanted.
    """
    apply = p.base_apply if which == "base" else p.twig_apply
    if layers == 0:
        return x, (), jnp.zeros(real.shape, jnp.float32)
    x, lower = apply(weights, "run", x, positions, mask, first=0, last=layers - 1)
    row = take(x, end[:, None])  # [B, 1, d], the last layer's input
    x, upper = apply(weights, "run", x, positions, mask, first=layers - 1, last=layers)
    if not score:
        return x, lower + upper, jnp.zeros(real.shape, jnp.float32)
    attention = apply(
        weights, "attention_row", layers - 1, row, end[:, None], upper[0].k, real
    )  # [B, H, P]
    return x, lower + upper, attention.mean(1)


def _prompt_and_nodes(
    positions: jax.Array, valid: jax.Array, end: jax.Array, width: int
) -> jax.Array:
    """Mask bool [B, S + W, S + W] over prompt slots and the nodes that follow.

    keys:    prompt             node 0 .. W-1
    prompt   causal             -
    nodes    before the last    causal          (the last prompt token is node 0)
    """
    B, S = positions.shape
    among = (positions[:, None, :] <= positions[:, :, None]) & valid[:, None]
    before = valid & (positions < end[:, None])
    nodes = jnp.tril(jnp.ones((width, width), bool))
    return jnp.concatenate(
        [
            jnp.concatenate([among, jnp.zeros((B, S, width), bool)], axis=2),
            jnp.concatenate(
                [
                    jnp.broadcast_to(before[:, None], (B, width, S)),
                    jnp.broadcast_to(nodes, (B, width, width)),
                ],
                axis=2,
            ),
        ],
        axis=1,
    )


def _part(cache: Cache, part: slice) -> Cache:
    return jax.tree.map(lambda x: x[:, part], cache)
