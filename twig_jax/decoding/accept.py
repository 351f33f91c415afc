"""Which drafts stand, and what that changes in the state."""

import jax
import jax.numpy as jnp

from twig_jax.decoding.adaptive import settle
from twig_jax.decoding.cache import Cache, Caches, State, Trace, commit
from twig_jax.decoding.draft import Drafts
from twig_jax.decoding.network import Program

_NOWHERE = 2**30  # a slot past every cache: scatters to it are dropped


def accept(
    program: Program,
    state: State,
    drafts: Drafts,
    deep: tuple[Cache, ...],
    choice: jax.Array,
    cost: jax.Array,
) -> State:
    """Accepts the path of drafts that the base agrees with, and its next token.

    `deep` holds the new nodes' keys and values [B, K, W, D] in every segment, `choice` int32 [B, W]
    what the base chooses after every node; cost as in adaptive.py. A row emits between 1 and
    levels + 1 tokens; nothing follows an EOS.
    """
    B, W = drafts.tokens.shape
    controls = state.controls
    rows = jnp.arange(B)[:, None]
    node, depth = jnp.arange(W), drafts.depth
    agrees = drafts.tokens == jnp.take_along_axis(choice, drafts.parents, axis=1)
    agrees = (agrees & (node <= drafts.drafted[:, None])) | (node == 0)
    # Children of a node differ, so that this is a path; nodes on it are in its order.
    on_path = (agrees[:, None] | ~drafts.sees).all(-1)  # [B, W]
    matched = on_path.sum(1, dtype=jnp.int32) - 1

    # Accepted drafts equal the base's choices, so what is emitted are the choices on the path.
    emitted = on_path & ~state.done[:, None]
    ends = emitted & (choice == controls.eos[:, None])
    first_end = jnp.cumsum(ends.astype(jnp.int32), axis=1)
    emitted &= (first_end == 0) | (ends & (first_end == 1))
    count = emitted.sum(1, dtype=jnp.int32)
    n = state.n + count
    slots = jnp.where(emitted, state.n[:, None] + depth, _NOWHERE)
    done = state.done | ends.any(1) | (n >= controls.max_new)

    # A node is token n - 1 + its depth. Before the first token, node 0 is the prompt's last token.
    token = state.n[:, None] - 1 + depth
    alive = on_path & ~state.done[:, None]
    # Always true, but tokens are known last: so no cache is written before all have been read, and
    # the compiler needs no copy of one.
    alive &= choice >= 0
    cached = jnp.where(alive & (token >= 0), token, _NOWHERE)
    before = jnp.where((state.n >= 2) & ~state.done, state.n - 2, _NOWHERE)[:, None]
    # Trunk and twig have the nodes in slots of their own.
    t = program.tree
    in_trunk = jnp.full((B, t.size), _NOWHERE).at[rows, drafts.slots].set(cached, mode="drop")
    # Of a row that did not draft nobody reads this: it catches up before it drafts again.
    in_twig = jnp.concatenate([before, in_trunk[:, : t.slots]], axis=1)
    P = state.prompt.trunk.shape[1]
    caches = Caches(
        commit(state.caches.trunk, drafts.trunk, P + in_trunk),
        commit(state.caches.twig, drafts.twig, P + in_twig),
        tuple(
            commit(cache, new, prompt.shape[1] + cached)
            for cache, new, prompt in zip(state.caches.deep, deep, state.prompt.deep, strict=True)
        ),
    )
    last = jnp.where(on_path, node, 0).max(1, keepdims=True)
    iteration = jnp.where(state.done, _NOWHERE, state.iterations)[:, None]
    trace = state.trace
    drafted = node[:-1] < drafts.drafted[:, None]

    def told(x: jax.Array, new: jax.Array) -> jax.Array:
        new = jnp.where(drafted, new, jnp.asarray(-1, new.dtype))
        return x.at[rows, iteration, node[:-1]].set(new, mode="drop")

    trace = Trace(
        told(trace.drafts, drafts.tokens[:, 1:]),
        told(trace.parents, drafts.parents[:, 1:]),
        told(trace.probs, drafts.probs),
        trace.matched.at[rows, iteration].set(matched[:, None], mode="drop"),
    )
    drew = (drafts.drafted > 0) & ~state.done
    return state._replace(
        caches=caches,
        states=state.states.at[rows, cached].set(drafts.states, mode="drop"),
        n=n,
        pending=jnp.where(
            state.done, state.pending, jnp.take_along_axis(choice, last, axis=1)[:, 0]
        ),
        in_twig=jnp.where(drew, jnp.maximum(n - 2, 0), state.in_twig),
        balance=settle(state.balance, drafts.levels, matched, count, state.done, cost),
        tokens=state.tokens.at[rows, slots].set(choice, mode="drop"),
        done=done,
        iterations=state.iterations + (~state.done).astype(jnp.int32),
        trace=trace,
    )


def empty_trace(rows: int, max_new: int, width: int) -> Trace:
    """A trace in which nothing has happened."""
    return Trace(
        jnp.full((rows, max_new, width - 1), -1, jnp.int32),
        jnp.full((rows, max_new, width - 1), -1, jnp.int32),
        jnp.full((rows, max_new, width - 1), -1.0, jnp.float32),
        jnp.full((rows, max_new), -1, jnp.int32),
    )
