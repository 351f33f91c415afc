"""What is drawn, and that it depends on a row's seed and a token's position alone.

All seeds are fixed, so a chi-square test gives the same value in every run. LIKELY is what chance
would pass in 999 of 1,000 choices of seeds, and another test shows what it does not let pass.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.decoding.models import (
    CALL,
    CONFIG,
    LARGEST,
    change,
    forced,
    generator,
    request,
    run,
    tokens,
)
from twig_jax.decoding.buckets import Bucket
from twig_jax.decoding.sampling import choose, filtered, gumbel, scores
from twig_jax.decoding.settings import Settings, controls

LIKELY = 1e-3
EOS = CONFIG.eos_token_id

# One draw.

SEVEN = np.array([1.5, 0.2, -0.4, 2.0, 0.9, -1.0, 1.1], np.float32)


def draw(own: Settings, rows: int, columns: int) -> np.ndarray:
    """Tokens [rows, columns] drawn from SEVEN: every row with a seed, every column a position."""
    each = [dataclasses.replace(own, seed=seed) for seed in range(rows)]
    c = jax.tree.map(jnp.asarray, controls(each, eos=EOS))
    where = jnp.broadcast_to(jnp.arange(columns), (rows, columns))
    seen = jnp.zeros((rows, 7), bool).at[:, 3].set(True)
    path = jnp.full((rows, columns, 1), -1).at[..., 0].set(4)
    logits = jnp.broadcast_to(SEVEN, (rows, columns, 7))
    chosen = jax.jit(lambda c, x, n, at, path: choose(c, x, n, at, lambda: seen, path))
    return np.asarray(chosen(c, logits, where * 0, where, path))


def exact(temperature=1.0, top_k=7, top_p=1.0, min_p=0.0, penalty=1.0, min_new=0) -> np.ndarray:
    """The probabilities of SEVEN, written down once more; tokens 3 and 4 were there before."""
    x = SEVEN.astype(np.float64)
    x[[3, 4]] = np.where(x[[3, 4]] > 0, x[[3, 4]] / penalty, x[[3, 4]] * penalty)
    if min_new:
        x[EOS] = -np.inf
    p = np.exp(x / temperature)
    p[np.argsort(-p)[top_k:]] = 0
    p /= p.sum()
    order = np.argsort(-p)
    p[order[np.cumsum(p[order]) - p[order] >= top_p]] = 0
    p[p < min_p * p.max()] = 0
    return p / p.sum()


def likelihood(counts: np.ndarray, p: np.ndarray) -> float:
    """The p-value of counts under probabilities p. What cannot be drawn must not have been."""
    assert counts[p == 0].sum() == 0
    return float(stats.chisquare(counts[p > 0], p[p > 0] * counts.sum()).pvalue)


@pytest.mark.parametrize(("rows", "columns"), [(12_000, 1), (100, 120), (1, 12_000)])
@pytest.mark.parametrize(
    "own",
    [
        {"temperature": 1.0},
        {"temperature": 0.4},
        {"temperature": 1.8},
        {"temperature": 1.0, "top_k": 3},
        {"temperature": 1.3, "top_p": 0.7},
        {"temperature": 1.0, "min_p": 0.3},
        {"temperature": 1.0, "repetition_penalty": 1.7, "min_new_tokens": 1},
        {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 0.7},
    ],
    ids=str,
)
def test_draws_have_the_exact_probabilities(own, rows, columns) -> None:
    """Over seeds, over positions, and over both."""
    names = {"repetition_penalty": "penalty", "min_new_tokens": "min_new"}
    p = exact(**{names.get(k, k): v for k, v in own.items()})
    counts = np.bincount(draw(Settings(**own), rows, columns).ravel(), minlength=7)
    assert likelihood(counts, p) > LIKELY


def test_slightly_wrong_probabilities_are_noticed() -> None:
    counts = np.bincount(draw(Settings(temperature=1.0), 12_000, 1).ravel(), minlength=7)
    assert likelihood(counts, exact(temperature=1.1)) < LIKELY


@pytest.mark.parametrize("axis", [0, 1])
def test_neighbouring_draws_are_independent(axis) -> None:
    """Of one row at neighbouring positions, and of rows with neighbouring seeds."""
    found = np.moveaxis(draw(Settings(temperature=1.0), 160, 160), axis, 0)
    pairs = np.bincount((found[::2] * 7 + found[1::2]).ravel(), minlength=49)
    assert likelihood(pairs, np.outer(exact(), exact()).ravel()) > LIKELY


def test_temperature_zero_takes_the_likeliest_token() -> None:
    assert (draw(Settings(), 3, 5) == SEVEN.argmax()).all()
    assert (draw(Settings(repetition_penalty=2.0), 3, 5) == 0).all()


@pytest.mark.parametrize("temperature", [1e-20, 1e-36, 3e-38, 1.2e-38])
def test_the_lowest_temperatures_take_the_likeliest_token_too(temperature) -> None:
    logits = jnp.array([[[12.0, 10.0, 30.0, 8.0]]])
    found = filtered(controls([Settings(temperature=temperature)], eos=-1), logits)
    assert jnp.isfinite(found[0, 0, 2]) and found[0, 0].argmax() == 2
    assert jax.nn.softmax(found)[0, 0].tolist() == [0, 0, 1, 0]


# Filters, against another implementation.

V = 23


def theirs(own: Settings, logits: np.ndarray, prompt: list[int], answer: list[int]) -> np.ndarray:
    """Probabilities [V] after transformers' processors, in the order its `generate` has them."""
    steps = [RepetitionPenaltyLogitsProcessor(own.repetition_penalty)]
    if own.min_new_tokens:
        steps.append(
            MinNewTokensLengthLogitsProcessor(len(prompt), own.min_new_tokens, EOS, device="cpu")
        )
    steps.append(TemperatureLogitsWarper(own.temperature))
    if own.top_k:
        steps.append(TopKLogitsWarper(own.top_k))
    if own.top_p < 1:
        steps.append(TopPLogitsWarper(own.top_p))
    if own.min_p:
        steps.append(MinPLogitsWarper(own.min_p))
    ids = torch.tensor([prompt + answer])
    return LogitsProcessorList(steps)(ids, torch.tensor(logits)[None]).softmax(-1)[0].numpy()


