"""What people build on: stops, streams, buckets, remembered images, files of questions, memory."""

import dataclasses
import itertools
import logging
import threading

import jax
import numpy as np
import pytest

from tests.decoding.models import CALL, CONFIG, generator, mixed, request, tokens
from twig_jax.config import TwigConfig
from twig_jax.decoding import buckets, images
from twig_jax.decoding.buckets import Bucket
from twig_jax.decoding.generate import Generator, compiled_programs
from twig_jax.decoding.session import Session
from twig_jax.decoding.settings import Request, Settings
from twig_jax.programs import device_bytes

WORDS = ["", "", "", *"abcdefghijklmnopqrstuvwxyz", *map(str, range(10)), "é"]
BUCKET = Bucket(rows=4, text=32, images=2, new=32)
LONG = dataclasses.replace(CALL, max_new_tokens=30)


@pytest.fixture(autouse=True)
def precise():
    with jax.default_matmul_precision("highest"):
        yield


def letters(tokens) -> str:
    """A letter or digit a token."""
    return "".join(WORDS[t] for t in tokens)


def speaking(detokenize=letters, buckets=(BUCKET,)):
    """A generator with a tokenizer, in one bucket; there is no EOS."""
    return generator(eos_token_id=-1, made={"detokenize": detokenize, "buckets": buckets})


def ask(settings, count: int = 3, model=None):
    rows = [request(20 + i, 1, 3, 4) for i in range(count)]
    return (model or speaking()).generate(rows, settings)


def test_a_stop_text_ends_an_answer_before_it() -> None:
    wholes = ask(LONG)
    stop = wholes[0].text[5:8]
    for whole, result in zip(wholes, ask(dataclasses.replace(LONG, stop=(stop,))), strict=True):
        if stop in whole.text:
            assert result.text == whole.text[: whole.text.index(stop)]
            assert result.stopped_by == "stop"
        else:
            assert result.text == whole.text
        assert whole.tokens[: len(result.tokens)].tolist() == result.tokens.tolist()


def test_a_stop_sequence_ends_an_answer_before_it() -> None:
    wholes = ask(LONG)
    stop = tuple(wholes[1].tokens[4:6].tolist())
    result = ask(dataclasses.replace(LONG, stop=(stop,)))[1]
    whole = wholes[1].tokens.tolist()
    at = next(i for i in range(len(whole)) if tuple(whole[i : i + 2]) == stop)
    assert result.tokens.tolist() == whole[:at]
    assert result.stopped_by == "stop"


def test_nothing_stops_before_min_new_tokens() -> None:
    wholes = ask(LONG)
    first = wholes[0].text[0]
    settings = dataclasses.replace(LONG, stop=(first,), min_new_tokens=10)
    result = ask(settings)[0]
    later = wholes[0].text.find(first, 10)
    assert result.text == (wholes[0].text if later < 0 else wholes[0].text[:later])
    eos = int(wholes[0].tokens[3])
    model = generator(eos_token_id=eos)
    (short,) = model.generate([request(20, 1, 3, 4)], LONG)
    (longer,) = model.generate([request(20, 1, 3, 4)], dataclasses.replace(LONG, min_new_tokens=12))
    assert len(short.tokens) <= 3 and short.stopped_by == "eos"
    assert len(longer.tokens) >= 12 and eos not in longer.tokens[:12]


def test_rows_stop_each_for_its_own_reason() -> None:
    stop = ask(LONG)[1].text[3]
    rows = [
        request(20, 1, 3, 4, max_new_tokens=4),
        request(21, 1, 3, 4, max_new_tokens=30, stop=("?", stop)),
    ]
    results = speaking().generate(rows, LONG)
    assert [r.stopped_by for r in results] == ["length", "stop"]


def test_watching_changes_nothing_and_sees_text_grow() -> None:
    model, seen, taken = speaking(), [], []
    rows = [request(20 + i, 1, 3, 4) for i in range(3)]

    def watch(running):
        seen.append(running.text(0))
        taken.append(running.results([0])[0].decode_s)

    settings = dataclasses.replace(LONG, stop=(ask(LONG)[0].text[16:18],))
    results = model.generate(rows, settings, watch=watch)
    alone = ask(settings)
    assert [r.text for r in results] == [r.text for r in alone]
    assert [r.matched.tolist() for r in results] == [r.matched.tolist() for r in alone]
    assert "stop" in {r.stopped_by for r in alone}
    assert len(seen) == max(len(r.matched) for r in results) > 3  # after every iteration
    assert all(b.startswith(a) for a, b in itertools.pairwise(seen))
    assert seen[-1] == results[0].text
    assert 0 < taken[0] < taken[-1] == results[0].decode_s


