"""From a prompt to the first accepted tokens: trunk, twig, selection, drafts, and one deep pass.

A prompt may continue an earlier conversation, whose caches then are its beginning (`Past`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from twig_jax.decoding.accept import accept, empty_trace
from twig_jax.decoding.adaptive import opening
from twig_jax.decoding.cache import (
    Cache,
    Caches,
    Prompt,
    State,
    commit,
    grow,
    pick,
    sees,
    slots_of,
    spread_rows,
)
from twig_jax.decoding.draft import Committed, Drafts, draft, scratch
from twig_jax.decoding.network import Program, Weights
from twig_jax.decoding.sampling import choose, seen_before
from twig_jax.decoding.settings import Controls
from twig_jax.pruning.select import select, take, text_indices
from twig_jax.sharding.placement import spread


class Inputs(NamedTuple):
    """A batch of prompts, right-padded to S slots: P, or fewer where they continue a past."""

    tokens: jax.Array  # int32 [B, S], any id in visual slots
    is_visual: jax.Array  # bool [B, S]
    lengths: jax.Array  # int32 [B]
    visual: jax.Array  # [B, I·M, d], visual embeddings in order
    retained: jax.Array  # int32 [B], R of each row
    scores: jax.Array  # float32 [B, P], what the selector "given" ranks


class Past(NamedTuple):
    """What came before the prompt, in the slots of the new program.

    The deep layers' caches are there where the first choice of visual tokens is kept, else empty:
    then the deep layers run again over all text and the tokens chosen now.
    """

    caches: Caches
    states: jax.Array  # [B, P, d], layer-K states
    context: jax.Array  # int32 [B, P]
    is_visual: jax.Array  # bool [B, P]
    lengths: jax.Array  # int32 [B]
    middle: jax.Array  # int32 [B], tokens in the middle layers' caches
    top: jax.Array  # int32 [B], in the top layers'


class Signals(NamedTuple):
    """What selection saw and chose, and what another turn needs."""

    scores: jax.Array  # float32 [B, P]
    kept: jax.Array  # int32 [B, Q], prompt slots that went on, P where unused
    logits: jax.Array  # float32 [B, V], the base's at the last prompt token
    states: jax.Array  # [B, P, d], layer-K states
    is_visual: jax.Array  # bool [B, P]


def prefill(
    program: Program,
    weights: Weights,
    inputs: Inputs,
    controls: Controls,
    cost: jax.Array,
    past: Past | None = None,
) -> tuple[State, Signals]:
    """Runs prompt and first drafts. cost float32 [W]: see adaptive.py.

    The first verification and the prompt share one pass through the deep layers. Its node 0 is the
    prompt's last token, so that this iteration is like all others.
    """
    p = program
    V = p.base.text.vocab_size
    B, S = inputs.tokens.shape
    P = p.prompt_slots
    slots = jnp.arange(P)
    before = jnp.zeros((B,), jnp.int32) if past is None else past.lengths
    new = jnp.arange(S) < inputs.lengths[:, None]  # bool [B, S]
    at = before[:, None] + jnp.arange(S)  # positions of the new tokens, which are their slots
    lengths = before + inputs.lengths
    end = lengths - 1
    real = slots < lengths[:, None]
    causal = jnp.tril(jnp.ones((S, S), bool)) & new[:, None]  # [B, S, S]
    rows = jnp.arange(B)[:, None]
    there = Caches((), (), (), ()) if past is None else past.caches

    def joined(earlier: jax.Array, x: jax.Array) -> jax.Array:
        """x [B, S, ...] in its slots after what was there earlier, [B, P, ...]."""
        return earlier.at[rows, jnp.where(new, at, P)].set(x, mode="drop")

    def run(
        which: str, layers: int, x: jax.Array, earlier: Cache
    ) -> tuple[jax.Array, Cache, jax.Array]:
        """The first layers of base or twig over the new tokens: (states, all caches, scores).

        The scores [B, P] are the last layer's attention from the last token, the mean over heads;
        zeros where there is no layer or none is wanted.
        """
        apply = p.base_apply if which == "base" else p.twig_apply
        nothing = jnp.zeros(real.shape, jnp.float32)
        if layers == 0:
            return x, (), nothing
        caches: Cache = ()
        for first, last in ((0, layers - 1), (layers - 1, layers)):
            row = take(x, (inputs.lengths - 1)[:, None])  # [B, 1, d]
            seen = None if past is None else sees(slots < before[:, None], before * 0, P, S)
            x, kvs = apply(
                weights,
                "run",
                x,
                at,
                causal,
                first=first,
                last=last,
                cached=None if past is None else earlier[first:last],
                cached_mask=seen,
            )
            if past is not None:
                kvs = commit(earlier[first:last], kvs, jnp.where(new, at, P))
            caches += kvs
        if not p.prune:
            return x, caches, nothing
        row = apply(weights, "attention_row", layers - 1, row, end[:, None], caches[-1].k, real)
        return x, caches, row.mean(1)

    with jax.named_scope("trunk"):
        x = p.base_apply(weights, "merge", inputs.tokens, inputs.is_visual, inputs.visual)
        x, trunk, fastv = run("base", p.K, spread(x, "rows"), there.trunk)
    context = jnp.where(new & ~inputs.is_visual, inputs.tokens, V)
    is_visual, states = inputs.is_visual & new, x
    if past is not None:
        context = joined(past.context, context)
        is_visual, states = joined(past.is_visual, is_visual), joined(past.states, x)
    twig: Cache = ()
    own = inputs.scores
    if p.runs_twig:
        with jax.named_scope("twig"):
            _, twig, own = run("twig", p.twig.T, x, there.twig)
    appends = len(there.middle) > 0
    with jax.named_scope("select"):
        scores = jnp.stack([own, fastv, inputs.scores])[controls.selector, jnp.arange(B)]
        # `kept` are the slots, and positions, that the deep layers run over.
        if appends:
            kept = jnp.where(new, at, P)
        elif p.prune:
            kept = select(
                scores, is_visual, lengths, inputs.retained, p.text_slots, p.retained_slots
            )
        else:
            kept = jnp.where(real, slots, P)
        text_slots = min(p.text_slots, kept.shape[1])
        text = text_indices(~take(~is_visual, kept), text_slots)

    with jax.named_scope("draft"):
        dtype = x.dtype
        first = take(states, end[:, None])  # [B, 1, d]
        W = p.width
        drafts = Drafts(
            tokens=jnp.zeros((B, W), jnp.int32),
            probs=jnp.zeros((B, W - 1), jnp.float32),
            drafted=jnp.zeros((B,), jnp.int32),
            states=jnp.pad(first, ((0, 0), (0, W - 1), (0, 0))),
            trunk=grow(pick(trunk, end[:, None]), W - 1),
            twig=scratch(p, p.twig.T if p.keeps_twig else 0, B, W + 1, dtype),
        )
        n = jnp.zeros((B,), jnp.int32)
        seen = seen_before(controls, context, jnp.zeros((B, 0), jnp.int32), n, V)
        if p.draft:
            earlier = slots < end[:, None]  # the last token is node 0
            drafts = draft(
                p,
                weights,
                drafts,
                Committed(trunk, earlier, twig, earlier),
                first[:, 0],
                jnp.zeros((B,), bool),
                n,
                end,
                jnp.minimum(controls.gamma, controls.max_new - 1),
                controls,
                seen,
            )

    def deep(
        layers: tuple[int, int], y: jax.Array, place: jax.Array, cache: Cache, used: jax.Array
    ) -> tuple[jax.Array, Cache, jax.Array, Cache]:
        """A range of layers over prompt tokens at `place` and the nodes, y [B, S + W, d].

        With `cache`, whose first used[b] slots are read, they are written behind those. Returns
        states, prompt cache, which of its slots hold a token, and the nodes' keys and values.
        """
        valid = place < P
        slots = jnp.arange(slots_of(cache) if cache else place.shape[1])
        y, kvs = p.layers(
            weights,
            *layers,
            y,
            jnp.concatenate([place, end[:, None] + jnp.arange(W)], axis=1),
            _prompt_and_nodes(place, valid, end, W),
            cached=cache or None,
            cached_mask=sees(slots < used[:, None], n, len(slots), y.shape[1]) if cache else None,
        )
        prompt, nodes = _part(kvs, slice(None, -W)), _part(kvs, slice(-W, None))
        if not cache:
            return y, prompt, valid, nodes
        to = jnp.where(valid, used[:, None] + jnp.arange(place.shape[1]), len(slots))
        in_use = slots < (used + valid.sum(1, dtype=jnp.int32))[:, None]
        return y, commit(cache, prompt, to), in_use, nodes

    with jax.named_scope("verify"):
        Q = kept.shape[1]
        y = jnp.concatenate([take(states, kept), drafts.states], axis=1)
        y, middle, in_middle, new_middle = deep(
            (p.K, p.K_f), y, kept, there.middle, n if past is None else past.middle
        )
        kept_text = jnp.where(text < Q, take(kept, text), P)
        top: Cache = ()
        new_top: Cache = ()
        in_top = kept_text < P
        if p.K_f < p.L:
            y = jnp.concatenate([take(y[:, :Q], text), y[:, Q:]], axis=1)
            y, top, in_top, new_top = deep(
                (p.K_f, p.L), y, kept_text, there.top, n if past is None else past.top
            )
        logits = p.base_apply(weights, "logits", y[:, -W:])  # [B, W, V]
        node = jnp.arange(W)
        path = jnp.where((node > 0) & (node <= node[:, None]), drafts.tokens[:, None], -1)
        places = end[:, None] + node + 1
        choice = choose(controls, logits, jnp.broadcast_to(node, (B, W)), places, seen, path)

    G = p.generated_slots
    state = State(
        caches=Caches(
            grow(trunk, G), grow(twig if p.keeps_twig else (), G), grow(middle, G), grow(top, G)
        ),
        prompt=Prompt(trunk=real, middle=in_middle, top=in_top, lengths=lengths),
        controls=controls,
        context=context,
        states=jnp.zeros((B, G, states.shape[-1]), dtype),
        n=n,
        pending=n,
        in_twig=n,
        balance=opening(B, cost),
        tokens=jnp.zeros((B, p.max_new), jnp.int32),
        done=controls.max_new <= 0,
        iterations=n,
        trace=empty_trace(B, p.max_new, W),
    )
    state = accept(p, spread_rows(state), drafts, new_middle, new_top, choice, cost)
    return state, Signals(scores, kept, logits[:, 0], states, is_visual)


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
    return jax.tree.map(lambda x: x[:, :, part], cache)
