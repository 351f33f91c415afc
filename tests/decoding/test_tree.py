"""Trees of drafts: no shape changes an answer, and they are the trees of a naive drafting."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoding.models import (
    CONFIG,
    LARGEST,
    TWIG,
    generator,
    mixed,
    request,
    run,
    tokens,
    weights,
)
from tests.decoding.worker import model as spreadable
from twig_jax.decoding.buckets import Bucket
from twig_jax.decoding.generate import Generator
from twig_jax.decoding.sampling import scores
from twig_jax.decoding.scheduler import Scheduler
from twig_jax.decoding.session import Session
from twig_jax.decoding.settings import Request, Result, Settings, controls
from twig_jax.models.llava import Llava
from twig_jax.models.twig import init_twig, twig_decoder
from twig_jax.sharding.mesh import make_mesh

# Of the last no path is longer than the nodes that are kept.
TREES = [(4, 3, 2, 5), (3, 2, 8, 0), (4, 10, 10, 60), (20, 3, 2, 4)]
EOS = 21  # a word that ends some of the answers, and is often drafted
CALL = Settings("ssd", max_new_tokens=14, gamma=3, theta=0.0)
TREE = {"gamma": 4, "children": 3, "expanded": 2, "nodes": 5}
BUCKET = Bucket(rows=2, text=64, images=0, new=32)
FULL = Bucket(rows=8, text=8, images=0, new=14)  # ROWS leave none of its slots free


def row(prompt: int, **changes: Any) -> Request:
    """A prompt of text alone, so that little is compiled."""
    return request(prompt, 0, 5, 3, **dataclasses.asdict(CALL) | changes)


ROWS = [
    row(1),
    row(2, theta=0.4, gamma=2),
    row(3, temperature=1.0, seed=101),  # whose first drafts may all be refused
    row(4, temperature=0.8, top_k=20, top_p=0.9, theta=0.1, seed=2),
    row(5, repetition_penalty=1.3, min_new_tokens=9),
    row(6, temperature=1.3, repetition_penalty=1.2, min_p=0.05, seed=3),
    row(7, max_new_tokens=1),
    row(8, max_new_tokens=2),
]


@functools.cache
def model() -> Generator:
    return generator(eos_token_id=EOS, made={"buckets": [FULL]})


def shaped(tree: tuple[int, int, int, int]) -> dict[str, int]:
    return dict(zip(("gamma", "children", "expanded", "nodes"), tree, strict=True))


def told(rows: list[Request], **changes: Any) -> list[Request]:
    """The rows with changed settings; a row that drafts less far than the others still does."""
    found = []
    for one in rows:
        own = dataclasses.replace(one.settings, **changes)
        if one.settings.gamma < CALL.gamma:
            own = dataclasses.replace(own, gamma=one.settings.gamma)
        found.append(dataclasses.replace(one, settings=own))
    return found


@functools.cache
def answers(tree: tuple[int, int, int, int] | None) -> list[Result]:
    """To ROWS, with drafts of a shape or without any."""
    changes = {"mode": "plain"} if tree is None else shaped(tree)
    return model().generate(told(ROWS, **changes), dataclasses.replace(CALL, **changes))


@pytest.mark.parametrize("tree", [(4, 1, 1, 0), (4, 3, 1, 0), *TREES])
def test_no_tree_changes_an_answer(tree) -> None:
    results = answers(tree)
    assert tokens(results) == tokens(answers(None))
    assert {r.stopped_by for r in results} == {"eos", "length"}
    assert any(EOS in drafts for r in results for drafts in r.drafts)
    assert any(r.matched.max() > 1 for r in results)


@jax.jit
def twig_scores(
    weights: Any, own: Any, sequences: jax.Array, length: jax.Array, asked: jax.Array, seen: Any
) -> tuple[jax.Array, jax.Array]:
    """What the twig says after sequences int32 [Q, S] of one length: scores and probabilities."""
    at = jnp.broadcast_to(jnp.arange(sequences.shape[1]), sequences.shape)
    causal = at[:, None] <= at[:, :, None]
    base, twig = Llava(CONFIG), twig_decoder(CONFIG.text, TWIG)
    x = base.apply({"params": weights.base}, sequences, method="embed")
    x, _ = base.apply({"params": weights.base}, x, at, causal, 0, TWIG.K, method="run")
    x, _ = twig.apply({"params": weights.twig}, x, at, causal, method="run")
    x = jax.lax.dynamic_index_in_dim(x, length - 1, axis=1)
    logits = twig.apply({"params": weights.twig}, x, method="logits")[:, 0]
    n = jnp.broadcast_to(length - asked, (1, len(sequences)))
    path = jnp.where(at >= length, -1, sequences)[None]
    there = jnp.broadcast_to(length, n.shape)
    rated = scores(own, logits[None], n, there, lambda: seen, path)[0]
    return rated, jax.nn.softmax(logits)


def grown(one: Request, prefix: list[int], tree: tuple[int, int, int, int], limit: int) -> Any:
    """Drafts, parents and probabilities after a prefix, by sequences that all run anew."""
    _, children, expanded, nodes = tree
    own = jax.tree.map(jnp.asarray, controls([one.settings], eos=EOS))
    nothing = np.zeros((1, CONFIG.text.vocab_size), bool)
    found: list[tuple[float, int, int, float]] = []  # path, token, number of the parent, prob
    frontier: list[tuple[float, int, list[int]]] = [(0.0, 0, [])]
    for level in range(limit):
        sequences = np.zeros((10, 40), np.int32)
        length = len(prefix) + level
        for i, (_, _, drafted) in enumerate(frontier):
            sequences[i, :length] = prefix + drafted
        asked = len(one.ids)
        rated, probs = twig_scores(model().weights, own, sequences, length, asked, nothing)
        logs, probs = np.asarray(jax.nn.log_softmax(rated)), np.asarray(probs)
        newest = []
        for i, (path, parent, drafted) in enumerate(frontier):
            for token in np.argsort(-logs[i], kind="stable")[:children]:
                if logs[i, token] > -np.inf:
                    found.append((path + logs[i, token], int(token), parent, probs[i, token]))
                    newest.append((found[-1][0], len(found), [*drafted, int(token)]))
        may = [new for new in newest if new[2][-1] != EOS]
        if not any(found[number - 1][3] >= one.settings.theta for _, number, _ in may):
            break
        frontier = sorted(may, key=lambda new: -new[0])[:expanded]
    best = sorted(range(len(found)), key=lambda i: -found[i][0])[: nodes or None]
    kept = sorted(best)
    index = {0: 0} | {number + 1: i + 1 for i, number in enumerate(kept)}
    rows = [(found[i][1], index[found[i][2]], found[i][3]) for i in kept]
    return ([row[j] for row in rows] for j in range(3))


@pytest.mark.parametrize("tree", TREES)
def test_drafts_are_those_of_a_naive_drafting(tree) -> None:
    """Of a few iterations of every row: tokens, parents, and probabilities."""
    sizes = set()
    for one, result in zip(told(ROWS, **shaped(tree)), answers(tree), strict=True):
        places = np.concatenate([[0], np.cumsum(result.matched + 1)])
        for i in range(min(len(result.drafts), 4)):
            place = int(places[i])
            prefix = [*one.ids.tolist(), *result.tokens[:place].tolist()]
            limit = min(one.settings.gamma, one.settings.max_new_tokens - place - 1)
            drafts, parents, probs = grown(one, prefix, tree, limit)
            assert result.drafts[i].tolist() == drafts
            assert result.parents[i].tolist() == parents
            np.testing.assert_allclose(result.probs[i], probs, atol=1e-5)
            sizes.add(len(drafts))
    assert len(sizes) > 2 and max(sizes) >= (tree[3] or 2 * tree[0])


def test_levels_that_cannot_be_used_are_not_drafted() -> None:
    """But one always is, so that there is one kind of program."""
    for new, nodes, depth in ((32, 0, 31), (32, 4, 4), (2, 0, 1), (1, 0, 1)):
        one = row(1, gamma=10**6, nodes=nodes, max_new_tokens=new)
        bucket = dataclasses.replace(BUCKET, new=new)
        prepared = model().batches.prepare([one], one.settings, bucket=bucket)
        assert prepared.program.draft
        assert prepared.program.tree.depth == prepared.controls.gamma[0] == depth


def test_there_are_no_more_children_than_words() -> None:
    one = row(1, children=10**6)
    program = model().batches.prepare([one], one.settings, bucket=BUCKET).program
    assert program.tree.children == CONFIG.text.vocab_size


def test_the_best_of_many_words_are_drafted() -> None:
    """Two of 1,100 words are looked for in chunks of them, the best two of three among all."""
    many = generator(text=dataclasses.replace(CONFIG.text, vocab_size=1100))
    two, three = (
        many.generate(told(ROWS[2:6], **shape), dataclasses.replace(CALL, **shape))
        for shape in ({"gamma": 1, "children": 2}, {"gamma": 1, "children": 3, "nodes": 2})
    )
    for one, other in zip(two, three, strict=True):
        assert [x.tolist() for x in one.drafts] == [x.tolist() for x in other.drafts]
        np.testing.assert_allclose(np.concatenate(one.probs), np.concatenate(other.probs), 1e-5)
    assert len({draft for r in two for x in r.drafts for draft in x}) > 20


def test_what_fills_up_a_level_is_a_word() -> None:
    """One word is left to sample from, often the last of 1,025, alone in its chunk of them."""
    text = dataclasses.replace(CONFIG.text, vocab_size=1025)
    config = dataclasses.replace(CONFIG, text=text)
    base = weights(config=config)
    kernel = base["text"]["lm_head"]["kernel"]
    louder = {**base["text"], "lm_head": {"kernel": kernel.at[:, -1].multiply(8)}}
    base = {**base, "text": louder}
    many = Generator(config, base, TWIG, init_twig(base, text, TWIG))
    rows = [row(i, temperature=1.0, top_k=1, min_new_tokens=14, seed=i) for i in range(8)]
    changes = {"gamma": 3, "children": 2, "expanded": 2}
    slow = tokens(many.generate(told(rows, mode="plain"), dataclasses.replace(CALL, mode="plain")))
    fast = tokens(many.generate(told(rows, **changes), dataclasses.replace(CALL, **changes)))
    assert fast == slow
    assert sum(answer.count(1024) for answer in slow) > 8


def test_a_tree_around_the_chain_accepts_more() -> None:
    """With one expanded node a level, the chain is a path of the tree."""
    chain, tree = (
        [len(r.matched) for r in answers(shape) if r.stopped_by == "length"]
        for shape in ((4, 1, 1, 0), (4, 3, 1, 0))
    )
    assert all(a >= b for a, b in zip(chain, tree, strict=True))
    assert sum(chain) > sum(tree)


def test_pruned_answers_stay_the_same() -> None:
    """Images, a budget, and rows that differ in both; adaptive drafting and none."""
    slow = tokens(run(mixed(), mode="ttp"))
    fast = run(mixed(), **TREE)
    assert tokens(fast) == slow
    sometimes = run(mixed(), model=generator(made={"draft_cost": 0.4}), adaptive=True, **TREE)
    assert tokens(sometimes) == slow
    drafted = [sum(map(len, r.drafts)) for r in (*fast, *sometimes)]
    assert 0 < sum(drafted[4:]) < sum(drafted[:4])


def test_a_row_does_not_depend_on_its_batch() -> None:
    alone = run([LARGEST] * 4, **TREE)[-1]
    together = run(mixed(), **TREE)[0]
    for field in ("drafts", "parents"):
        for one, other in zip(getattr(alone, field), getattr(together, field), strict=True):
            assert one.tolist() == other.tolist()


def test_turns_of_a_conversation() -> None:
    """Each is answered like the whole conversation so far."""
    settings = dataclasses.replace(CALL, **TREE)
    served = generator(eos_token_id=EOS, made={"buckets": [dataclasses.replace(BUCKET, rows=1)]})
    session = Session(served, settings)
    for i in range(3):
        turn = row(i)
        ids = np.concatenate([session.ids, turn.ids])
        (whole,) = served.generate([Request(ids, np.zeros(len(ids), bool))], settings)
        assert session.ask(turn.ids, turn.is_visual).tokens.tolist() == whole.tokens.tolist()


def test_questions_that_arrive_later() -> None:
    settings = dataclasses.replace(CALL, **TREE)
    scheduler = Scheduler(model(), settings, BUCKET, chunk=1)
    tickets = [scheduler.submit(one) for one in told(ROWS[:5], **TREE)]
    scheduler.run()
    assert [t.result.tokens.tolist() for t in tickets] == tokens(answers(None))[:5]
    with pytest.raises(ValueError, match="one way of drafting"):
        scheduler.submit(row(9, **TREE | {"children": 2}))


def test_a_mesh_changes_no_token() -> None:
    rows, call = told(ROWS[:4], **TREE), dataclasses.replace(CALL, **TREE)
    alone = told(rows, mode="plain"), dataclasses.replace(call, mode="plain")
    spread = spreadable(make_mesh(2, 2, 2)).generate(rows, call)
    assert tokens(spread) == tokens(spreadable().generate(*alone))


@pytest.mark.parametrize("changes", [{"children": 0}, {"expanded": 0}, {"nodes": -1}])
def test_shapes_that_mean_nothing(changes) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(changes))} must be"):
        run([request(1, 0, 4, 4)], **changes)
