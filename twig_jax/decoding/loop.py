"""The decoding loop: draft, verify, accept, commit, on device until every row is done."""

import jax
import jax.numpy as jnp

from twig_jax.decoding.accept import accept
from twig_jax.decoding.cache import Cache, Limits, State, sees, slots_of
from twig_jax.decoding.draft import Committed, Drafts, draft, scratch, trunk_step
from twig_jax.decoding.network import Program, Weights


def decode(
    program: Program, weights: Weights, state: State, limits: Limits, most: jax.Array | int
) -> State:
    """Iterates until every row is done, or `most` times (a chunk)."""

    def going(carry: tuple[jax.Array, State]) -> jax.Array:
        return (carry[0] < most) & ~carry[1].done.all()

    def step(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
        return carry[0] + 1, iterate(program, weights, carry[1], limits)

    return jax.lax.while_loop(going, step, (jnp.int32(0), state))[1]


def iterate(program: Program, weights: Weights, state: State, limits: Limits) -> State:
    """One iteration of every row: node 0 is its pending token, nodes 1 .. its drafts."""
    p, caches, prompt = program, state.caches, state.prompt
    B, W = state.n.shape[0], p.width
    dtype = state.last.dtype
    positions = prompt.lengths + state.n - 1
    cached = state.n - 1  # tokens after the prompt in the base's caches
    drafts = Drafts(
        tokens=jnp.zeros((B, W), jnp.int32).at[:, 0].set(state.pending),
        probs=jnp.zeros((B, W - 1), jnp.float32),
        drafted=jnp.zeros((B,), jnp.int32),
        states=jnp.zeros((B, W, state.last.shape[-1]), dtype),
        trunk=scratch(p, p.K, B, W, dtype),
        twig=scratch(p, p.twig.T if p.draft else 0, B, W + 1, dtype),
    )

    def mask(cache: Cache, valid: jax.Array, generated: jax.Array) -> jax.Array:
        return sees(valid, generated, slots_of(cache), W) if cache else jnp.zeros((B, W, 0), bool)

    committed = Committed(
        caches.trunk,
        mask(caches.trunk, prompt.trunk, cached)[:, 0],
        caches.twig,
        mask(caches.twig, prompt.trunk, cached - 1)[:, 0],
    )
    with jax.named_scope("trunk"):
        drafts = trunk_step(p, weights, drafts, committed, positions, 0)
    if p.draft:
        with jax.named_scope("draft"):
            limit = jnp.minimum(limits.gamma, limits.max_new - state.n - 1)
            drafts = draft(
                p,
                weights,
                drafts,
                committed,
                state.last,
                state.n >= 2,
                positions,
                jnp.where(state.done, 0, limit),
                limits,
            )
    with jax.named_scope("verify"):
        x, at = drafts.states, positions[:, None] + jnp.arange(W)
        chain = jnp.broadcast_to(jnp.tril(jnp.ones((W, W), bool)), (B, W, W))
        new = []
        for first, last, cache, valid in (
            (p.K, p.K_f, caches.middle, prompt.middle),
            (p.K_f, p.L, caches.top, prompt.top),
        ):
            x, kv = p.layers(
                weights,
                first,
                last,
                x,
                at,
                chain,
                cached=cache,
                cached_mask=mask(cache, valid, cached),
            )
            new.append(kv)
        logits = p.base_apply(weights, "logits", x)
    return accept(p, state, drafts, new[0], new[1], logits, limits)
