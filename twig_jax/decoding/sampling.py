"""The one rule by which twig and base choose tokens: shared Gumbel noise.

A token is argmax(logits / temperature + g), where the noise g is a function of a row's seed and the
token's position. It is distributed as softmax(logits / temperature) (Gumbel-max), and because twig
and base use the same noise, a draft is accepted exactly if the base chooses the same token
(arXiv 2408.07978). Sampled speculative decoding so equals sampled plain decoding token for token,
and greedy decoding is the case without noise.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from twig_jax.decoding.settings import Controls
from twig_jax.sharding.placement import spread

_HIGHEST = np.uint32(1 << 31)

Seen = Callable[[], jax.Array]  # bool [B, V], which tokens were there; asked for where it matters


def choose(
    controls: Controls,
    logits: jax.Array,
    n: jax.Array,
    positions: jax.Array,
    seen: Seen,
    path: jax.Array,
) -> jax.Array:
    """Tokens int32 [B, Q] for logits [B, Q, V]; arguments as in `scores`."""
    return scores(controls, logits, n, positions, seen, path).argmax(-1).astype(jnp.int32)


def scores(
    controls: Controls,
    logits: jax.Array,
    n: jax.Array,
    positions: jax.Array,
    seen: Seen,
    path: jax.Array,
) -> jax.Array:
    """What tokens are chosen by, float32 [B, Q, V], for logits [B, Q, V].

    n int32 [B, Q]: tokens emitted before the one to choose; positions int32 [B, Q]: its place. They
    are [B, 1] where all queries share them. For the repetition penalty, `seen` has the tokens
    before, and int32 [B, Q, E] `path` further ones of each query, -1 for none.
    """

    def special(logits: jax.Array) -> jax.Array:
        logits = _repeated(controls, logits, seen, path)
        warm = controls.temperature[:, None, None] > 0
        noise = gumbel(controls.seed, positions, logits.shape[-1])
        return jnp.where(warm, filtered(controls, logits) + noise, logits)

    # One condition for all that greedy rows do without: a GPU waits for the host at each.
    asked = ((controls.temperature > 0) | (controls.penalty != 1)).any()
    return jax.lax.cond(asked, special, lambda x: x, _unended(controls, logits, n))


def filtered(controls: Controls, logits: jax.Array) -> jax.Array:
    """Logits [B, Q, V] after temperature (where above 0), top_k, top_p and min_p.

    Their softmax is what a token is drawn from; tokens that cannot be drawn are at -inf.
    """
    c = jax.tree.map(lambda x: x[:, None, None], controls)
    return jax.lax.cond(
        ((c.top_k > 0) | (c.top_p < 1) | (c.min_p > 0)).any(),
        lambda x: jnp.where(_allowed(x, c), x, -jnp.inf),
        lambda x: x,
        # Divided by less, several logits would be infinite.
        logits / jnp.where(c.temperature > 0, jnp.maximum(c.temperature, 1e-30), 1),
    )


def gumbel(seeds: jax.Array, positions: jax.Array, size: int) -> jax.Array:
    """Noise float32 [B, Q, size] for uint32 [B] seeds at int32 [B, Q] positions."""

    def one(seed: jax.Array, position: jax.Array) -> jax.Array:
        # Named, because a platform's default may draw other values for another batch.
        key = jax.random.key(seed, impl="threefry2x32")
        return jax.random.gumbel(jax.random.fold_in(key, position), (size,), jnp.float32)

    return jax.vmap(jax.vmap(one, (None, 0)))(seeds, positions)


def seen_before(context: jax.Array, tokens: jax.Array, n: jax.Array, size: int) -> jax.Array:
    """Which tokens a row's prompt and answer hold, bool [B, size].

    context int32 [B, P], the prompt, with `size` where no token is to be marked; tokens int32
    [B, max_new], of which n[b] count.
    """
    B = n.shape[0]
    emitted = jnp.where(jnp.arange(tokens.shape[1]) < n[:, None], tokens, size)
    both = jnp.concatenate([context, emitted], axis=1)
    return jnp.zeros((B, size), bool).at[jnp.arange(B)[:, None], both].set(True, mode="drop")


def _unended(controls: Controls, logits: jax.Array, n: jax.Array) -> jax.Array:
    """Logits [B, Q, V] with no end of an answer before min_new_tokens."""
    ends = jnp.arange(logits.shape[-1]) == controls.eos[:, None, None]
    early = n < controls.min_new[:, None]
    return jnp.where(ends & early[..., None], -jnp.inf, logits)


def _repeated(controls: Controls, logits: jax.Array, seen: Seen, path: jax.Array) -> jax.Array:
    """Logits [B, Q, V] after the repetition penalty."""
    penalty = controls.penalty[:, None, None]
    return jax.lax.cond(
        (penalty != 1).any(),
        lambda x: _penalised(x, penalty, seen(), path),
        lambda x: x,
        logits,
    )


def _penalised(
    logits: jax.Array, penalty: jax.Array, seen: jax.Array, path: jax.Array
) -> jax.Array:
    """Logits of tokens that were there before, divided (positive) or multiplied by the penalty."""
    B, Q, V = logits.shape
    at = jnp.arange(B)[:, None, None], jnp.arange(Q)[:, None], jnp.where(path < 0, V, path)
    seen = jnp.broadcast_to(seen[:, None], logits.shape).at[at].set(True, mode="drop")
    lower = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(seen, lower, logits)


def _allowed(logits: jax.Array, c: Controls) -> jax.Array:
    """Which tokens of logits [B, Q, V] top_k, top_p and min_p, in this order, let pass.

    Equal logits pass together. The lowest that pass are found bit by bit, with a sum over all words
    for each: sorting the words takes ten times as long.
    """
    logits = spread(logits, "rows")  # all words on each device, as they are read again and again
    keys = _ordered(logits)
    k = jnp.where(c.top_k > 0, c.top_k, logits.shape[-1])
    kth = _largest(lambda key: (keys >= key).sum(-1, keepdims=True) >= k, logits)
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    left = jnp.where(keys >= kth, weights, 0)
    # A token stays if those above it do not reach top_p. Sums may round up to all before the last
    # token, and rows without top_p keep it.
    mass = jnp.maximum(c.top_p * left.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    mass = jnp.where(c.top_p < 1, mass, jnp.inf)
    last = _largest(
        lambda key: jnp.where(keys >= key, left, 0).sum(-1, keepdims=True) >= mass, logits
    )
    return (keys >= jnp.maximum(kth, last)) & (weights >= c.min_p)


def _ordered(x: jax.Array) -> jax.Array:
    """Integers uint32 in the order of float32 numbers."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(x < 0, ~bits, bits | _HIGHEST)


def _largest(holds: Callable[[jax.Array], jax.Array], logits: jax.Array) -> jax.Array:
    """The largest uint32 [B, Q, 1] that `holds` is true of, as it is of all below; 0 if of none."""

    def add(i: jax.Array, found: jax.Array) -> jax.Array:
        more = found | (_HIGHEST >> i.astype(jnp.uint32))
        return jnp.where(holds(more), more, found)

    nothing = jnp.zeros((*logits.shape[:-1], 1), jnp.uint32)
    return jax.lax.fori_loop(0, 32, add, nothing)
