"""Drafting a chain of tokens with trunk and twig."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from twig_jax.decoding.cache import Cache, State, commit, sees, slots_of
from twig_jax.decoding.network import Program, Weights
from twig_jax.decoding.sampling import choose
from twig_jax.decoding.settings import Controls
from twig_jax.models.attention import KV
from twig_jax.pruning.select import take

_SPAN = 8  # tokens that the twig catches up in one pass


class Drafts(NamedTuple):
    """The nodes of one iteration: node 0 is the pending token, nodes 1 .. drafted[b] are drafts."""

    tokens: jax.Array  # int32 [B, W]
    probs: jax.Array  # float32 [B, W - 1], the twig's probability of drafts 1 .. W-1
    drafted: jax.Array  # int32 [B], drafts of each row
    states: jax.Array  # [B, W, d], after layer K - 1
    trunk: Cache  # scratch [B, K, W, D]
    twig: Cache  # scratch [B, K, W + 1, D]: slot 0 is token n - 2, slot 1 + j is node j


class Committed(NamedTuple):
    """The trunk's and twig's caches and which of their slots hold tokens, bool [B, S]."""

    trunk: Cache
    trunk_mask: jax.Array
    twig: Cache
    twig_mask: jax.Array


def scratch(program: Program, layers: int, rows: int, width: int, dtype: jnp.dtype) -> Cache:
    """Empty blocks for new nodes."""
    text = program.base.text
    empty = jnp.zeros((rows, text.num_kv_heads, width, text.head_dim), dtype)
    return tuple(KV(empty, empty) for _ in range(layers))


def trunk_step(
    program: Program,
    weights: Weights,
    drafts: Drafts,
    committed: Committed,
    positions: jax.Array,
    node: jax.Array | int,
) -> Drafts:
    """Runs one node, at positions [B], through the trunk: its layer-K state and scratch slot."""
    B, W = drafts.tokens.shape
    token = jax.lax.dynamic_slice_in_dim(drafts.tokens, node, 1, 1)
    x = program.base_apply(weights, "embed", token)
    x, trunk = program.layers(
        weights,
        0,
        program.K,
        x,
        positions[:, None],
        jnp.broadcast_to(jnp.arange(W) <= node, (B, 1, W)),
        cached=committed.trunk,
        cached_mask=committed.trunk_mask[:, None],
        scratch=drafts.trunk,
        index=node,
    )
    states = jax.lax.dynamic_update_slice_in_dim(drafts.states, x, node, 1)
    return drafts._replace(states=states, trunk=trunk)


def draft(
    program: Program,
    weights: Weights,
    drafts: Drafts,
    committed: Committed,
    last: jax.Array,
    last_valid: jax.Array,
    n: jax.Array,
    positions: jax.Array,
    limit: jax.Array,
    controls: Controls,
    seen: jax.Array,
) -> Drafts:
    """Drafts up to limit[b] tokens a row; node 0 must have run through the trunk.

    last [B, d] is the layer-K state of the token before node 0, last_valid bool [B] whether it
    still has to enter the twig; n [B] tokens emitted; positions [B] those of node 0; limit int32
    [B]; seen bool [B, V] as in `sampling.choose`. A row stops after EOS and after a token less
    probable than θ, which both count as drafts.
    """
    W = program.width
    Carry = tuple[jax.Array, jax.Array, Drafts]

    def going(carry: Carry) -> jax.Array:
        return carry[1].any()

    def step(carry: Carry, before: jax.Array | None = None) -> Carry:
        node, active, d = carry
        x = jax.lax.dynamic_slice_in_dim(d.states, node, 1, 1)
        if before is not None:
            x = jnp.concatenate([before[:, None], x], axis=1)
        Q = x.shape[1]
        index = node + 2 - Q
        slot = jnp.arange(W + 1)
        visible = slot <= index + jnp.arange(Q)[:, None]  # [Q, W + 1]
        visible = visible & ((slot > 0) | last_valid[:, None])[:, None]  # [B, Q, W + 1]
        x, twig = program.twig_apply(
            weights,
            "run",
            x,
            (positions + node)[:, None] + jnp.arange(1 - Q, 1),
            visible,
            cached=committed.twig,
            cached_mask=jnp.broadcast_to(
                committed.twig_mask[:, None], (visible.shape[0], Q, committed.twig_mask.shape[1])
            ),
            scratch=d.twig,
            index=index,
        )
        logits = program.twig_apply(weights, "logits", x[:, -1:])[:, 0]  # [B, V]
        path = jnp.where((jnp.arange(W) > 0) & (jnp.arange(W) <= node), d.tokens, -1)
        token = choose(
            controls,
            logits[:, None],
            (n + node)[:, None],
            (positions + node + 1)[:, None],
            seen,
            path[:, None],
        )[:, 0]
        chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
        prob = jnp.exp(chosen - jax.nn.logsumexp(logits, axis=-1))
        drafted = d.drafted + active.astype(jnp.int32)
        d = d._replace(
            tokens=jax.lax.dynamic_update_slice_in_dim(d.tokens, token[:, None], node + 1, 1),
            probs=jax.lax.dynamic_update_slice_in_dim(d.probs, prob[:, None], node, 1),
            drafted=drafted,
            twig=twig,
        )
        active &= (token != controls.eos) & (prob >= controls.theta) & (drafted < limit)
        d = trunk_step(program, weights, d, committed, positions + node + 1, node + 1)
        return node + 1, active, d

    # The last token enters the twig beside node 0: its keys may be missing (see cache.py).
    start = (jnp.int32(0), limit > 0, drafts)
    started = jax.lax.cond(going(start), lambda: step(start, before=last), lambda: start)
    return jax.lax.while_loop(going, step, started)[2]


def catch_up(program: Program, weights: Weights, state: State, upto: jax.Array) -> State:
    """Runs emitted tokens in_twig[b] .. upto[b] - 1 through the twig, from their layer-K states.

    upto int32 [B], at most n - 1; rows that have as many already stay as they are.
    """
    P = state.prompt.trunk.shape[1]
    G = state.states.shape[1]
    B = state.n.shape[0]
    chain = jnp.broadcast_to(jnp.tril(jnp.ones((_SPAN, _SPAN), bool)), (B, _SPAN, _SPAN))

    def behind(state: State) -> jax.Array:
        return (state.in_twig < upto).any()

    def step(state: State) -> State:
        cache = state.caches.twig
        token = state.in_twig[:, None] + jnp.arange(_SPAN)
        missing = token < upto[:, None]
        x, new = program.twig_apply(
            weights,
            "run",
            take(state.states, jnp.where(missing, token, G)),
            state.prompt.lengths[:, None] + token,
            chain,
            cached=cache,
            cached_mask=sees(state.prompt.trunk, state.in_twig, slots_of(cache), _SPAN),
        )
        # A last state that is a number is known last: see `accept` on copies of caches.
        written = missing & ~jnp.isnan(x[..., 0])
        cache = commit(cache, new, jnp.where(written, P + token, P + G))
        return state._replace(
            caches=state.caches._replace(twig=cache),
            in_twig=jnp.maximum(state.in_twig, jnp.minimum(state.in_twig + _SPAN, upto)),
        )

    return jax.lax.while_loop(behind, step, state)
