"""From a prompt to the first accepted tokens: trunk, twig, selection, drafts, and one deep pass.

A prompt may continue an earlier conversation, whose caches then are its beginning (`Past`).
"""

from collections.abc import Callable
from functools import partial
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
from twig_jax.decoding.draft import Committed, draft, undrafted
from twig_jax.decoding.network import Program, Segment, Weights
from twig_jax.decoding.sampling import choose, seen_before
from twig_jax.decoding.settings import Controls
from twig_jax.pruning.schedule import View
from twig_jax.pruning.select import first_of, select, take
from twig_jax.sharding.placement import spread


class Inputs(NamedTuple):
    """A batch of prompts, right-padded to S slots: P, or fewer where they continue a past."""

    tokens: jax.Array  # int32 [B, S], any id in visual slots
    is_visual: jax.Array  # bool [B, S]
    lengths: jax.Array  # int32 [B]
    visual: jax.Array  # [B, I·M, d], visual embeddings in order
    retained: jax.Array  # int32 [B, segments], R of each row
    scores: jax.Array  # float32 [B, P], what the selector "given" ranks


class Past(NamedTuple):
    """What came before the prompt, in the slots of the new program.

    The deep layers' caches are there where the first choice of visual tokens is kept, else empty:
    then the deep layers run again over all text and the tokens chosen now.
    """

    caches: Caches
    states: jax.Array  # [B, P, d], layer-K states
    gates: jax.Array  # [B, P, K, D], the P-Head's for keys; [B, P, 0] without one
    context: jax.Array  # int32 [B, P]
    is_visual: jax.Array  # bool [B, P]
    lengths: jax.Array  # int32 [B]
    deep: tuple[jax.Array, ...]  # int32 [B], tokens in the deep segments' caches


class Signals(NamedTuple):
    """What selection saw and chose, and what another turn needs."""

    scores: jax.Array  # float32 [B, P]
    kept: jax.Array  # int32 [B, Q], prompt slots that the first segment saw, P where unused
    logits: jax.Array  # float32 [B, V], the base's at the last prompt token
    states: jax.Array  # [B, P, d], layer-K states
    gates: jax.Array  # [B, P, K, D], the P-Head's for keys; [B, P, 0] without one
    is_visual: jax.Array  # bool [B, P]


