"""Drafting that never costs much: each row keeps an account of what it won and spent.

The unit is a plain step, an iteration without drafts: it gives every row one token. Drafting d
tokens makes an iteration longer by cost[d] steps, for all rows at once, and gives a row as many
further tokens as it accepts. A row starts with enough for one try, wins the drafts it accepts, pays
its share of the cost, and receives TAX of a step a token. It drafts while the rows that can afford
a share can pay together. So all rows together lose no more than TAX of the tokens and one try, and
where drafting begins to pay, a try finds out.
"""

import jax
import jax.numpy as jnp

from twig_jax.decoding.cache import State

TAX = 0.04
_DEEPEST = 4.0  # an account holds no more than this many tries, so that bad times are soon noticed


def opening(rows: int, cost: jax.Array) -> jax.Array:
    """Balances of rows that have not drafted yet, float32 [rows]."""
    return jnp.full((rows,), cost.max())


def drafting(state: State, cost: jax.Array) -> jax.Array:
    """Which rows draft in the next iteration, bool [B]. cost float32 [W]."""
    alive = ~state.done & (state.controls.gamma > 0)
    able = alive & (state.balance >= cost.max())
    purse = jnp.where(able, state.balance, 0).sum()
    return able & (purse >= cost.max() * (~state.done).sum(dtype=cost.dtype))


def settle(
    balance: jax.Array,
    drafted: jax.Array,
    matched: jax.Array,
    emitted: jax.Array,
    done: jax.Array,
    cost: jax.Array,
) -> jax.Array:
    """Balances after an iteration; all [B] but cost [W]. Rows that were done keep theirs."""
    payers = (drafted > 0) & ~done
    bill = cost[jnp.where(done, 0, drafted).max()] * (~done).sum(dtype=cost.dtype)
    share = jnp.where(payers, bill / jnp.maximum(payers.sum(dtype=cost.dtype), 1), 0)
    won = matched.astype(cost.dtype) + TAX * emitted.astype(cost.dtype)
    new = balance + won - share
    return jnp.where(done, balance, jnp.minimum(new, _DEEPEST * cost.max()))
