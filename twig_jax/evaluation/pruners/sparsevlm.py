"""SparseVLM: words of the question rate the image's tokens, and some that go are recycled."""

import math

import jax
import jax.numpy as jnp

from twig_jax.config import TwigConfig
from twig_jax.evaluation.pruners.stages import staged
from twig_jax.pruning.schedule import Ranked, Schedule, View
from twig_jax.pruning.select import take

_LAYERS = (3, 7, 16)  # of 32
_TOKENS = (300, 200, 110)  # of 576
_RECYCLED = 30  # of a hundred tokens that go
_CLUSTER = 10  # recycled tokens for each that they are merged into


def sparse(num_layers: int, twig: TwigConfig) -> Schedule:
    """After layers 2, 6 and 15 of 32, counted from 0, or as deep in others (of halves the lower).

    The released settings keep 300, 200 and 110 of 576 tokens and call it 192; here, these
    proportions at every average, up to all tokens. Merged tokens count as others do, and keep a
    slot and position; the paper's code adds them, behind the others, and counts positions anew.
    """
    layers: list[int] = []
    for layer in _LAYERS:
        nearest = math.ceil(layer * num_layers / 32 - 0.5)
        layers.append(max([nearest, 1, *(at + 1 for at in layers)]))
    return staged(tuple(layers), shares, rate)


def shares(x: float) -> tuple[float, ...]:
    """Shares of all tokens in the proportions of `_TOKENS`, until they are all."""
    return tuple(min(1.0, x * tokens / min(_TOKENS)) for tokens in _TOKENS)


def rate(view: View) -> Ranked:
    """Attention of the raters in the layer before, the mean; some of what goes is merged.

    Raters are chosen by the embeddings alone, so at each layer they are the same.
    """
    P = view.is_visual.shape[1]
    slots = jnp.arange(P)
    end = take(view.slots, view.last[:, None])  # [B, 1]
    last_visual = jnp.where(view.is_visual, slots, -1).max(1, keepdims=True)
    asks = (last_visual < slots) & (slots <= end)
    rates = jax.vmap(raters)(view.embeddings, view.is_visual, asks)  # [B, P]
    rates = take(take(rates, view.slots), view.text)  # [B, N]
    scores = view.attention(view.text).mean(1, where=rates[..., None])
    return Ranked(*jax.vmap(recycled)(scores, view.states, view.visual, view.retained))


def raters(x: jax.Array, is_visual: jax.Array, asks: jax.Array) -> jax.Array:
    """Which tokens of the question are about the image: more relevant than their mean.

    Embeddings x [P, d], is_visual and asks (the question's tokens) bool [P] -> bool [P]. Relevance
    is a token's softmax share of a visual token's products with the question, averaged over all
    visual tokens.
    """
    products = jnp.einsum("VD,PD->VP", x, x, preferred_element_type=jnp.float32)
    share = jax.nn.softmax(jnp.where(asks, products, -jnp.inf), axis=1)
    relevance = share.mean(0, where=is_visual[:, None])
    # Tokens that are all alike are all raters, however the mean was rounded.
    return asks & (relevance >= relevance.mean(where=asks) * (1 - 1e-6))


def recycled(
    scores: jax.Array, x: jax.Array, visual: jax.Array, retained: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Scores [S], states x [S, d], visual bool [S] -> (scores [S], states with the merged ones).

    Scores are 2 for tokens that stay, 1 for those merged into, else 0; `retained` are above 0. For
    every hundred that go, rounded up to a third of it, the best thirty are merged into three, which
    stay in their slots and at their positions. These centres are dense (near to as many as there
    are centres, themselves counted) and far from all that are denser; each of the others goes to
    its nearest centre, and the mean of a cluster takes the centre's place.
    """
    S, d = x.shape
    gone = visual.sum(dtype=jnp.int32) - retained
    merged = -(-_RECYCLED * gone // (100 * _CLUSTER))  # rounded up
    merged = merged.clip(0, retained)
    place = _places(scores, visual)
    stays = visual & (place < retained - merged)
    taken = visual & ~stays & (place < retained - merged + _CLUSTER * merged)

    x32 = x.astype(jnp.float32)
    products = jnp.einsum("SD,TD->ST", x32, x32, precision="highest")
    size = jnp.diag(products)
    apart = jnp.maximum(size[:, None] + size - 2 * products, 0) / d  # squared distances
    others = taken & taken[:, None] & ~jnp.eye(S, dtype=bool)
    apart = jnp.where(others, apart, jnp.inf)
    near = jnp.sort(apart, axis=1).sum(1, where=jnp.arange(S) < merged - 1)
    density = jnp.exp(-near / merged.clip(1).astype(jnp.float32))
    ahead = _places(density, taken)  # the denser are ahead; of equals the first
    higher = jnp.where(ahead < ahead[:, None], apart, jnp.inf).min(1)
    farthest = jnp.where(others, apart, 0).max()
    peak = density * jnp.sqrt(jnp.minimum(higher, farthest))
    centre = taken & (_places(peak, taken) < merged)

    to = jnp.where(centre, apart, jnp.inf).argmin(1)
    to = jnp.where(centre, jnp.arange(S), to)
    mean = jax.ops.segment_sum(jnp.where(taken[:, None], x32, 0), to, S)
    mean /= jnp.maximum(jax.ops.segment_sum(taken.astype(jnp.float32), to, S), 1)[:, None]
    scores = jnp.where(stays, 2.0, jnp.where(centre, 1.0, 0.0))
    return scores, jnp.where(centre[:, None], mean.astype(x.dtype), x)


def _places(x: jax.Array, among: jax.Array) -> jax.Array:
    """Places of [S] from the highest down, int32 [S]; those not among come last."""
    order = jnp.argsort(jnp.where(among, -x, jnp.inf))
    return jnp.zeros(len(x), jnp.int32).at[order].set(jnp.arange(len(x)))
