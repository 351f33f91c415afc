"""The decoding loop: draft, verify, accept, commit, on device until every row is done."""

from functools import partial

import jax
import jax.numpy as jnp

from twig_jax.decoding.accept import accept
from twig_jax.decoding.adaptive import drafting
from twig_jax.decoding.cache import Cache, State, grow, sees, slots_of, spread_rows
from twig_jax.decoding.draft import Committed, catch_up, draft, scratch, trunk_step, undrafted
from twig_jax.decoding.network import Program, Weights
from twig_jax.decoding.sampling import choose, seen_before
from twig_jax.pruning.select import take

Verified = tuple[tuple[Cache, ...], jax.Array]


def decode(
    program: Program,
    weights: Weights,
    state: State,
    stop: jax.Array,
    cost: jax.Array,
    most: jax.Array | int,
) -> State:
    """Iterates until every row is done, or `most` times (a chunk).

    stop bool [B]: rows to end before that. cost float32 [D + 1]: see adaptive.py.
    """
    state = spread_rows(state._replace(done=state.done | stop))

    def going(carry: tuple[jax.Array, State]) -> jax.Array:
        return (carry[0] < most) & ~carry[1].done.all()

    def step(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
        return carry[0] + 1, iterate(program, weights, carry[1], cost)

    return jax.lax.while_loop(going, step, (jnp.int32(0), state))[1]


def iterate(program: Program, weights: Weights, state: State, cost: jax.Array) -> State:
    """One iteration of every row: node 0 is its pending token, nodes 1 .. its drafts."""
    p, prompt = program, state.prompt
    B, W, t = state.n.shape[0], p.width, p.tree
    positions = prompt.lengths + state.n - 1
    draws = drafting(state, cost)
    if p.adaptive:
        with jax.named_scope("catch_up"):
            state = catch_up(p, weights, state, jnp.where(draws, state.n - 2, 0))
    caches = state.caches
    cached = state.n - 1  # tokens after the prompt in the base's caches

    def mask(cache: Cache, valid: jax.Array, generated: jax.Array, width: int = 1) -> jax.Array:
        if not cache:
            return jnp.zeros((B, width, 0), bool)
        return sees(valid, generated, slots_of(cache), width)

    committed = Committed(
        caches.trunk,
        mask(caches.trunk, prompt.trunk, cached)[:, 0],
        caches.twig,
        mask(caches.twig, prompt.trunk, cached - 1)[:, 0],
    )
    V = p.base.text.vocab_size
    seen = partial(seen_before, state.context, state.tokens, state.n, V)
    with jax.named_scope("trunk"):
        x, trunk = trunk_step(
            p,
            weights,
            state.pending[:, None],
            positions[:, None],
            jnp.broadcast_to(jnp.arange(t.size) == 0, (B, 1, t.size)),
            committed,
            scratch(p, p.K, B, t.size, state.states.dtype),
            0,
        )
        drafts = undrafted(p, state.pending, x, trunk)
    if p.draft:
        with jax.named_scope("draft"):
            limit = jnp.minimum(state.controls.gamma, state.controls.max_new - state.n - 1)
            drafts = draft(
                p,
                weights,
                drafts,
                committed,
                take(state.states, (state.n - 2)[:, None])[:, 0],
                state.n >= 2,
                state.n,
                positions,
                jnp.where(draws, limit, 0),
                state.controls,
                seen,
            )

    def verify(width: int) -> Verified:
        """The deep layers over nodes 0 .. width-1; results as wide as W."""
        x, among = drafts.states[:, :width], drafts.sees[:, :width, :width]
        at = positions[:, None] + drafts.depth[:, :width]
        new = []
        for segment, cache, valid in zip(p.segments, caches.deep, prompt.deep, strict=True):
            x, kv = p.layers(
                weights,
                segment.first,
                segment.last,
                x,
                at,
                among,
                cached=cache,
                cached_mask=mask(cache, valid, cached, width),
            )
            new.append(grow(kv, W - width))
        # The drafts on the way to each node; node 0 is among the tokens already.
        path = jnp.where(among, drafts.tokens[:, None, :width], -1).at[:, :, 0].set(-1)
        choice = choose(
            state.controls,
            p.base_apply(weights, "logits", x),
            state.n[:, None] + drafts.depth[:, :width],
            at + 1,
            seen,
            path,
        )
        return tuple(new), jnp.pad(choice, ((0, 0), (0, W - width)))

    with jax.named_scope("verify"):
        if p.adaptive and W > 1:
            deep, choice = jax.lax.cond(drafts.drafted.any(), lambda: verify(W), lambda: verify(1))
        else:
            deep, choice = verify(W)
    return accept(p, state, drafts, deep, choice, cost)
