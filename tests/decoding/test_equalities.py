"""What must be equal, token for token: the design's promises about the decoding engine.

float32 and the highest matmul precision: programs of different shapes may round differently, by
about 1e-6, and these models' top two logits are farther apart than that at every step compared.
"""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.decoding.models import (
    CALL,
    CONFIG,
    LARGEST,
    TWIG,
    M,
    change,
    forced,
    generator,
    request,
    run,
    tokens,
)
from twig_jax.config import TwigConfig
from twig_jax.decoding.generate import Generator, compiled_programs
from twig_jax.decoding.settings import Request, Settings

rows = st.lists(
    st.builds(
        request,
        prompt=st.integers(0, 10_000),
        images=st.integers(0, 2),
        before=st.integers(1, 8),
        after=st.integers(1, 8),
        avg_retained=st.sampled_from([3.2, 4, 5]),
        max_new_tokens=st.integers(1, 14),
    ),
    min_size=3,
    max_size=3,
).map(lambda drawn: [LARGEST, *drawn])


@settings(max_examples=12, deadline=None)
@given(rows, st.sampled_from([0.0, 0.1, 0.5, 1.1]))
def test_speculation_changes_nothing(requests, theta) -> None:
    for fast, slow in (("ssd", "plain"), ("ttp_ssd", "ttp")):
        assert tokens(run(requests, mode=fast, theta=theta)) == tokens(run(requests, mode=slow))


@settings(max_examples=10, deadline=None)
@given(rows)
def test_a_row_does_not_depend_on_its_batch(requests) -> None:
    together = run(requests)
    for one, row in zip(requests, together, strict=True):
        # Alone in its own batch, with the shape row duplicated to keep the program.
        alone = run([LARGEST, LARGEST, LARGEST, one])[-1]
        assert alone.tokens.tolist() == row.tokens.tolist()
        assert alone.kept.tolist() == row.kept.tolist()
        assert alone.matched.tolist() == row.matched.tolist()
        assert [d.tolist() for d in alone.drafts] == [d.tolist() for d in row.drafts]


def mixed() -> list[Request]:
    """Four unlike rows: two images, one, none, and a short answer."""
    return [
        LARGEST,
        request(1, 1, 2, 5, avg_retained=4),
        request(2, 0, 3, 4, avg_retained=4),
        request(3, 1, 5, 1, avg_retained=3.2, max_new_tokens=5),
    ]


@pytest.mark.parametrize("mode", ["plain", "ttp_ssd"])
def test_a_row_does_not_depend_on_batch_size_or_bucket(mode) -> None:
    together = run(mixed(), mode=mode)
    for i in (0, 3):
        assert tokens(run(mixed()[i : i + 1], mode=mode)) == tokens([together[i]])


@pytest.mark.parametrize("gamma", [0, 1, 7])
def test_every_draft_length_gives_the_same_answer(gamma) -> None:
    assert tokens(run(mixed(), gamma=gamma)) == tokens(run(mixed(), mode="ttp"))


def test_some_drafts_are_accepted_and_some_are_not() -> None:
    """Without this the equalities above could hold for an engine that never drafts."""
    results = []
    for s in range(4):
        few = [request(10 * s + i, 1, 4, 4, avg_retained=4) for i in range(3)]
        results += run([LARGEST, *few], theta=0.0)
    drafted = sum(len(d) for r in results for d in r.drafts)
    matched = sum(int(r.matched.sum()) for r in results)
    assert 0.1 < matched / drafted < 0.9


def test_keeping_everything_equals_not_pruning() -> None:
    twig = TwigConfig(K=TWIG.K, T=TWIG.T, K_f=CONFIG.text.num_layers)
    requests = [change(r, avg_retained=M) for r in mixed()]
    pruned = generator(twig).generate(requests, CALL)
    assert tokens(pruned) == tokens(run(requests, mode="plain"))


def test_pruning_changes_something() -> None:
    few = [change(r, avg_retained=3.2) for r in mixed()]
    assert tokens(run(few, mode="ttp")) != tokens(run(few, mode="plain"))


