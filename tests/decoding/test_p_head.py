"""Decoding with a twig that has a P-Head: it alone decides what is kept, and nothing else."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.decoding.models import CALL, CONFIG, TWIG, generator, mixed, request
from twig_jax.decoding.buckets import Bucket
from twig_jax.decoding.session import Session
from twig_jax.decoding.settings import Request
from twig_jax.models.twig import fresh_p_head

RANKS = dataclasses.replace(TWIG, p_head=True)


@pytest.fixture(autouse=True)
def precise():
    with jax.default_matmul_precision("highest"):
        yield


def model(trained=True, **made):
    """The usual twig with a P-Head, drawn at random or fresh; `made` is for the Generator."""
    found = generator(RANKS, made=made)
    rng = np.random.default_rng(0)
    head = jax.tree.map(
        lambda x: np.asarray(rng.normal(size=x.shape), np.float32), fresh_p_head(CONFIG.text)
    )
    if trained:
        found.weights = found.weights._replace(twig={**found.weights.twig, "p_head": head})
    return found


@pytest.fixture(scope="module")
def ours():
    return model()


def test_scores_are_a_distribution_over_visual_tokens(ours):
    requests = mixed()
    for r, result in zip(requests, ours.generate(requests, CALL), strict=True):
        scores = result.scores[: len(r.ids)]
        assert not scores[~r.is_visual].any()
        if r.is_visual.any():
            assert scores.sum() == pytest.approx(1, abs=1e-5)
            R = len(result.kept)
            best = np.flatnonzero(r.is_visual)[np.argsort(-scores[r.is_visual], kind="stable")[:R]]
            assert sorted(best) == result.kept.tolist()


def test_a_fresh_head_ranks_one_head_s_attention_as_it_is(ours):
    """Of several heads the one is the mean of shares, the other the share of the mean."""
    fresh, trained = model(trained=False), ours
    call = dataclasses.replace(CALL, selector="attention")
    r = request(1, 1, 2, 5)
    by_attention = fresh.generate([r], call)[0]
    own = by_attention.scores[: len(r.ids)][r.is_visual]
    found = fresh.generate([r], CALL)[0].scores[: len(r.ids)][r.is_visual]
    assert np.corrcoef(own, found)[0, 1] > 0.9
    assert trained.generate([r], CALL)[0].kept.tolist() != by_attention.kept.tolist()
    # What attention would keep does not depend on the head.
    assert trained.generate([r], call)[0].kept.tolist() == by_attention.kept.tolist()


def test_drafting_changes_nothing(ours):
    for mode, slow in (("ttp_ssd", "ttp"), ("ssd", "plain")):
        fast, plain = (
            ours.generate([dataclasses.replace(r, settings=None) for r in mixed()], call)
            for call in (dataclasses.replace(CALL, mode=m, avg_retained=4) for m in (mode, slow))
        )
        for a, b in zip(fast, plain, strict=True):
            np.testing.assert_array_equal(a.tokens, b.tokens)
            np.testing.assert_array_equal(a.kept, b.kept)


def test_rows_do_not_depend_on_their_batch(ours):
    requests = mixed()
    together = ours.generate(requests, CALL)
    for r, result in zip(requests, together, strict=True):
        alone = ours.generate([r], CALL)[0]
        np.testing.assert_array_equal(alone.tokens, result.tokens)
        np.testing.assert_array_equal(alone.kept, result.kept)


def test_turns_equal_the_whole_conversation():
    """Gates of earlier images are kept, and of a new image added."""
    found = model(buckets=[Bucket(rows=1, text=64, images=2, new=32)])
    settings = dataclasses.replace(CALL, max_new_tokens=9)
    session, pixels = Session(found, settings), []
    for seed, images, before, after in ((1, 1, 3, 4), (2, 0, 2, 3), (3, 1, 2, 2)):
        turn = request(seed, images, before, after)
        if turn.pixels is not None:
            pixels.append(turn.pixels)
        ids = np.concatenate([session.ids, turn.ids])
        is_visual = np.concatenate([session.is_visual, turn.is_visual])
        whole = Request(ids, is_visual, pixels=np.concatenate(pixels))
        result = session.ask(turn.ids, turn.is_visual, turn.pixels)
        expected = found.generate([whole], settings)[0]
        np.testing.assert_array_equal(result.tokens, expected.tokens)
        np.testing.assert_array_equal(result.kept, expected.kept)
