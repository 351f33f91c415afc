"""Continuous batching: whoever comes when, every answer is the one it would get alone."""

import dataclasses
import random
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from tests.decoding.models import CALL, generator, request
from twig_jax.decoding.buckets import Bucket
from twig_jax.decoding.generate import compiled_programs
from twig_jax.decoding.scheduler import Scheduler

BUCKET = Bucket(rows=3, text=32, images=1, new=32)
SETTINGS = dataclasses.replace(CALL, max_new_tokens=20)


@pytest.fixture(autouse=True)
def precise():
    with jax.default_matmul_precision("highest"):
        yield


def some(count: int, seed: int = 0):
    rng = random.Random(seed)
    return [
        request(
            100 * seed + i,
            rng.randint(0, 1),
            rng.randint(1, 8),
            rng.randint(1, 8),
            max_new_tokens=rng.randint(1, 20),
            temperature=rng.choice([0.0, 1.0]),
            seed=i,
        )
        for i in range(count)
    ]


def speaking():
    """A generator with a tokenizer."""
    return generator(made={"detokenize": lambda tokens: " ".join(map(str, tokens))})


def test_arrivals_at_random_change_no_answer_and_compile_nothing() -> None:
    model, rng = speaking(), random.Random(5)
    waiting = some(12)
    scheduler = Scheduler(model, SETTINGS, BUCKET, chunk=2)
    warm = scheduler.submit(waiting[0])
    scheduler.run()
    before = compiled_programs()
    tickets = []
    while len(tickets) < len(waiting) or not all(t.done for t in tickets):
        if len(tickets) < len(waiting) and rng.random() < 0.5:
            tickets.append(scheduler.submit(waiting[len(tickets)]))
        scheduler.step()
    assert compiled_programs() == before
    assert warm.result is not None
    for one, ticket in zip(waiting, tickets, strict=True):
        alone = model.start([one], SETTINGS, bucket=dataclasses.replace(BUCKET, rows=1))
        (expected,) = model.finish(alone)
        assert ticket.result.tokens.tolist() == expected.tokens.tolist()
        assert ticket.result.stopped_by == expected.stopped_by
        assert ticket.text == ticket.result.text


def test_images_of_later_questions_compile_nothing() -> None:
    scheduler = Scheduler(generator(), SETTINGS, dataclasses.replace(BUCKET, images=3))
    counts = []
    for images in (1, 2, 3, 0):
        scheduler.submit(request(images, images, 4, 4, max_new_tokens=2))
        scheduler.run()
        counts.append(compiled_programs())
    assert len(set(counts)) == 1


def test_first_come_first_served() -> None:
    scheduler = Scheduler(generator(), SETTINGS, BUCKET, chunk=1)
    tickets = [scheduler.submit(r) for r in some(7, seed=2)]
    started: list[int] = []
    while scheduler.step():
        started += [
            i
            for i, t in enumerate(tickets)
            if i not in started and (t.done or t in scheduler.running)
        ]
    assert started == sorted(started)
    assert all(t.done for t in tickets)


def test_cancelling_ends_one_and_disturbs_nobody() -> None:
    scheduler = Scheduler(generator(), SETTINGS, BUCKET, chunk=1)
    few = [request(40 + i, 1, 4, 4, max_new_tokens=20) for i in range(5)]
    tickets = [scheduler.submit(r) for r in few]
    scheduler.step()
    tickets[1].cancel()
    tickets[4].cancel()
    assert [ticket.done for ticket in tickets] == [False, True, False, False, True]
    scheduler.run()
    assert tickets[1].result.stopped_by == "cancelled"
    assert len(tickets[1].result.tokens) < 20
    assert tickets[4].done and tickets[4].result is None
    for i in (0, 2, 3):
        (alone,) = generator().generate([few[i]], SETTINGS)
        assert tickets[i].result.tokens.tolist() == alone.tokens.tolist()


def test_a_ticket_streams_its_text() -> None:
    model = speaking()
    scheduler = Scheduler(model, SETTINGS, BUCKET, chunk=1)
    first, second = (scheduler.submit(request(60 + i, 1, 4, 4)) for i in range(2))
    pieces = list(first)
    assert len(pieces) > 2
    assert "".join(pieces) == first.result.text
    assert "".join(second) == second.result.text