filters = st.builds(
    Settings,
    temperature=st.floats(0.2, 2),
    top_k=st.sampled_from([0, 1, 4, V, 50]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    repetition_penalty=st.sampled_from([0.6, 1.0, 1.3, 3.0]),
    min_new_tokens=st.integers(0, 6),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(filters, min_size=6, max_size=6), st.integers(0, 10_000))
def test_filters_equal_those_of_transformers(own, seed) -> None:
    """Six rows with their own settings; half of an answer is in `seen`, the rest on the path."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (6, 1, V)).astype(np.float32)
    prompt, answer = rng.integers(0, V, (6, 5)), rng.integers(0, V, (6, 4))
    seen = np.zeros((6, V), bool)
    np.put_along_axis(seen, np.concatenate([prompt, answer[:, :2]], axis=1), True, axis=1)
    c = jax.tree.map(jnp.asarray, controls(own, eos=EOS))
    n = np.full((6, 1), 4)
    noisy = jax.jit(lambda c, x, n, seen, path: scores(c, x, n, n, lambda: seen, path))(
        c, logits, n, seen, answer[:, None, 2:].astype(np.int32)
    )
    ours = jax.nn.softmax(noisy - gumbel(c.seed, n, V))[:, 0]
    for row in range(6):
        known = theirs(own[row], logits[row, 0], prompt[row].tolist(), answer[row].tolist())
        assert ((known > 0) == (np.asarray(ours[row]) > 0)).all()
        np.testing.assert_allclose(ours[row], known, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "own", [{"top_k": 50}, {"top_p": 0.9}, {"top_p": 0.999}, {"top_k": 200, "top_p": 0.8}], ids=str
)
def test_filters_of_thirty_thousand_words_equal_those_of_transformers(own) -> None:
    """But for words that a sum in float32 may put on either side of top_p, an error of 1e-5."""
    logits = np.random.default_rng(0).normal(0, 3, (2, 3, 32_000)).astype(np.float32)
    one = Settings(temperature=0.7, **own)
    c = jax.tree.map(jnp.asarray, controls([one, one], eos=EOS))
    passed = np.isfinite(jax.jit(filtered)(c, logits))
    off = 1e-5 if one.top_p < 1 else 0
    for row, query in np.ndindex(2, 3):
        least, most = (
            theirs(dataclasses.replace(one, top_p=p), logits[row, query], [], []) > 0
            for p in (one.top_p - off, one.top_p + off)
        )
        assert (least <= passed[row, query]).all() and (passed[row, query] <= most).all()
        assert 0 <= most.sum() - least.sum() < 100


def test_equal_logits_pass_together() -> None:
    """Also zeros of both signs, and what is below zero."""
    each = [Settings(temperature=1, top_k=2), Settings(temperature=1, top_p=0.6)]
    c = jax.tree.map(jnp.asarray, controls(each, eos=EOS))
    for tie in (2.0, 0.0, -2.0):
        logits = np.array([tie + 1, tie, tie, tie - 1, -np.inf], np.float32)
        logits[2] = -0.0 if tie == 0 else tie
        # The first token has 0.53 of the mass, so that top_p needs another one too.
        passed = np.isfinite(filtered(c, jnp.broadcast_to(logits, (2, 1, 5))))
        assert passed[:, 0].tolist() == [[True, True, True, False, False]] * 2


def test_the_smallest_top_p_keeps_the_likeliest_token() -> None:
    """Also one that float32 has as zero."""
    own = Settings(temperature=1, top_p=1e-46)
    c = jax.tree.map(jnp.asarray, controls([own, Settings(top_k=2)], eos=EOS))
    passed = np.isfinite(filtered(c, jnp.broadcast_to(jnp.arange(40.0), (2, 1, 40))))
    assert np.flatnonzero(passed[0, 0]).tolist() == [39]


def test_a_row_without_filters_keeps_every_token_beside_one_with() -> None:
    """Also those whose probability rounds to nothing in a sum."""
    c = jax.tree.map(jnp.asarray, controls([Settings(temperature=1), Settings(top_k=2)], eos=EOS))
    logits = jnp.broadcast_to(-jnp.arange(40.0), (2, 1, 40))
    assert np.isfinite(filtered(c, logits)).sum((1, 2)).tolist() == [40, 2]


# Whole answers.


@pytest.mark.parametrize(("mode", "images"), [("plain", 0), ("ttp_ssd", 1)])
def test_frequencies_of_short_answers_match_enumeration(mode, images) -> None:
    """Answers of two tokens of a vocabulary of five, against their exact probabilities."""
    text = dataclasses.replace(CONFIG.text, vocab_size=5)
    rows = 512
    bucket = Bucket(rows, 16, images, 2)
    model = generator(text=text, made={"buckets": [bucket]})
    temperature = 6.0  # flat enough for many likely answers
    one = request(4, images, 3, 4)
    one = dataclasses.replace(one, ids=one.ids % 5)
    call = dataclasses.replace(CALL, mode=mode, temperature=temperature, max_new_tokens=2)
    counts: dict[tuple[int, ...], int] = {}
    for first in range(0, 8 * rows, rows):
        batch = [
            dataclasses.replace(one, settings=dataclasses.replace(call, seed=first + i))
            for i in range(rows)
        ]
        results = model.generate(batch, call)
        for result in results:
            answer = (*result.tokens.tolist(), *[EOS] * (result.stopped_by == "eos"))
            counts[answer] = counts.get(answer, 0) + 1
    kept = len(results[0].kept)

    def probabilities(token: int) -> np.ndarray:
        logits = forced(model, one, np.array([token], np.int32), kept).logits[0]
        return np.asarray(jax.nn.softmax(logits / temperature), np.float64)

    known = {}
    for token in range(5):
        p = probabilities(token)
        if token == EOS:
            known[(token,)] = p[0, token]
        else:
            known |= {(token, second): p[0, token] * p[1, second] for second in range(5)}
    assert set(counts) <= set(known) and sum(known.values()) == pytest.approx(1)
    found = np.array([counts.get(answer, 0) for answer in known])
    p = np.array(list(known.values())) / sum(known.values())
    # Chi-square's approximation wants five of each: rare answers count together.
    rare = p * found.sum() < 5
    found, p = (np.append(x[~rare], x[rare].sum()) for x in (found, p))
    assert len(p) > 8
    assert likelihood(found, p) > LIKELY


def test_a_row_of_a_mixed_batch_equals_the_row_alone() -> None:
    """Rows may differ in all of this; the largest gamma and shape fix the program."""
    widest = change(LARGEST, gamma=4, temperature=0.9, seed=5)
    answer = run([request(11, 1, 6, 3, temperature=0.0)], mode="ttp")[0].tokens.tolist()
    eos = next(token for token in answer if token not in answer[:2])
    rows = [
        widest,
        request(11, 1, 6, 3, gamma=4, stop=(tuple(answer[:2]),)),
        request(12, 0, 2, 6, gamma=0, temperature=1.0, top_k=5, seed=1, max_new_tokens=9),
        request(13, 2, 1, 1, gamma=1, temperature=0.6, top_p=0.8, seed=2, avg_retained=3.2),
        request(14, 1, 8, 8, gamma=2, theta=0.6, repetition_penalty=1.5, max_new_tokens=1),
        request(15, 0, 1, 7, gamma=4, temperature=1.4, min_p=0.1, min_new_tokens=12),
        request(11, 1, 6, 3, gamma=3, theta=1.1),
        request(17, 1, 3, 5, gamma=4, theta=0.0, temperature=2.0, repetition_penalty=1.2),
    ]
    model = generator(made={"buckets": [Bucket(8, 16, 2, 14)]}, eos_token_id=eos)
    call = dataclasses.replace(CALL, avg_retained=5)
    together = model.generate(rows, call)
    assert {r.stopped_by for r in together} == {"stop", "eos", "length"}
    for one, row in zip(rows, together, strict=True):
        # With the widest as the only companion where the row alone would be another program.
        company = [] if one.settings.gamma == 4 else [widest]
        alone = model.generate([*company, one], call)[-1]
        assert alone.tokens.tolist() == row.tokens.tolist()
        assert alone.stopped_by == row.stopped_by
        assert alone.accepted.tolist() == row.accepted.tolist()


sampled = st.lists(
    st.builds(
        request,
        prompt=st.integers(0, 10_000),
        images=st.integers(0, 2),
        before=st.integers(1, 8),
        after=st.integers(1, 8),
        avg_retained=st.sampled_from([3.2, 4, 5]),
        max_new_tokens=st.integers(8, 14),
        temperature=st.sampled_from([0.0, 0.5, 1.0, 1.5]),
        top_k=st.sampled_from([0, 3, 10]),
        top_p=st.sampled_from([0.6, 0.95, 1.0]),
        min_p=st.sampled_from([0.0, 0.1]),
        repetition_penalty=st.sampled_from([0.8, 1.0, 1.3]),
        min_new_tokens=st.sampled_from([0, 6]),
    ),
    min_size=3,
    max_size=3,
).map(lambda drawn: [LARGEST, *drawn])


@settings(max_examples=10, deadline=None)
@given(sampled, st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.1, 0.5]))
def test_sampled_speculation_changes_nothing(requests, seed, theta) -> None:
    for fast, slow in (("ssd", "plain"), ("ttp_ssd", "ttp")):
        drafting = run(requests, mode=fast, theta=theta, seed=seed)
        assert tokens(drafting) == tokens(run(requests, mode=slow, seed=seed))


def warm(seed: int) -> list[list[int]]:
    few = [request(i, 1, 4, 4, avg_retained=4) for i in range(3)]
    return tokens(run([LARGEST, *few], temperature=1.0, seed=seed))


def test_some_sampled_drafts_are_accepted_and_some_are_not() -> None:
    """Without this the equalities above could hold for an engine that never drafts."""
    results = []
    for s in range(4):
        few = [request(10 * s + i, 1, 4, 4, avg_retained=4) for i in range(3)]
        results += run([LARGEST, *few], theta=0.0, temperature=1.0, seed=s)
    drafted = sum(len(d) for r in results for d in r.drafts)
    matched = sum(int(r.matched.sum()) for r in results)
    assert 0.1 < matched / drafted < 0.9


def test_a_seed_gives_the_same_answers_again_and_another_seed_others() -> None:
    first = warm(1)
    assert warm(1) == first
    for other in (0, 2, 2**32 - 1):
        assert all(a != b for a, b in zip(warm(other), first, strict=True))


def test_sampled_answers_equal_the_teacher_forced_pruned_pass() -> None:
    """Every token is the choice of an independent one-pass computation with the same noise."""
    own = {"temperature": 1.0, "top_p": 0.95, "repetition_penalty": 1.3, "min_new_tokens": 14}
    few = [request(i, 1, 4, 4, avg_retained=4) for i in range(3)]
    (one, *_) = requests = [LARGEST, *few]
    (result, *_) = run(requests, seed=3, **own)
    answer = result.tokens
    logits = forced(generator(), one, answer, len(result.kept)).logits
    n = jnp.arange(len(answer) + 1)
    seen = np.zeros((1, CONFIG.text.vocab_size), bool)
    seen[0, one.ids[~one.is_visual]] = True
    path = np.where(np.arange(len(answer)) < n[:, None], answer, -1)
    c = jax.tree.map(jnp.asarray, controls([Settings(seed=3, **own)], eos=EOS))
    chosen = choose(c, logits, n[None], (len(one.ids) + n)[None], lambda: seen, path[None])
    assert chosen[0, :-1].tolist() == answer.tolist()
