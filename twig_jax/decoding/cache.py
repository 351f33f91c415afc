"""The state of the decoding loop.

Slots of a segment's cache are its prompt slots followed by G generated slots; emitted token i is at
(prompt slots) + i in every segment:

    trunk, layers 0 .. K-1             [ prompt P                   | generated G ]
    twig                               [ prompt P                   | generated G ]
    deep, a segment of layers from K   [ text + kept visual N + R   | generated G ]
    another, of later layers           [ text + fewer visual        | generated G ]

Pruned by a twig there are two deep segments: layers K .. K_f-1 with its choice of R visual tokens,
and layers K_f .. L-1 with none (FinalWipe). Without pruning there is one, with all tokens; what
prunes in several steps has a segment for each.

With n[b] tokens emitted, the base's caches hold tokens 0 .. n-2 and token n-1 is pending: it is
node 0 of the next iteration. The twig's cache holds tokens 0 .. n-3 of a row that drafts; token n-2
runs through the twig together with the pending one, from its saved layer-K state, so that the last
draft of an iteration costs no twig pass of its own. A row that has not drafted for a while has
fewer tokens there, in_twig[b], and catches up from the saved states before it drafts again.

Everything in a State has the row as its first axis, so that a row can be replaced as a whole.
"""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from einops import rearrange

from twig_jax.decoding.settings import Controls
from twig_jax.models.attention import KV
from twig_jax.sharding.placement import spread

Cache = tuple[KV, ...]


class Caches(NamedTuple):
    """One KV a layer and segment, each [B, K, slots, D]; empty tuples where there is no layer."""

    trunk: Cache
    twig: Cache
    deep: tuple[Cache, ...]


_Caches = TypeVar("_Caches", Cache, Caches)


class Prompt(NamedTuple):
    """Which prompt slots of each segment hold a token."""

    trunk: jax.Array  # bool [B, P], also the twig's
    deep: tuple[jax.Array, ...]  # bool [B, N + R_max] of each segment
    lengths: jax.Array  # int32 [B], tokens of the prompt


class Trace(NamedTuple):
    """What happened, for reports; iteration i of row b is at [b, i], -1 where nothing was."""

    drafts: jax.Array  # int32 [B, max_new, W - 1], drafted tokens
    parents: jax.Array  # int32 [B, max_new, W - 1], the nodes they follow
    probs: jax.Array  # float32 [B, max_new, W - 1], their probability under the twig
    matched: jax.Array  # int32 [B, max_new], accepted drafts


class State(NamedTuple):
    """The carry of the decoding loop."""

    caches: Caches
    prompt: Prompt
    controls: Controls
    context: jax.Array  # int32 [B, P], the prompt's words, V in all other slots
    states: jax.Array  # [B, G, d], layer-K states of emitted tokens 0 .. n-2
    n: jax.Array  # int32 [B], tokens emitted, the last of which is pending
    pending: jax.Array  # int32 [B]
    in_twig: jax.Array  # int32 [B], emitted tokens in the twig's cache
    balance: jax.Array  # float32 [B], see adaptive.py
    tokens: jax.Array  # int32 [B, max_new], emitted tokens, EOS included
    done: jax.Array  # bool [B]
    iterations: jax.Array  # int32 [B], draft-verify iterations so far
    trace: Trace


def spread_rows(state: State) -> State:
    """The state with its rows over the mesh's data axes and its heads over 'tensor'."""
    caches = jax.tree.map(lambda x: spread(x, "rows", "tensor"), state.caches)
    rest = jax.tree.map(lambda x: spread(x, "rows"), state._replace(caches=Caches((), (), ())))
    return rest._replace(caches=caches)


def insert(state: State, row: jax.Array | int, other: State) -> State:
    """The state with its row replaced by the first of another state of the same slots."""
    return spread_rows(jax.tree.map(lambda x, y: x.at[row].set(y[0]), state, other))


def idle(state: State, rows: int) -> State:
    """So many rows that are done, in the shape of a state's first."""
    state = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], (rows, *x.shape[1:])), state)
    return spread_rows(state._replace(done=jnp.ones((rows,), bool)))


def grow(caches: _Caches, slots: int) -> _Caches:
    """A cache, or all of them, with `slots` empty slots after those they have."""
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, slots), (0, 0))), caches)


def commit(cache: Cache, block: Cache, slots: jax.Array) -> Cache:
    """Writes block [B, K, W, D] to slots int32 [B, W] of every layer; out-of-range slots drop.

    Without a block nothing is written. A single token whose slot is out of range goes to the last
    one, which no answer reaches.
    """
    if not block:
        return cache
    if slots.shape == (1, 1):
        # One operation in place, where a scatter has to read what it may have to leave.
        at = (0, 0, slots[0, 0], 0)
        return jax.tree.map(
            lambda c, x: jax.lax.dynamic_update_slice(c, x.astype(c.dtype), at), cache, block
        )
    rows = jnp.arange(slots.shape[0])[:, None]

    def write(c: jax.Array, x: jax.Array) -> jax.Array:
        x = rearrange(x, "B K W D -> B W K D").astype(c.dtype)
        return c.at[rows, :, slots].set(x, mode="drop")

    return jax.tree.map(write, cache, block)


def pick(cache: Cache, slots: jax.Array) -> Cache:
    """The slots int32 [B, W] of every layer, [B, K, W, D]; an index past the end gives zeros."""
    return jax.tree.map(
        lambda c: jnp.take_along_axis(
            c, slots[:, None, :, None], axis=2, mode="fill", fill_value=0
        ),
        cache,
    )


def sees(prompt: jax.Array, generated: jax.Array, slots: int, width: int) -> jax.Array:
    """Mask bool [B, width, S] over a cache of S slots, the same for every query.

    prompt bool [B, P]; generated int32 [B], tokens that the cache holds after the prompt.
    """
    after = jnp.arange(slots - prompt.shape[1]) < generated[:, None]
    mask = jnp.concatenate([prompt, after], axis=1)[:, None]
    return jnp.broadcast_to(mask, (mask.shape[0], width, slots))


def slots_of(cache: Cache) -> int:
    """Slots of a cache with at least one layer."""
    return cache[0].k.shape[2]