@pytest.mark.parametrize("part", ["start", "insert"])
def test_one_that_cannot_start_is_through_and_stops_nobody(monkeypatch, part) -> None:
    model = generator()
    scheduler = Scheduler(model, SETTINGS, BUCKET)
    tickets = [scheduler.submit(one) for one in some(2)]
    whole = getattr(model, part)

    def fails(*args, **kwargs):
        monkeypatch.setattr(model, part, whole)
        raise MemoryError("no room")

    monkeypatch.setattr(model, part, fails)
    with pytest.raises(MemoryError, match="no room"):
        scheduler.run()
    scheduler.run()
    assert [ticket.done for ticket in tickets] == [True, True]
    assert tickets[0].result is None and len(tickets[1].result.tokens)


def test_a_ticket_that_the_scheduler_lost_is_not_waited_for(monkeypatch) -> None:
    scheduler = Scheduler(generator(), SETTINGS, BUCKET)
    ticket, steps = scheduler.submit(request(1, 1, 4, 4)), iter([False])
    monkeypatch.setattr(scheduler, "step", lambda: next(steps))
    with pytest.raises(RuntimeError, match="does not have this question"):
        list(ticket)


def test_threads_may_share_a_scheduler() -> None:
    """Each asks, and drives it until it has its answer."""
    scheduler, asked = Scheduler(speaking(), SETTINGS, BUCKET, chunk=1), some(12)
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(lambda one: "".join(scheduler.submit(one)), asked))
    alone = speaking().generate_many(asked, SETTINGS, batch=4)
    assert found == [result.text for result in alone]


def test_an_interruption_ends_what_ran_and_nothing_else(monkeypatch) -> None:
    model = speaking()
    scheduler, asked = Scheduler(model, SETTINGS, BUCKET, chunk=1), some(5)
    scheduler.submit(asked[0])
    scheduler.run()
    tickets = [scheduler.submit(one) for one in asked]

    def interrupted(program, state, stop, most):
        jax.tree.map(lambda x: x.delete(), state)  # as the program that was given it does
        raise KeyboardInterrupt

    with monkeypatch.context() as once, pytest.raises(KeyboardInterrupt):
        once.setattr(model, "decode", interrupted)
        scheduler.run()
    assert [ticket.done for ticket in tickets] == [True] * 3 + [False] * 2
    before = compiled_programs()
    scheduler.run()
    assert compiled_programs() == before
    alone = [model.generate([one], SETTINGS)[0].tokens.tolist() for one in asked[3:]]
    assert [ticket.result.tokens.tolist() for ticket in tickets[3:]] == alone
    assert [ticket.result for ticket in tickets[:3]] == [None] * 3


def test_a_result_holds_nothing_of_other_rows() -> None:
    scheduler = Scheduler(generator(), SETTINGS, BUCKET)
    ticket = scheduler.submit(request(1, 1, 4, 4))
    scheduler.run()
    own = ticket.result
    one = (own.tokens, own.accepted, own.matched, own.kept, own.scores)
    for dimensions, arrays in ((1, one), (2, (*own.drafts, *own.parents, *own.probs))):
        for x in arrays:
            while x.base is not None:
                x = x.base
            assert x.ndim == dimensions


def test_a_batch_ranked_by_scores_that_are_given() -> None:
    settings = dataclasses.replace(SETTINGS, selector="given")
    model = generator(made={"buckets": [BUCKET]})
    model.warm_up(settings)
    scheduler = Scheduler(model, settings, BUCKET)
    one, text = request(1, 1, 4, 4), request(2, 0, 4, 4)  # without images there is nothing to rank
    ranked = dataclasses.replace(one, scores=np.arange(len(one.ids), dtype=np.float32))
    tickets = [scheduler.submit(each) for each in (ranked, text)]
    scheduler.run()
    assert all(len(ticket.result.tokens) for ticket in tickets)
    with pytest.raises(ValueError, match="needs scores"):
        scheduler.submit(one)


def test_what_does_not_fit_is_refused_before_anything_runs() -> None:
    scheduler = Scheduler(generator(), SETTINGS, BUCKET)
    for bad, message in (
        (request(1, 2, 4, 4), "fits into none"),
        (request(1, 1, 4, 40), "fits into none"),
        (request(1, 1, 4, 4, max_new_tokens=64), "fits into none"),
        (request(1, 1, 4, 4, avg_retained=6), "larger budget"),
        (request(1, 1, 4, 4, gamma=9), "larger budget or gamma"),
    ):
        with pytest.raises(ValueError, match=message):
            scheduler.submit(bad)
    assert not scheduler.step()