def test_answers_equal_the_teacher_forced_pruned_pass() -> None:
    """An independent one-pass computation agrees with every token and every kept index."""
    model = generator()
    # One is so long that attention takes its queries in parts.
    long, tree = request(7, 1, 180, 90), {"children": 3, "expanded": 2, "nodes": 5}
    answered = [*zip(mixed(), run(mixed(), mode="ttp"), strict=True), (long, *run([long], **tree))]
    for one, result in answered:
        known = forced(model, one, result.tokens, len(result.kept))
        kept = np.asarray(known.kept[0])
        assert kept[one.is_visual[kept]].tolist() == result.kept.tolist()
        choices = np.asarray(known.logits[0].argmax(-1))
        assert choices[: len(result.tokens)].tolist() == result.tokens.tolist()
        if result.stopped_by == "eos":
            assert choices[len(result.tokens)] == CONFIG.eos_token_id


def test_an_answer_stops_at_eos() -> None:
    """Making a token that an answer contains the EOS cuts that answer right before it."""
    wholes = tokens(run(mixed()))
    eos = wholes[0][5]
    assert any(eos not in whole for whole in wholes)
    results = generator(eos_token_id=eos).generate(mixed(), CALL)
    for whole, result in zip(wholes, results, strict=True):
        cut = whole.index(eos) if eos in whole else len(whole)
        assert result.tokens.tolist() == whole[:cut]
        assert result.stopped_by == ("eos" if eos in whole else "length")


@pytest.mark.parametrize(
    "twig", [TwigConfig(1, 4, 4), TwigConfig(2, 1, 5), TwigConfig(0, 2, 3), TwigConfig(3, 2, 4)]
)
def test_unusual_depths(twig) -> None:
    """K + T = L, K_f = L, no trunk at all, and K + T = L with a single middle layer."""
    model = generator(twig)
    average = (twig.K * M + 4 * (twig.K_f - twig.K)) / CONFIG.text.num_layers
    few = [change(r, avg_retained=average) for r in mixed()]

    def answers(mode):
        return tokens(run(few, Settings(), model, mode=mode))

    assert answers("ttp_ssd") == answers("ttp")
    if twig.K_f < CONFIG.text.num_layers:  # which drafting does not ask for
        assert answers("ssd") == tokens(run(mixed(), mode="plain"))


def test_a_single_new_token() -> None:
    for mode in ("plain", "ttp", "ssd", "ttp_ssd"):
        for longer, one in zip(
            run(mixed(), mode=mode),
            run([change(r, max_new_tokens=1) for r in mixed()], mode=mode),
            strict=True,
        ):
            assert one.tokens.tolist() == longer.tokens[:1].tolist()
            assert one.stopped_by == "length"


def test_text_alone_is_not_pruned() -> None:
    text = [request(5, 0, 6, 2), request(6, 0, 1, 3)]
    assert tokens(run(text)) == tokens(run(text, mode="plain"))
    assert all(len(r.kept) == 0 for r in run(text))


def test_the_same_bucket_compiles_once() -> None:
    run(mixed())
    before = compiled_programs()
    shifted = [change(r, max_new_tokens=14) for r in mixed()]
    for theta in (0.0, 0.9):
        run(shifted, theta=theta)
        run(list(reversed(mixed())), theta=theta)
    run(mixed(), selector="fastv")
    assert compiled_programs() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "fast"}, "no mode 'fast'"),
        ({"selector": "best"}, "no selector 'best'"),
        ({"selector": "given"}, "needs scores"),
        ({"avg_retained": 1.0}, "no number of kept tokens"),
        ({"avg_retained": 8.0}, "at most 7.2"),
        ({"avg_retained": None}, "needs avg_retained"),
        ({"max_new_tokens": 0}, "at least 1"),
    ],
)
def test_bad_settings_say_what_is_wrong(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        run([request(1, 1, 4, 4)], **change)


def test_bad_requests_say_what_is_wrong() -> None:
    good = request(1, 1, 4, 4)
    for bad, message in (
        (dataclasses.replace(good, pixels=None), "9 image slots"),
        (
            dataclasses.replace(good, ids=good.ids[:-4], is_visual=good.is_visual[:-4]),
            "must be text",
        ),
        (dataclasses.replace(good, is_visual=good.is_visual[1:]), "one length"),
    ):
        with pytest.raises(ValueError, match=message):
            run([bad])
    with pytest.raises(ValueError, match="at least one request"):
        run([])
    with pytest.raises(ValueError, match="needs a twig"):
        Generator(CONFIG, {}).generate([good], CALL)
