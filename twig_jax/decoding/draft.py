"""Drafting a tree of tokens with trunk and twig."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from twig_jax.decoding.cache import Cache, State, commit, sees, slots_of
from twig_jax.decoding.network import Program, Weights
from twig_jax.decoding.sampling import Seen, scores
from twig_jax.decoding.settings import Controls
from twig_jax.models.attention import KV
from twig_jax.pruning.select import first_of, take

_SPAN = 8  # tokens that the twig catches up in one pass
_CHUNK = 64  # words, of which the best is looked for first


class Drafts(NamedTuple):
    """The nodes of one iteration: node 0 is the pending token, nodes 1 .. drafted[b] are drafts.

    They come level by level, so that a node's ancestors are before it. Their keys and values are in
    slots of their own, see `Tree`.
    """

    tokens: jax.Array  # int32 [B, W]
    probs: jax.Array  # float32 [B, W - 1], the twig's probability of drafts 1 .. W-1
    parents: jax.Array  # int32 [B, W], the node before each; the root's is the root
    sees: jax.Array  # bool [B, W, W], whether a node is another one's ancestor, or itself
    drafted: jax.Array  # int32 [B], drafts of each row
    levels: jax.Array  # int32 [B], levels that were drafted, whether any of it was kept or not
    states: jax.Array  # [B, W, d], after layer K - 1
    slots: jax.Array  # int32 [B, W], X + U where there is no node
    trunk: Cache  # scratch [B, K, X + U, D]
    twig: Cache  # scratch [B, K, 1 + X, D]: slot 0 is token n - 2, slot 1 + x is slot x

    @property
    def depth(self) -> jax.Array:
        """Levels below the root, int32 [B, W]."""
        return self.sees.sum(-1, dtype=jnp.int32) - 1


class Committed(NamedTuple):
    """The trunk's and twig's caches and which of their slots hold tokens, bool [B, S]."""

    trunk: Cache
    trunk_mask: jax.Array
    twig: Cache
    twig_mask: jax.Array


class Candidates(NamedTuple):
    """What the twig offers, by level and number, each [B, D, C]."""

    tokens: jax.Array  # int32
    paths: jax.Array  # float32, log probability of the path to it, -inf where there is none
    probs: jax.Array  # float32, its own under the twig


class Growth(NamedTuple):
    """A tree that grows: its expanded nodes by slot, and all candidates."""

    tokens: jax.Array  # int32 [B, X], the root's 0
    sees: jax.Array  # bool [B, X, X], as in `Drafts`
    states: jax.Array  # [B, X, d], after layer K - 1
    was: jax.Array  # int32 [B, X], the number of a node as a candidate, -1 where there is none
    candidates: Candidates
    trunk: Cache  # as in `Drafts`
    twig: Cache


def scratch(program: Program, layers: int, rows: int, width: int, dtype: jnp.dtype) -> Cache:
    """Empty blocks for new nodes."""
    text = program.base.text
    empty = jnp.zeros((rows, text.num_kv_heads, width, text.head_dim), dtype)
    return tuple(KV(empty, empty) for _ in range(layers))


def undrafted(program: Program, tokens: jax.Array, state: jax.Array, trunk: Cache) -> Drafts:
    """The root alone: its token int32 [B], layer-K state [B, 1, d], and trunk scratch."""
    p, (B, W) = program, (len(tokens), program.width)
    dtype = state.dtype
    return Drafts(
        tokens=jnp.zeros((B, W), jnp.int32).at[:, 0].set(tokens),
        probs=jnp.zeros((B, W - 1), jnp.float32),
        parents=jnp.zeros((B, W), jnp.int32),
        sees=jnp.broadcast_to(jnp.eye(W, dtype=bool), (B, W, W)),
        drafted=jnp.zeros((B,), jnp.int32),
        levels=jnp.zeros((B,), jnp.int32),
        states=jnp.pad(state, ((0, 0), (0, W - 1), (0, 0))),
        slots=jnp.full((B, W), p.tree.size, jnp.int32).at[:, 0].set(0),
        trunk=jax.tree.map(lambda x: x.astype(dtype), trunk),
        twig=scratch(p, p.twig.T if p.keeps_twig else 0, B, 1 + p.tree.slots, dtype),
    )


def trunk_step(
    program: Program,
    weights: Weights,
    tokens: jax.Array,
    positions: jax.Array,
    visible: jax.Array,
    committed: Committed,
    block: Cache,
    slot: jax.Array | int,
) -> tuple[jax.Array, Cache]:
    """Runs nodes int32 [B, Q] through the trunk: their layer-K states, and the scratch block.

    positions int32 [B, Q]; visible bool [B, Q, X + U]: what each sees of the block, in which they
    take the slots from `slot`.
    """
    mask = committed.trunk_mask[:, None]
    return program.layers(
        weights,
        0,
        program.K,
        program.base_apply(weights, "embed", tokens),
        positions,
        visible,
        cached=committed.trunk,
        cached_mask=jnp.broadcast_to(mask, (*tokens.shape, mask.shape[-1])),
        scratch=block,
        index=slot,
    )


def draft(
    program: Program,
    weights: Weights,
    root: Drafts,
    committed: Committed,
    last: jax.Array,
    last_valid: jax.Array,
    n: jax.Array,
    positions: jax.Array,
    limit: jax.Array,
    controls: Controls,
    seen: Seen,
) -> Drafts:
    """Drafts up to limit[b] levels a row below the root, which has run through the trunk.

    last [B, d] is the layer-K state of the token before the root, last_valid bool [B] whether it
    still has to enter the twig; n [B] tokens emitted; positions [B] those of the root; limit int32
    [B]; seen as in `sampling.scores`. EOS has no children. A row stops after a level
    without any other token as probable as θ; what is on that level counts as drafted.
    """
    t = program.tree
    B, X, S = len(n), t.slots, t.size
    slot = jnp.arange(X)

    def twig_step(
        x: jax.Array, at: jax.Array, visible: jax.Array, block: Cache, index: jax.Array | int
    ) -> tuple[jax.Array, Cache]:
        """States [B, Q, d] at positions [B, Q] through the twig, as `trunk_step`."""
        mask = committed.twig_mask[:, None]
        return program.draft_apply(
            weights,
            "run",
            x,
            at,
            visible,
            cached=committed.twig,
            cached_mask=jnp.broadcast_to(mask, (*at.shape, mask.shape[-1])),
            scratch=block,
            index=index,
        )

    def offer(
        x: jax.Array, paths: jax.Array, above: jax.Array, tokens: jax.Array, level: jax.Array
    ) -> Candidates:
        """The best children, each [B, 1, C], of nodes of a level, from their states [B, Q, d].

        paths [B, Q] as in `Candidates`; above bool [B, Q, X]: a node and its ancestors, without the
        root; tokens as in `Growth`. Nodes of one level share their position, and so its noise.
        """
        logits = program.draft_apply(weights, "logits", x)  # [B, Q, V]
        there = (n + level)[:, None], (positions + level + 1)[:, None]
        path = jnp.where(above, tokens[:, None], -1)
        rated = scores(controls, logits, *there, seen, path)
        best, children = _best(rated, t.children)  # [B, Q, E]
        # What is added is never positive, so that no path is likelier than its beginning.
        paths = paths[..., None] + (best - jax.nn.logsumexp(rated, axis=-1, keepdims=True))
        own = jnp.take_along_axis(logits, children, axis=-1)
        probs = jnp.exp(own - jax.nn.logsumexp(logits, axis=-1, keepdims=True))

        def row(x: jax.Array, nothing: float) -> jax.Array:
            x = x.reshape(B, 1, -1)
            pad = (0, 0), (0, 0), (0, t.offered - x.shape[-1])
            return jnp.pad(x, pad, constant_values=nothing)

        return Candidates(row(children, 0), row(paths, -jnp.inf), row(probs, 0))

    def expandable(candidates: Candidates) -> jax.Array:
        return (candidates.tokens != controls.eos[:, None, None]) & (candidates.paths > -jnp.inf)

    def goes_on(newest: Candidates, level: jax.Array) -> jax.Array:
        """Rows that draft on below a level, bool [B]."""
        likely = expandable(newest) & (newest.probs >= controls.theta[:, None, None])
        return likely.any((1, 2)) & (level < limit)

    def put(x: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(x, new.astype(x.dtype), at, 1)

    Carry = tuple[jax.Array, jax.Array, Growth]

    def start() -> Carry:
        """The first level; the last token enters the twig beside the root (see cache.py)."""
        visible = jnp.arange(X + 1) <= jnp.arange(2)[:, None]
        visible &= ((jnp.arange(X + 1) > 0) | last_valid[:, None])[:, None]  # [B, 2, X + 1]
        x = jnp.concatenate([last[:, None], root.states[:, :1]], axis=1)
        at = positions[:, None] + jnp.arange(-1, 1)
        x, twig = twig_step(x, at, visible, root.twig, 0)
        tokens, nobody = jnp.zeros((B, X), jnp.int32), jnp.zeros((B, 1, X), bool)
        paths = jnp.where(limit > 0, 0.0, -jnp.inf)[:, None]
        first = offer(x[:, 1:], paths, nobody, tokens, jnp.int32(0))
        rest = ((0, 0), (0, t.depth - 1), (0, 0))
        growth = Growth(
            tokens=tokens,
            sees=jnp.zeros((B, X, X), bool).at[:, 0, 0].set(True),
            states=jnp.pad(root.states[:, :1], ((0, 0), (0, X - 1), (0, 0))),
            was=jnp.full((B, X), -1, jnp.int32),
            candidates=Candidates(
                jnp.pad(first.tokens, rest),
                jnp.pad(first.paths, rest, constant_values=-jnp.inf),
                jnp.pad(first.probs, rest),
            ),
            trunk=root.trunk,
            twig=twig,
        )
        return jnp.int32(1), goes_on(first, jnp.int32(1)), growth

    def going(carry: Carry) -> jax.Array:
        return carry[1].any()

    def step(carry: Carry) -> Carry:
        """Expands the best nodes of the newest level."""
        level, active, g = carry
        newest = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, level - 1, 1, 1), g.candidates
        )
        may = expandable(newest) & active[:, None, None]
        paths, which = jax.lax.top_k(jnp.where(may, newest.paths, -jnp.inf)[:, 0], t.expanded)
        chosen = (level - 1) * t.offered + which  # [B, K_s]
        first = t.first_slot(level)
        own = slot == first + jnp.arange(t.expanded)[:, None]
        above = take(g.sees, t.parent(chosen)) | own  # [B, K_s, X]
        new = take(newest.tokens[:, 0], which)
        at = jnp.broadcast_to((positions + level)[:, None], new.shape)
        visible = jnp.pad(above, ((0, 0), (0, 0), (0, S - X)))
        x, trunk = trunk_step(program, weights, new, at, visible, committed, g.trunk, first)
        before = jnp.broadcast_to(last_valid[:, None, None], (*new.shape, 1))
        visible = jnp.concatenate([before, above], axis=2)
        y, twig = twig_step(x, at, visible, g.twig, first + 1)
        tokens = put(g.tokens, new, first)
        below = offer(y, paths, above & (slot > 0), tokens, level)
        growth = Growth(
            tokens=tokens,
            sees=put(g.sees, above, first),
            states=put(g.states, x, first),
            was=put(g.was, jnp.where(paths > -jnp.inf, chosen, -1), first),
            candidates=jax.tree.map(lambda x, new: put(x, new, level), g.candidates, below),
            trunk=trunk,
            twig=twig,
        )
        return level + 1, active & goes_on(below, level + 1), growth

    def grown() -> Drafts:
        growth = jax.lax.while_loop(going, step, start())[2]
        return _kept(program, weights, root, growth, committed, positions)

    return jax.lax.cond((limit > 0).any(), grown, lambda: root)


def _best(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The largest of the last axis and where they are, as `lax.top_k` but for which of equals."""
    if count == 1:
        # A reduction, for which a GPU need not leave the graph of its kernels.
        at = x.argmax(-1, keepdims=True).astype(jnp.int32)
        return jnp.take_along_axis(x, at, axis=-1), at
    if x.shape[-1] < 8 * count * _CHUNK:
        return jax.lax.top_k(x, count)
    # They are in the chunks with the largest maxima, so that few are left to choose from: choosing
    # takes far longer than a reduction, on CPUs and GPUs.
    beside, words = [(0, 0)] * (x.ndim - 1), x.shape[-1]
    x = jnp.pad(x, [*beside, (0, -x.shape[-1] % _CHUNK)], constant_values=-jnp.inf)
    chunks = rearrange(x, "... (n c) -> ... n c", c=_CHUNK)
    _, which = jax.lax.top_k(chunks.max(-1), count)
    few = jnp.take_along_axis(chunks, which[..., None], axis=-2)
    best, at = jax.lax.top_k(rearrange(few, "... n c -> ... (n c)"), count)
    at = jnp.take_along_axis(which, at // _CHUNK, axis=-1) * _CHUNK + at % _CHUNK
    # Where all but a few are -inf, what fills up has to be a word too: others embed as NaN.
    return best, jnp.minimum(at, words - 1)


def _kept(
    program: Program,
    weights: Weights,
    root: Drafts,
    growth: Growth,
    committed: Committed,
    positions: jax.Array,
) -> Drafts:
    """The best N candidates as nodes; those that were not expanded run through the trunk."""
    t, g = program.tree, growth
    X, W, S = t.slots, program.width, t.size
    B, D, C = g.candidates.tokens.shape
    tokens, paths, probs = (x.reshape(B, D * C) for x in g.candidates)
    # Of equal paths the first wins, so that no node is kept without its parent.
    best, number = jax.lax.top_k(paths, t.kept)
    number = jnp.sort(jnp.where(best > -jnp.inf, number, D * C), axis=1)  # [B, N]
    there = number < D * C
    tokens, parent = take(tokens, number), t.parent(number)
    above = take(g.sees, parent)  # bool [B, N, X], ancestors by slot

    same = number[:, :, None] == g.was[:, None]  # [B, N, X]
    leaf = there & ~same.any(-1)
    slots = jnp.where(leaf, X - 1 + jnp.cumsum(leaf, axis=1), same.argmax(-1))
    slots = jnp.where(there, slots, S)
    leaves = first_of(leaf, t.leaves)  # [B, U]
    own = jnp.broadcast_to(jnp.eye(t.leaves, dtype=bool), (B, t.leaves, t.leaves))
    x, trunk = trunk_step(
        program,
        weights,
        take(tokens, leaves),
        positions[:, None] + take(number // C + 1, leaves),
        jnp.concatenate([take(above, leaves), own], axis=2),
        committed,
        g.trunk,
        X,
    )

    slots = jnp.pad(slots, ((0, 0), (1, 0)))  # the root's is 0
    nodes = jnp.pad(above, ((0, 0), (1, 0), (0, 0)))
    nodes = jnp.take_along_axis(nodes, slots[:, None], axis=2, mode="fill", fill_value=False)
    before = (slots[:, None] == parent[:, :, None]).argmax(-1).astype(jnp.int32)  # [B, N]
    return root._replace(
        tokens=root.tokens.at[:, 1:].set(tokens),
        probs=take(probs, number),
        parents=root.parents.at[:, 1:].set(before),
        sees=nodes | jnp.eye(W, dtype=bool),
        drafted=there.sum(1, dtype=jnp.int32),
        levels=(g.candidates.paths > -jnp.inf).any(-1).sum(-1, dtype=jnp.int32),
        states=take(jnp.concatenate([g.states, x], axis=1), slots),
        slots=slots,
        trunk=trunk,
        twig=g.twig,
    )


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
        x, new = program.draft_apply(
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
