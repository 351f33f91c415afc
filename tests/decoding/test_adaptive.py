"""Drafting that is switched off where it does not pay, and on again where it does."""

import dataclasses
import logging
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import multihost_utils

from tests.decoding.models import CONFIG, TWIG, change, request, run, tokens, weights
from twig_jax.decoding.adaptive import TAX, drafting, opening, settle
from twig_jax.decoding.buckets import Bucket
from twig_jax.decoding.cache import State
from twig_jax.decoding.generate import Generator
from twig_jax.decoding.settings import Request, Settings, controls
from twig_jax.models.twig import init_twig

# The account, over made-up iterations.

WIDTH = 5


def account(gammas, news, prices, luck) -> tuple[float, float, int, np.ndarray]:
    """(plain steps paid, drafts accepted, tokens emitted, lowest balances) of one batch.

    luck [iterations, B]: what share of its drafts each row has accepted. Other parts of a state
    than the account's are left out.
    """
    B = len(gammas)
    each = [Settings(gamma=g, max_new_tokens=n) for g, n in zip(gammas, news, strict=True)]
    c = controls(each, eos=-1)
    cost = np.concatenate([[0], np.cumsum(prices)]).astype(np.float32)
    n, done = np.zeros(B, np.int32), np.zeros(B, bool)
    balance = np.asarray(opening(B, cost))
    blank = State(*[None] * len(State._fields))
    paid = accepted = 0.0
    draws, lowest = np.ones(B, bool), np.full(B, np.inf)  # the prompt is followed by drafts
    for lot in luck:
        limit = np.minimum(c.gamma, c.max_new - n - 1)
        drafted = np.where(draws & ~done, limit, 0).astype(np.int32)
        matched = np.round(lot * drafted).astype(np.int32)
        count = np.where(done, 0, matched + 1).astype(np.int32)
        paid += float(cost[drafted.max()]) * int((~done).sum())
        accepted += matched.sum()
        balance = np.asarray(_settle(balance, drafted, matched, count, done, cost))
        n += count
        done |= n >= c.max_new
        lowest = np.minimum(lowest, balance)
        state = blank._replace(controls=c, n=n, balance=balance, done=done)
        draws = np.asarray(_drafting(state, cost))
    return paid, accepted, int(n.sum()), lowest


_settle, _drafting = jax.jit(settle), jax.jit(drafting)

B = 4


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, WIDTH - 1), min_size=B, max_size=B),
    st.lists(st.integers(1, 120), min_size=B, max_size=B),
    st.lists(st.floats(0, 2), min_size=WIDTH - 1, max_size=WIDTH - 1),
    st.integers(0, 10_000),
)
def test_drafting_never_costs_more_than_was_promised(gammas, news, prices, seed) -> None:
    """One try a row, and TAX of the tokens; whatever is accepted, and whichever rows end first."""
    rng = np.random.default_rng(seed)
    good = np.repeat(rng.choice([0.0, 0.3, 0.8, 1.0], (12, B)), 10, axis=0)  # times change
    luck = np.sqrt(rng.random((120, B))) * (rng.random((120, B)) < good)
    paid, accepted, emitted, lowest = account(gammas, news, prices, luck)
    promise = B * sum(prices) + TAX * emitted
    assert paid - accepted <= promise * (1 + 1e-4) + 1e-3
    # Nobody gets into debt, but where rows that may not draft lend what they started with.
    if all(gammas) and min(news) > 1:
        assert lowest.min() >= -1e-3 * (1 + sum(prices))


def test_rows_pay_in_proportion_to_what_they_have() -> None:
    """An iteration that drafts is one step longer for four rows; two of them pay."""
    balance, drafted = np.float32([3, 1.5, 0.2, 0.1]), np.int32([4, 2, 0, 0])
    nothing, cost = np.zeros(B, np.int32), np.linspace(0, 1, WIDTH, dtype=np.float32)
    left = _settle(balance, drafted, nothing, nothing, np.zeros(B, bool), cost)
    np.testing.assert_allclose(left, [3 - 4 * 3 / 4.5, 1.5 - 4 * 1.5 / 4.5, 0.2, 0.1], rtol=1e-5)


def test_rows_draft_that_can_afford_a_try_together() -> None:
    """A try of one step costs two rows two steps. Who has only a last token to emit, or less than
    one step, neither drafts nor pays."""
    cost, c = np.float32([0, 0.5, 1]), controls([Settings(max_new_tokens=9)] * 2, eos=-1)
    state = State(*[None] * len(State._fields))._replace(controls=c, done=np.zeros(2, bool))
    for n, balance, draws in (
        ([3, 7], [1.5, 1], [True, True]),
        ([3, 8], [1.5, 1], [False, False]),
        ([3, 8], [2, 1], [True, False]),
        ([3, 7], [2, 0.5], [True, False]),
    ):
        one = state._replace(n=np.int32(n), balance=np.float32(balance))
        assert _drafting(one, cost).tolist() == draws