def test_a_row_that_was_ended_decodes_no_further() -> None:
    """Also one that comes from another batch."""
    model = speaking(buckets=(BUCKET, dataclasses.replace(BUCKET, rows=1)))
    running = model.start([request(20 + i, 1, 3, 4) for i in range(2)], LONG)
    other = model.start([request(22, 1, 3, 4)], LONG)
    running.cancel(0)
    other.cancel(0)
    running.insert(2, other)
    before = running.state.n.tolist()
    running.run(2)
    went_on = [b > a for a, b in zip(before, running.state.n.tolist(), strict=True)]
    assert went_on == [False, True, False, False]


def test_half_a_character_is_never_shown() -> None:
    """Bytes become characters only together, as sentencepiece's byte tokens do."""

    def halves(tokens):
        part = "ä".encode()
        return bytes(part[t % 2] for t in tokens).decode(errors="replace")

    model, seen = speaking(halves), []
    model.generate([request(20, 1, 3, 4)], LONG, watch=lambda r: seen.append(r.text(0)))
    assert not any(text.endswith("\ufffd") for text in seen[:-1])


def test_warm_up_leaves_nothing_to_compile(caplog) -> None:
    call = dataclasses.replace(CALL, avg_retained=5)  # the largest budget of any row
    declared = BUCKET, Bucket(rows=2, text=64, images=0, new=32)
    model = speaking(buckets=declared)
    with caplog.at_level(logging.INFO, "twig_jax"):
        report = model.warm_up(call)
    assert [c.bucket for c in report] == list(declared)
    assert [line.message for line in caplog.records] == [
        f"compiling for {bucket}" for bucket in declared
    ]
    before = compiled_programs()
    caplog.clear()
    with caplog.at_level(logging.INFO, "twig_jax"):
        model.generate(mixed(), call)
        model.generate(mixed()[1:2], call)
        model.generate([request(5, 0, 20, 20)], call)
    assert compiled_programs() == before
    assert not caplog.records


def test_a_bucket_of_more_images_than_fit_is_warmed_up() -> None:
    model = generator(text=dataclasses.replace(CONFIG.text, max_positions=16))
    (report,) = model.warm_up(CALL, [Bucket(rows=1, text=32, images=2, new=32)])
    assert report.programs > 0


def test_64_bits_as_a_default_change_nothing() -> None:
    model = speaking()
    answers = tokens(ask(LONG, model=model))
    before = compiled_programs()
    with jax.enable_x64(True):
        assert tokens(ask(LONG, model=model)) == answers
        assert compiled_programs() == before
        turns = Session(speaking(), dataclasses.replace(LONG, max_new_tokens=9))
        for row in (request(20, 1, 3, 4), request(21, 0, 3, 4)):
            assert len(turns.ask(row.ids, row.is_visual, row.pixels).tokens) == 9


def test_an_answer_ends_where_the_positions_do() -> None:
    rows = [request(20 + i, 1, 3, 4 + i) for i in range(3)]  # 16 to 18 tokens
    known = dataclasses.replace(CONFIG.text, max_positions=20)
    model = generator(eos_token_id=-1, text=known, made={"buckets": [BUCKET]})
    for whole, result in zip(ask(CALL, 1), model.generate(rows[:1], CALL), strict=True):
        assert result.tokens.tolist() == whole.tokens[:4].tolist()
    endless = dataclasses.replace(CALL, max_new_tokens=10**9)  # takes no slots for them
    for settings in (CALL, endless):
        found = model.generate(rows, settings)
        assert [(len(r.tokens), r.stopped_by) for r in found] == [(n, "length") for n in (4, 3, 2)]


def test_the_smallest_bucket_that_is_large_enough_is_taken() -> None:
    """By rows, then images, text and new tokens; without any, shapes are rounded up."""
    declared = [Bucket(*shape) for shape in ((4, 32, 1, 32), (1, 32, 2, 32), (1, 64, 1, 64))]
    need = Bucket(1, 20, 1, 14)
    assert buckets.fit(need, declared) == declared[2]
    smaller = [Bucket(1, 64, 1, 32), Bucket(1, 32, 1, 64)]
    assert buckets.fit(need, declared + smaller) == smaller[1]
    assert buckets.fit(Bucket(3, 33, 1, 32), ()) == Bucket(3, 64, 1, 32)


def test_a_prompt_longer_than_every_bucket_is_refused() -> None:
    with pytest.raises(ValueError, match=r"fits into none.*4 rows x \(32 text, 2 images"):
        speaking().generate([request(1, 1, 20, 20)], CALL)


