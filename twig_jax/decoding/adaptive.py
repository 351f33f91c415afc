"""Drafting that never costs much: each row keeps an account of what it won and spent.

The unit is a plain step, an iteration without drafts: it gives every row one token. Drafting d
levels makes an iteration longer by cost[d] steps, for all rows at once, and gives a row as many
further tokens as it accepts. A row starts with enough for one try, wins the drafts it accepts, pays
its share of the cost, and receives TAX of a step a token. It drafts while the rows that can afford
a try can pay together, each in proportion to what it has, so that none gets into debt. So all rows
together lose no more than TAX of the tokens and one try each, and where drafting begins to pay, a
try finds out.
"""

import jax
import jax.numpy as jnp

from twig_jax.decoding.cache import State

TAX = 0.03
_DEEPEST = 4.0  # an account holds no more than this many tries, so that bad times are soon noticed


def opening(rows: int, cost: jax.Array) -> jax.Array:
    """Balances of rows that have not drafted yet, float32 [rows]."""
    return jnp.full((rows,), cost.max())


def drafting(state: State, cost: jax.Array) -> jax.Array:
    """Which rows draft in the next iteration, bool [B]. cost float32 [D + 1]."""
    c = state.controls
    # A row's last token is never a draft: it could not pay its share.
    may = ~state.done & (c.gamma > 0) & (c.max_new - state.n > 1)
    able = may & (state.balance >= cost.max())
    purse = jnp.where(able, state.balance, 0).sum()
    return able & (purse >= cost.max() * (~state.done).sum(dtype=cost.dtype))


def settle(
    balance: jax.Array,
    levels: jax.Array,
    matched: jax.Array,
    emitted: jax.Array,
    done: jax.Array,
    cost: jax.Array,
) -> jax.Array:
    """Balances after an iteration; all [B] but cost [D + 1].

    After the prompt, where all rows draft, rows that do not may leave a debt to those that do: it
    is no more than what they themselves started with.
    """
    bill = cost[jnp.where(done, 0, levels).max()] * (~done).sum(dtype=cost.dtype)
    purse = jnp.where((levels > 0) & ~done, balance, 0)
    share = bill * purse / jnp.maximum(purse.sum(), jnp.finfo(cost.dtype).tiny)
    won = matched.astype(cost.dtype) + TAX * emitted.astype(cost.dtype)
    return jnp.minimum(balance + won - share, _DEEPEST * cost.max())
