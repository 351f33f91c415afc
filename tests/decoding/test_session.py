"""Several turns: the same tokens as decoding the whole conversation's ids from the beginning."""

import dataclasses
import gc
import logging

import jax
import numpy as np
import pytest

from tests.decoding.models import CALL, generator, request
from twig_jax.decoding import session as session_module
from twig_jax.decoding.buckets import Bucket
from twig_jax.decoding.generate import Generator
from twig_jax.decoding.session import Session
from twig_jax.decoding.settings import Request


@pytest.fixture(autouse=True)
def precise():
    with jax.default_matmul_precision("highest"):
        yield


def model():
    """One bucket for all turns: nothing is compiled twice."""
    return generator(made={"buckets": [Bucket(rows=1, text=64, images=2, new=32)]})


def whole(session: Session, pixels: list[np.ndarray], settings) -> list[int]:
    """The next answer, computed from the conversation's ids alone."""
    request = Request(session.ids, session.is_visual, pixels=np.concatenate(pixels))
    return model().generate([request], settings)[0].tokens.tolist()


def test_a_session_that_chooses_anew_keeps_no_deep_layers() -> None:
    """They run again over what the next question chooses."""

    def held(reprune: bool) -> int:
        session, turn = Session(model(), CALL, reprune=reprune), request(1, 1, 3, 4)
        gc.collect()
        before = sum(x.nbytes for x in jax.live_arrays())
        session.ask(turn.ids, turn.is_visual, turn.pixels)
        gc.collect()
        return sum(x.nbytes for x in jax.live_arrays()) - before

    held(True)  # what is made once for all
    assert held(True) < 0.6 * held(False)


def test_free_rows_of_a_later_turn_catch_up_with_nothing(monkeypatch) -> None:
    told = []
    catch_up = session_module.catch_up

    def seen(program, weights, state, upto):
        jax.debug.callback(lambda x: told.append(x.tolist()), upto)
        return catch_up(program, weights, state, upto)

    monkeypatch.setattr(session_module, "catch_up", seen)
    several = generator(made={"buckets": [Bucket(rows=3, text=96, images=1, new=32)]})
    session = Session(several, dataclasses.replace(CALL, max_new_tokens=9, min_new_tokens=9))
    for turn in (request(1, 1, 2, 30), request(2, 0, 2, 3)):
        session.ask(turn.ids, turn.is_visual, turn.pixels)
    jax.effects_barrier()
    ((answered, *free),) = told
    assert answered > 0 and free == [0, 0]


@pytest.mark.parametrize(
    ("mode", "changes"),
    [
        ("plain", {}),
        ("ttp", {}),
        ("ttp_ssd", {}),
        ("ttp_ssd", {"temperature": 1.0, "seed": 3, "repetition_penalty": 1.3}),
        ("ssd", {"adaptive": True}),
    ],
)
def test_turns_equal_the_whole_conversation(mode, changes) -> None:
    settings = dataclasses.replace(CALL, mode=mode, max_new_tokens=9, **changes)
    session = Session(model(), settings)
    pixels = []
    for seed, images, before, after in ((1, 1, 3, 4), (2, 0, 2, 3), (3, 1, 2, 2)):
        turn = request(seed, images, before, after)
        if turn.pixels is not None:
            pixels.append(turn.pixels)
        asked = Session(model(), settings)
        asked.ids = np.concatenate([session.ids, turn.ids])
        asked.is_visual = np.concatenate([session.is_visual, turn.is_visual])
        result = session.ask(turn.ids, turn.is_visual, turn.pixels)
        assert result.tokens.tolist() == whole(asked, pixels, settings)
        if not settings.prune:
            assert result.kept.tolist() == np.flatnonzero(session.is_visual).tolist()
        assert len(session.ids) == len(asked.ids) + len(result.tokens) + (
            result.stopped_by == "eos"
        )