def test_images_are_encoded_once() -> None:
    rows = [request(1, 1, 2, 3), request(2, 0, 2, 3), request(1, 1, 2, 3), request(1, 1, 2, 3)]
    model = generator()
    model.images.remembered = 2
    known = model.generate(rows, CALL)
    assert model.images.encoded == 1
    model.generate([*rows[2:], request(7, 1, 2, 3), request(8, 1, 2, 3)], CALL)
    assert model.images.encoded == 3
    model.generate(rows, CALL)  # forgotten by now: two later ones took its place
    assert model.images.encoded == 4
    fresh = generator().generate(rows, CALL)
    assert [r.tokens.tolist() for r in known] == [r.tokens.tolist() for r in fresh]


def test_the_image_that_was_asked_for_longest_ago_is_forgotten() -> None:
    model = generator()
    model.images.remembered = 2
    a, b, c = (request(i, 1, 2, 3).pixels[0] for i in range(3))
    for x, encoded in ((a, 1), (b, 2), (a, 2), (c, 3), (a, 3), (b, 4)):
        model.images([x])
        assert model.images.encoded == encoded


def test_visual_tokens_that_are_given() -> None:
    """Of no whole images: embeddings of words are answered as the words are."""
    model, plain = generator(), dataclasses.replace(CALL, mode="plain")
    text = request(1, 0, 8, 9)
    is_visual = (np.arange(17) > 1) & (np.arange(17) < 14)
    table = np.asarray(model.weights.base["text"]["embed_tokens"]["embedding"])
    given = dataclasses.replace(text, is_visual=is_visual, visual=table[text.ids[is_visual]])
    rows = [given, request(2, 1, 2, 3), text]
    first, _, last = model.generate(rows, plain)
    assert first.tokens.tolist() == last.tokens.tolist()
    assert first.kept.tolist() == np.flatnonzero(is_visual).tolist()


def test_an_image_that_another_thread_forgets_meanwhile(monkeypatch) -> None:
    model = generator()
    model.images.remembered = 1
    a, b, c = (request(i, 1, 2, 3).pixels[0] for i in range(3))

    def ask(*asked):
        return model.images(list(asked))

    encode, known = images.encode, ask(a)[0]

    def meanwhile(*args):
        monkeypatch.setattr(images, "encode", encode)
        other = threading.Thread(target=ask, args=(b,))
        other.start()
        other.join()
        return encode(*args)

    monkeypatch.setattr(images, "encode", meanwhile)
    assert ask(a, c)[0] is known


def test_many_questions_come_back_in_order() -> None:
    rows = [request(i, i % 3, 1 + i % 7, 1 + i % 5, max_new_tokens=3 + i) for i in range(10)]
    model, told = speaking(), []
    results = model.generate_many(rows, CALL, batch=4, told=lambda i, r: told.append((i, r)))
    for i, (row, result) in enumerate(zip(rows, results, strict=True)):
        (alone,) = model.generate([row], CALL)
        assert result.tokens.tolist() == alone.tokens.tolist()
        assert [r for j, r in told if j == i] == [result]
    assert sorted(i for i, _ in told) == list(range(10))


def test_batches_have_as_many_rows_as_there_are_declared() -> None:
    rows = [request(i, 0, 5, 3, max_new_tokens=4) for i in range(3)]
    model = generator(made={"buckets": [Bucket(2, 16, 0, 8), Bucket(1, 32, 0, 8)]})
    assert tokens(model.generate_many(rows, CALL)) == tokens(generator().generate(rows, CALL))


def test_a_batch_is_filled_up_without_encoding_again() -> None:
    model = generator()
    model.generate_many([request(i, 1, 2, 3) for i in range(5)], CALL, batch=4)
    assert model.images.encoded == 5


def test_a_batch_too_large_for_the_memory_says_what_would_fit(monkeypatch) -> None:
    model = speaking()
    weights = device_bytes(model.weights)
    program = model.batches.prepare(mixed(), CALL).program
    row = buckets.state_bytes(program, 1, 4)
    from twig_jax.decoding import batch

    monkeypatch.setattr(batch, "device_memory", lambda _: weights + 3 * row)
    with pytest.raises(MemoryError, match="about 3 rows of this shape and budget would fit"):
        model.generate(mixed(), CALL)
    monkeypatch.setattr(batch, "device_memory", lambda _: weights)
    with pytest.raises(MemoryError, match="not even one row fits"):
        model.generate(mixed(), CALL)


