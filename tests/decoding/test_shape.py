"""The tree that is fastest, by made-up costs and by measured ones."""

import dataclasses
import json
import time
from types import SimpleNamespace

import numpy as np
import pytest

from tests.decoding.models import generator, request, tokens
from twig_jax.config import TwigConfig
from twig_jax.decoding import shape
from twig_jax.decoding.buckets import Bucket
from twig_jax.decoding.generate import Generator
from twig_jax.decoding.settings import Settings
from twig_jax.decoding.shape import Costs, choose_tree, expected, fitted, hit_rates
from twig_jax.decoding.tree import Tree

HITS = np.array([0.5, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01, 0.01, 0.0, 0.0])
CALL = Settings("ssd", max_new_tokens=14, theta=0.0)


def test_what_a_tree_is_expected_to_accept() -> None:
    assert expected(Tree.of(3), HITS) == pytest.approx(0.5 + 0.25 + 0.125)
    assert expected(Tree.of(1, 3), HITS) == pytest.approx(0.8)
    # Two of 0.5, 0.2 and, below the first alone, 0.25 and 0.1.
    assert expected(Tree.of(2, 2, 1, 0), HITS) == pytest.approx(0.5 + 0.2 + 0.25 + 0.1)
    assert expected(Tree.of(2, 2, 1, 2), HITS) == pytest.approx(0.5 + 0.25)


def test_where_verification_is_free_trees_are_wide() -> None:
    tree = choose_tree(Costs({1: 1.0, 10: 1.0}, {1: 10.0, 100: 10.0}), HITS)
    assert tree.children > 2 and tree.expanded > 2 and tree.kept > 20


def test_where_width_costs_as_much_as_depth_there_are_chains() -> None:
    tree = choose_tree(Costs({1: 0.1, 10: 1.0}, {2: 2.0, 100: 100.0}), np.array([0.9, 0.05]))
    assert tree.children == 1 and tree.depth == tree.kept


def test_where_levels_are_dear_trees_are_flat() -> None:
    assert choose_tree(Costs({1: 50.0, 10: 50.0}, {1: 1.0, 100: 1.0}), HITS).depth == 1


def test_costs_between_and_beyond_the_measured() -> None:
    costs = Costs({1: 1.0, 4: 2.5}, {2: 10.0, 9: 17.0})
    assert costs.iteration(Tree.of(1)) == pytest.approx(1 + 10)
    assert costs.iteration(Tree.of(2, 3, 3, 6)) == pytest.approx(1 + 2 + 15)
    assert costs.iteration(Tree.of(2, 10, 10, 20)) == pytest.approx(1 + 5.5 + 29)


@pytest.fixture(scope="module")
def few():
    return [request(i, 0, 4, 4) for i in range(3)]


def right(buckets=()) -> Generator:
    """A base and a twig of all its layers, so that no draft is refused."""
    return generator(TwigConfig(K=1, T=4, K_f=5), made={"buckets": buckets}, eos_token_id=-1)


@pytest.fixture(scope="module")
def ranked(few):
    """Answers with all candidates of every place."""
    return generator().generate(few, dataclasses.replace(CALL, gamma=1, children=shape.RANKS))


def test_candidates_are_counted_by_what_the_base_chose(ranked) -> None:
    hits = hit_rates(ranked)
    assert 0.1 < hits[0] <= 1 and hits.sum() <= 1
    drafted = sum(len(d) > 0 for r in ranked for d in r.drafts)
    assert hits.sum() == pytest.approx(sum(r.matched.sum() for r in ranked) / drafted, abs=0.1)


def test_places_where_nothing_was_drafted_do_not_count() -> None:
    """Nor those past an answer's end."""
    drafts = [[5, 1], [], [2, 8], [9, 9]]
    result = SimpleNamespace(
        tokens=np.array([5, 6, 7, 8]),
        drafts=[np.array(each, np.int32) for each in drafts],
        matched=np.array([1, 0, 1, 0]),
    )
    assert hit_rates([result])[:3].tolist() == [1 / 2, 1 / 2, 0]


def test_costs_are_measured_once(few, ranked, tmp_path, monkeypatch) -> None:
    """And whatever tree they lead to, tokens stay."""
    monkeypatch.setattr(shape, "_TIMED_WIDTHS", (1,))
    monkeypatch.setattr(shape, "_TIMED_KEPT", (3,))
    model, cache = generator(), tmp_path / "cache" / "costs.json"
    first = fitted(model, few, CALL, cache)
    (costs,) = json.loads(cache.read_text()).values()
    assert [list(part) for part in costs] == [["1"], ["4"]]
    monkeypatch.setattr(time, "perf_counter", lambda: pytest.fail("timed again"))
    monkeypatch.setattr(model, "generate", lambda *_: ranked)
    assert fitted(model, few, CALL, cache) == first
    monkeypatch.undo()
    assert tokens(model.generate(few, first)) == tokens(ranked)
    with pytest.raises(ValueError, match=r"mode plain .* drafts nothing"):
        fitted(model, few, dataclasses.replace(CALL, mode="plain"), cache)


def test_a_cache_that_cannot_be_used_costs_no_answer(few, tmp_path, monkeypatch, caplog) -> None:
    made_up = ({1: 1.0, 4: 1.0}, {2: 5.0, 8: 5.0})
    monkeypatch.setattr(shape, "_timed", lambda *_: made_up)
    (tmp_path / "file").write_text("{damaged")
    for cache in (tmp_path / "file" / "costs.json", tmp_path / "file"):
        assert shape.measure(generator(), few, CALL, cache).iteration(Tree.of(1)) > 0
    assert "what was timed is not kept" in caplog.text
    assert json.loads((tmp_path / "file").read_text())


def test_short_answers_are_no_measure_of_compiling(few, tmp_path, monkeypatch) -> None:
    """A twig that is always right ends answers of four tokens with their prompts."""
    monkeypatch.setattr(shape, "_TIMED_WIDTHS", (1,))
    monkeypatch.setattr(shape, "_TIMED_KEPT", (3,))
    began, short = time.perf_counter(), dataclasses.replace(CALL, max_new_tokens=4)
    costs = shape.measure(right(), few[:1], short, tmp_path / "costs.json")
    assert 0 < costs.iteration(Tree.of(3)) < (time.perf_counter() - began) / 20
    assert list(tmp_path.iterdir()) == [tmp_path / "costs.json"]
    declared = right([Bucket(1, 32, 0, 4)])
    with pytest.raises(ValueError, match="answers of 4 tokens are too short to fit a tree to"):
        shape.measure(declared, few[:1], short, tmp_path / "costs.json")