def test_a_new_question_chooses_anew_and_an_old_choice_can_be_kept(caplog) -> None:
    """Kept from the first turn, the answer is that of the whole conversation with these tokens.

    A later turn has a program of its own, which is announced as others are."""
    caplog.set_level(logging.INFO, "twig_jax")
    settings = dataclasses.replace(CALL, max_new_tokens=6)
    first, second = request(11, 2, 3, 4), request(12, 0, 2, 6)
    sessions = {reprune: Session(model(), settings, reprune=reprune) for reprune in (True, False)}
    kept = {}
    for reprune, session in sessions.items():
        start = session.ask(first.ids, first.is_visual, first.pixels)
        asked = np.concatenate([session.ids, second.ids])
        is_visual = np.concatenate([session.is_visual, second.is_visual])
        result = session.ask(second.ids, second.is_visual)
        kept[reprune] = result.kept.tolist()
        scores = np.zeros(len(asked), np.float32)
        scores[result.kept] = 1
        given = Request(asked, is_visual, pixels=first.pixels, scores=scores)
        (again,) = model().generate([given], dataclasses.replace(settings, selector="given"))
        assert result.tokens.tolist() == again.tokens.tolist()
        if not reprune:
            assert result.kept.tolist() == start.kept.tolist()
    assert kept[True] != kept[False]
    bucket = Bucket(rows=1, text=64, images=2, new=32)
    said = [f"compiling for {bucket}", f"compiling for a later turn in {bucket}"]
    ours = [line.message for line in caplog.records if line.name.startswith("twig_jax")]
    assert ours[:2] == said


def test_an_old_choice_stays_whole_where_less_is_asked_for_later() -> None:
    # The last text fills the bucket: without room for the choice, some of it would be lost.
    settings = dataclasses.replace(CALL, max_new_tokens=12)
    first, second = request(23, 1, 20, 20), request(24, 0, 4, 8)
    answers = []
    for later in (settings, dataclasses.replace(settings, avg_retained=2.4)):
        session = Session(model(), settings, reprune=False)
        session.ask(first.ids, first.is_visual, first.pixels)
        answers.append(session.ask(second.ids, second.is_visual, settings=later))
    assert answers[0].kept.tolist() == answers[1].kept.tolist()
    assert answers[0].tokens.tolist() == answers[1].tokens.tolist()


def test_turns_without_a_twig() -> None:
    """Pruned by the trunk's own attention."""
    own = generator()
    bare = Generator(own.config, own.weights.base, own.twig_config)
    settings = dataclasses.replace(CALL, mode="ttp", selector="fastv", max_new_tokens=6)
    session = Session(bare, settings)
    first, second = request(11, 1, 3, 4), request(12, 0, 2, 6)
    session.ask(first.ids, first.is_visual, first.pixels)
    ids = np.concatenate([session.ids, second.ids])
    is_visual = np.concatenate([session.is_visual, second.is_visual])
    result = session.ask(second.ids, second.is_visual)
    (whole,) = bare.generate([Request(ids, is_visual, pixels=first.pixels)], settings)
    assert result.tokens.tolist() == whole.tokens.tolist()


def test_what_cannot_go_on_says_so() -> None:
    turn = request(1, 1, 3, 4)
    session = Session(model(), CALL, reprune=False)
    session.ask(turn.ids, turn.is_visual, turn.pixels)
    with pytest.raises(ValueError, match="leave reprune on"):
        session.ask(turn.ids, turn.is_visual, turn.pixels)
    with pytest.raises(ValueError, match="keeps its mode"):
        session.ask(turn.ids, turn.is_visual, settings=dataclasses.replace(CALL, mode="plain"))
    drafting = dataclasses.replace(CALL, mode="ssd")
    session = Session(model(), drafting)
    with pytest.raises(ValueError, match="drafts in all turns or in none"):
        session.ask(turn.ids, turn.is_visual, settings=dataclasses.replace(drafting, gamma=0))
    later = dataclasses.replace(turn, before=3)
    with pytest.raises(ValueError, match="ask in a Session"):
        model().generate([later], CALL)