def test_the_estimate_covers_the_state() -> None:
    """The caches are most of a state; the estimate must not be below what is allocated."""
    model = speaking()
    running = model.start(mixed(), CALL)
    caches = device_bytes(running.state.caches)
    estimate = buckets.state_bytes(running.program, 4, 4)
    assert caches <= estimate


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": np.array([3, 4, 1000, 5])}, "ids of words must be from 0 to 36"),
        ({"ids": np.array([3, 4, -1, 5])}, "ids of words must be from 0 to 36"),
        (
            {"ids": np.full(4096, 3), "is_visual": np.zeros(4096, bool)},
            "no room .* the 4096 positions",
        ),
        ({"pixels": np.zeros((1, 9, 9, 3), np.float32)}, r"pixels must be of shape \[.., \d+, \d+"),
        ({"visual": np.zeros((9, 1), np.float32)}, r"visual must be of shape \[.., \d+\], not"),
        (
            {"pixels": np.zeros((1, 12, 12, 3)), "visual": np.zeros((5, 32))},
            "both pixels and visual",
        ),
        (
            {"visual": np.zeros((2, 32)), "is_visual": np.array([False, True, True, False])},
            "2 visual tokens are no whole images of 9",
        ),
        ({"scores": np.zeros(3, np.float32)}, "3 scores for 4 tokens"),
        ({"is_visual": np.zeros(3, bool)}, "must have one length"),
    ],
    ids=str,
)
def test_requests_that_mean_nothing(changes, message) -> None:
    good = Request(np.array([3, 4, 5, 6], np.int32), np.zeros(4, bool))
    with pytest.raises(ValueError, match=f"request 0: .*{message}"):
        generator().generate([dataclasses.replace(good, **changes)], CALL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stop": "USER:"}, "stop must be several texts"),
        ({"stop": ("",)}, "stop must be several texts"),
        ({"stop": (5,)}, "stop must be several texts"),
        ({"stop": (b"ab",)}, "stop must be several texts"),
        ({"stop": ((5, -1),)}, "stop must be several texts"),
        ({"gamma": -1}, "gamma must be at least 0"),
        ({"theta": -0.1}, "theta must be 0 or more"),
        ({"min_new_tokens": -1}, "min_new_tokens must be at least 0"),
        ({"temperature": -1.0}, "temperature must be 0 or more"),
        ({"temperature": float("inf")}, "temperature must be 0 or more"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"top_k": 2.5}, "top_k must be at least 0, which is all, and whole, not 2.5"),
        ({"top_k": 2**31}, "top_k must be at least 0"),
        ({"min_new_tokens": 2**31}, "min_new_tokens must be at least 0"),
        ({"min_p": 2.0}, "min_p must be from 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be between 1e-30 and 1e30"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty must be between"),
        ({"seed": -1}, "seed must be from 0"),
        ({"seed": 2**32}, "seed must be from 0"),
        ({"seed": 1.5}, "seed must be from 0"),
        ({"stop": ("x",)}, "needs a tokenizer"),
    ],
)
def test_settings_that_mean_nothing(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        generator().generate([request(1, 1, 2, 2)], dataclasses.replace(CALL, **changes))


def test_a_call_that_drafts_without_a_twig_is_refused() -> None:
    """Also where no request does."""
    bare = Generator(CONFIG, generator().weights.base)
    with pytest.raises(ValueError, match="mode ssd needs a twig"):
        bare.generate([request(1, 1, 2, 2, mode="ssd", gamma=0)], Settings("ssd"))


def test_fastv_needs_a_layer_to_look_at() -> None:
    model = generator(TwigConfig(K=0, T=2, K_f=3))
    with pytest.raises(ValueError, match="needs a layer before"):
        model.generate([request(1, 1, 2, 2)], dataclasses.replace(CALL, selector="fastv"))


def test_nothing_runs_where_a_later_batch_cannot() -> None:
    model = speaking(buckets=[dataclasses.replace(BUCKET, rows=1)])
    rows = [request(1, 1, 4, 4), request(2, 0, 30, 20)]
    with pytest.raises(ValueError, match="fits into none"):
        model.generate_many(rows, CALL, batch=1, told=lambda *_: pytest.fail("too late"))
    for batch in (0, -1):
        with pytest.raises(ValueError, match="batch must be at least 1"):
            model.generate_many(rows, CALL, batch=batch)


def test_one_batch_has_one_mode() -> None:
    rows = [request(1, 1, 2, 2), request(2, 1, 2, 2, mode="plain")]
    with pytest.raises(ValueError, match="request 1: one batch has one mode"):
        generator().generate(rows, CALL)
    with pytest.raises(ValueError, match="request 1: one batch has one mode"):
        generator().generate_many(rows, CALL, batch=1, told=lambda *_: pytest.fail("too late"))