def prefill(
    program: Program,
    weights: Weights,
    inputs: Inputs,
    controls: Controls,
    cost: jax.Array,
    past: Past | None = None,
) -> tuple[State, Signals]:
    """Runs prompt and first drafts. cost float32 [D + 1]: see adaptive.py.

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
    there = Caches((), (), ()) if past is None else past.caches

    def joined(earlier: jax.Array, x: jax.Array) -> jax.Array:
        """x [B, S, ...] in its slots after what was there earlier, [B, P, ...]."""
        return earlier.at[rows, jnp.where(new, at, P)].set(x, mode="drop")

    def run(
        which: str, layers: int, x: jax.Array, earlier: Cache
    ) -> tuple[jax.Array, Cache, jax.Array, jax.Array]:
        """The first layers of base or twig over the new tokens.

        Returns states, all caches, scores, and what the last layer read. The scores [B, P] are that
        layer's attention from the last token, the mean over heads; zeros where there is no layer or
        none is wanted.
        """
        apply = p.base_apply if which == "base" else p.twig_apply
        nothing = jnp.zeros(real.shape, jnp.float32)
        if layers == 0:
            return x, (), nothing, x
        caches: Cache = ()
        for first, last in ((0, layers - 1), (layers - 1, layers)):
            read = x
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
            return x, caches, nothing, read
        row = take(read, (inputs.lengths - 1)[:, None])  # [B, 1, d]
        asked = (layers - 1, row, end[:, None], caches[-1].k, real[:, None])
        return x, caches, apply(weights, "attention_rows", *asked).mean(1)[:, 0], read

    with jax.named_scope("trunk"):
        embedded = p.base_apply(weights, "merge", inputs.tokens, inputs.is_visual, inputs.visual)
        x, trunk, fastv, read = run("base", p.K, spread(embedded, "rows"), there.trunk)
    context = jnp.where(new & ~inputs.is_visual, inputs.tokens, V)
    is_visual, states = inputs.is_visual & new, x
    if past is not None:
        context = joined(past.context, context)
        is_visual, states = joined(past.is_visual, is_visual), joined(past.states, x)
    twig: Cache = ()
    own = attended = inputs.scores
    gates = jnp.zeros((B, P, 0), x.dtype)
    if p.runs_twig:
        with jax.named_scope("twig"):
            _, twig, own, into = run("twig", p.twig.T, x, there.twig)
            attended = own
            if p.twig.p_head and p.prune:
                gates = p.twig_apply(weights, "key_gates", into)
                gates = gates if past is None else joined(past.gates, gates)
                last = take(into, (inputs.lengths - 1)[:, None]), end[:, None]
                asked = (*last, twig[-1].k, gates, is_visual[:, None])
                own = p.twig_apply(weights, "visual_scores", *asked)[:, 0]

    with jax.named_scope("draft"):
        dtype = x.dtype
        first = take(states, end[:, None])  # [B, 1, d]
        W = p.width
        n = jnp.zeros((B,), jnp.int32)
        drafts = undrafted(p, n, first, grow(pick(trunk, end[:, None]), p.tree.size - 1))
        seen = partial(seen_before, context, jnp.zeros((B, 0), jnp.int32), n, V)
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

    def through(
        segment: Segment, y: jax.Array, place: jax.Array, cache: Cache, used: jax.Array
    ) -> tuple[jax.Array, jax.Array, Cache, jax.Array, Cache]:
        """Deep layers over prompt tokens at `place` and the nodes, y [B, S + W, d].

        With `cache`, whose first used[b] slots are read, they are written behind those. Returns
        states, what the last layer read, prompt cache, which of its slots hold a token, and the
        nodes' keys and values.
        """
        valid = place < P
        size = jnp.arange(slots_of(cache) if cache else place.shape[1])
        positions = jnp.concatenate([place, end[:, None] + drafts.depth], axis=1)
        mask = _prompt_and_nodes(place, valid, end, drafts.sees)
        seen = sees(size < used[:, None], n, len(size), y.shape[1]) if cache else None
        kvs: Cache = ()
        for first, last in ((segment.first, segment.last - 1), (segment.last - 1, segment.last)):
            read = y
            part = cache[first - segment.first : last - segment.first] if cache else None
            y, kv = p.layers(
                weights, first, last, y, positions, mask, cached=part, cached_mask=seen
            )
            kvs += kv
        prompt, nodes = _part(kvs, slice(None, -W)), _part(kvs, slice(-W, None))
        if not cache:
            return y, read, prompt, valid, nodes
        to = jnp.where(valid, used[:, None] + jnp.arange(place.shape[1]), len(size))
        in_use = size < (used + valid.sum(1, dtype=jnp.int32))[:, None]
        return y, read, commit(cache, prompt, to), in_use, nodes

    appends = len(there.deep) > 0
    y, nodes, cache = states, drafts.states, trunk
    place = jnp.where(real, slots, P)  # prompt slots, and positions, of y
    scores = jnp.stack([own, attended, fastv, inputs.scores])[controls.selector, jnp.arange(B)]
    ranked, kept, deep, in_deep, new_deep = [], [], [], [], []
    for i, segment in enumerate(p.segments):
        with jax.named_scope("select"):
            R = inputs.retained[:, i]
            if p.rank is not None:
                text = first_of(~take(is_visual, place) & (place < P), p.text_slots)
                attention = _attention(p, weights, segment.first - 1, read, place, cache[-1].k)
                scores, replaced = p.rank(View(y, place, is_visual, embedded, R, text, attention))
                y = y if replaced is None else replaced
            if appends and i == 0:
                go = jnp.where(new, at, P)
            elif p.prune:
                held = (place < P).sum(1, dtype=jnp.int32)
                go = select(scores, take(is_visual, place), held, R, p.text_slots, segment.slots)
            else:
                go = place
            ranked.append(scores)
            scores, place = take(scores, go), jnp.where(go < y.shape[1], take(place, go), P)
            kept.append(place)
        with jax.named_scope("verify"):
            y, read, cache, in_use, new_nodes = through(
                segment,
                jnp.concatenate([take(y, go), nodes], axis=1),
                place,
                there.deep[i] if appends else (),
                n if past is None else past.deep[i],
            )
            y, nodes = y[:, :-W], y[:, -W:]
            deep.append(cache)
            in_deep.append(in_use)
            new_deep.append(new_nodes)
    with jax.named_scope("verify"):
        logits = p.base_apply(weights, "logits", nodes)  # [B, W, V]
        path = jnp.where(drafts.sees, drafts.tokens[:, None], -1).at[:, :, 0].set(-1)
        places = end[:, None] + drafts.depth + 1
        choice = choose(controls, logits, drafts.depth, places, seen, path)

    G = p.generated_slots
    caches = Caches(trunk, twig if p.keeps_twig else (), tuple(deep))
    caches = jax.tree.map(lambda x: x.astype(weights.cache_dtype), caches)
    state = State(
        caches=grow(caches, G),
        prompt=Prompt(trunk=real, deep=tuple(in_deep), lengths=lengths),
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
    if not p.draft:  # node 0, the prompt's last token, is there already
        drafts, new_deep = drafts._replace(trunk=()), [()] * len(new_deep)
    state = accept(p, spread_rows(state), drafts, tuple(new_deep), choice, cost)
    return state, Signals(ranked[0], kept[0], logits[:, 0], states, gates, is_visual)


def _prompt_and_nodes(
    positions: jax.Array, valid: jax.Array, end: jax.Array, nodes: jax.Array
) -> jax.Array:
    """Mask bool [B, S + W, S + W] over prompt slots and the nodes that follow.

    keys:    prompt             node 0 .. W-1
    prompt   causal             -
    nodes    before the last    nodes [B, W, W]     (the last prompt token is node 0)
    """
    (B, S), width = positions.shape, nodes.shape[1]
    among = (positions[:, None, :] <= positions[:, :, None]) & valid[:, None]
    before = valid & (positions < end[:, None])
    return jnp.concatenate(
        [
            jnp.concatenate([among, jnp.zeros((B, S, width), bool)], axis=2),
            jnp.concatenate(
                [
                    jnp.broadcast_to(before[:, None], (B, width, S)),
                    nodes,
                ],
                axis=2,
            ),
        ],
        axis=1,
    )


def _attention(
    program: Program,
    weights: Weights,
    layer: int,
    x: jax.Array,
    place: jax.Array,
    keys: jax.Array,
) -> Callable[[jax.Array], jax.Array]:
    """`View.attention` of a layer that read x [B, S .., d] at positions `place` [B, S]."""

    def attention(tokens: jax.Array) -> jax.Array:
        at = take(place, tokens)  # [B, Q]
        rows = take(x, tokens), at, keys, place[:, None] <= at[..., None]
        return program.base_apply(weights, "attention_rows", layer, *rows).mean(1)

    return attention


def _part(cache: Cache, part: slice) -> Cache:
    return jax.tree.map(lambda x: x[:, :, part], cache)