def test_bad_times_are_soon_noticed() -> None:
    """Whatever was won before, it pays for no more than four tries of two steps."""
    luck = np.repeat([1.0, 0.0], 50)[:, None] * np.ones(B)
    paid, *_ = account([4] * B, [10_000] * B, [0.5] * 4, luck)
    assert paid / B / 2 == 50 + 4


def test_drafting_goes_on_while_it_pays() -> None:
    gammas, news = [4] * B, [10_000] * B
    luck = np.ones((100, B))
    _, accepted, emitted, _ = account(gammas, news, [0.5] * 4, luck)
    assert accepted / emitted == 4 / 5


def test_drafting_that_never_pays_is_rare() -> None:
    """A try of two steps a row is affordable every 2 / TAX tokens."""
    paid, accepted, emitted, _ = account([4] * B, [10_000] * B, [0.5] * 4, np.zeros((500, B)))
    assert accepted == 0
    assert paid / B / 2 == pytest.approx(1 + emitted / B * TAX / 2, abs=1)


def test_a_good_row_pays_for_its_companions() -> None:
    """One row in four wins more than drafting costs all of them."""
    luck = np.zeros((300, B))
    luck[:, 0] = 1
    _, accepted, _, _ = account([4] * B, [10_000] * B, [0.2] * 4, luck)
    assert accepted == 4 * 300


# The engine. Long answers in one bucket: a try costs 1.2 steps, so pauses last 1.2 / TAX tokens.

NEW = 96
PAUSE = 40
CALL = Settings("ssd", max_new_tokens=NEW, gamma=3, theta=0.0, adaptive=True)
COST = 0.4


def row(prompt: int, images: int, **changes: Any) -> Request:
    return change(request(prompt, images, 6, 3), **dataclasses.asdict(CALL) | changes)


ROWS = [
    row(21, 1),
    row(22, 0, temperature=0.7, seed=1),
    row(23, 1, temperature=1.2, seed=2, max_new_tokens=70),
]


def model(good: bool = True) -> Generator:
    """A base whose twig is nearly always right, or random. Answers do not end by themselves."""
    config = dataclasses.replace(CONFIG, eos_token_id=-1)
    base = weights(0, 0.05)
    twig = init_twig(base, config.text, TWIG)
    if not good:
        rng = np.random.default_rng(0)
        twig = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)), twig)
    buckets = [Bucket(3, 16 + NEW, 1, NEW)]
    return Generator(config, base, TWIG, twig, buckets=buckets, draft_cost=COST)


@pytest.mark.parametrize("good", [True, False])
def test_adaptive_drafting_changes_no_token(good) -> None:
    """Greedy and sampled rows. A twig that is right drafts all the time, a random one seldom."""
    adaptive = run(ROWS, CALL, model(good))
    assert tokens(adaptive) == tokens(run(ROWS, CALL, model(), mode="plain", adaptive=False))
    for result in adaptive:
        tries = sum(len(d) > 0 for d in result.drafts)
        if good:
            assert tries >= len(result.drafts) - 1
        else:
            assert 1 < tries <= 2 + len(result.tokens) / PAUSE


def test_drafts_after_a_pause_are_those_without_one() -> None:
    """The twig catches up over what it missed: drafts equal those of a call whose prompt is the
    whole answer so far, greedy and sampled."""
    for one in (ROWS[0], ROWS[1]):
        running = model().start([one], CALL)
        running.state = running.state._replace(balance=jnp.zeros(3))
        running.run(NEW)
        (result,) = running.results()
        places = np.concatenate([[0], np.cumsum(result.matched + 1)])
        resumed = [i for i, drafts in enumerate(result.drafts) if i and len(drafts)][:3]
        assert places[resumed[0]] >= PAUSE
        later = []
        for place in places[resumed]:
            ids = np.concatenate([one.ids, result.tokens[:place]])
            is_visual = np.pad(one.is_visual, (0, place))
            fresh = dataclasses.replace(one, ids=ids, is_visual=is_visual)
            later.append(change(fresh, max_new_tokens=NEW - int(place)))
        known = model().start(later, CALL).results()
        for i, fresh in zip(resumed, known, strict=True):
            assert result.drafts[i].tolist() == fresh.drafts[0].tolist()
            np.testing.assert_allclose(result.probs[i], fresh.probs[0], atol=1e-5)


def test_the_cost_of_drafting_is_measured_where_none_is_given(monkeypatch, caplog) -> None:
    """Tokens do not depend on what the clock says, and what was interrupted is measured again."""
    timed = model()
    timed.draft_cost = None
    with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
        interrupted.setattr(timed, "decode", Mock(side_effect=KeyboardInterrupt))
        run(ROWS, CALL, timed)
    # A model of one process is nothing to others that there may be.
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", Mock(side_effect=AssertionError))
    with caplog.at_level(logging.INFO, "twig_jax"):
        assert tokens(run(ROWS, CALL, timed)) == tokens(run(ROWS, CALL, model()))
    assert "an iteration that drafts costs" in caplog.text
