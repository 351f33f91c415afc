"""One answer as it comes, apart from any model: tokens are bytes of UTF-8."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twig_jax.decoding.settings import Settings
from twig_jax.decoding.transcript import Detokenize, Transcript, characters


def detokenize(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode("utf-8", errors="replace")


def in_runs(tokens: Sequence[int]) -> str:
    """As Llama's tokenizers: of the bytes of rare characters in a row all count, or none."""
    out = ""
    for rare, run in itertools.groupby(tokens, lambda token: token >= 128):
        text = detokenize(list(run))
        out += "\ufffd" * len(text.encode()) if rare and "\ufffd" in text else text
    return out


def told(
    tokens: Sequence[int], parts: Sequence[int], own: Settings, detokenize: Detokenize
) -> tuple[list[int], str, bool]:
    """Tokens, text and whether it stopped, where the tokens come in parts of so many.

    What was shown on the way is never taken back.
    """
    transcript, came = Transcript(own, detokenize), np.array(tokens, np.int32)
    ends = [int(end) for end in np.cumsum(parts) if end < len(tokens)]
    shown = []
    for end in [*ends, len(tokens)]:
        transcript.update(came[:end], ended=end == len(tokens))
        shown.append(transcript.text)
    assert all(shown[-1].startswith(text) for text in shown)
    assert not shown[-1].endswith("\ufffd")
    return transcript.tokens.tolist(), transcript.text, transcript.stopped


texts = st.text("ab é漢", min_size=1, max_size=3)


@given(
    st.text("ab é漢", max_size=30),
    st.integers(0, 2),
    st.lists(texts | texts.map(lambda text: tuple(text.encode())), max_size=3),
    st.integers(0, 10),
    st.lists(st.integers(1, 12), max_size=12),
    st.sampled_from([detokenize, in_runs]),
)
def test_an_answer_stops_where_it_would_token_by_token(
    text, missing, stops, min_new, parts, detokenize
) -> None:
    """Also where it ends in the middle of a character."""
    tokens = list(text.encode())
    tokens = tokens[: len(tokens) - missing]
    own = Settings(stop=tuple(stops), min_new_tokens=min_new)
    alone = told(tokens, [1] * len(tokens), own, detokenize)
    assert told(tokens, parts, own, detokenize) == alone


@pytest.mark.parametrize(
    ("stops", "min_new", "shown"),
    [
        (("b",), 0, ["a", "a"]),
        (("b",), 1, ["a", "a"]),
        (("b",), 2, ["a", "ab", "abc", "abca", "abca"]),
        (("bc", "abc"), 0, ["", "", ""]),
        (("abx",), 0, ["", "", "abc", "abc", "abcab"]),
        ((tuple(b"bc"),), 0, ["a", "a", "a"]),
        ((tuple(b"bc"),), 3, ["a", "a", "abc", "abca", "abcab"]),
    ],
)
def test_what_is_shown_of_an_answer_token_by_token(stops, min_new, shown) -> None:
    """What may be the beginning of a stop is held back, and the first that is complete after
    min_new_tokens cuts it off, at its first letter; also from the tokens."""
    own = Settings(stop=stops, min_new_tokens=min_new)
    transcript, tokens, found = Transcript(own, detokenize), b"abcab", []
    while not transcript.stopped and len(found) < len(tokens):
        came = np.array(list(tokens[: len(found) + 1]), np.int32)
        transcript.update(came, ended=len(came) == len(tokens))
        found.append(transcript.text)
    assert found == shown
    assert detokenize(transcript.tokens.tolist()) == shown[-1]


def test_characters_of_four_bytes() -> None:
    tokens = list("é😀".encode())
    assert [characters(in_runs, tokens[:n]) for n in range(7)] == ["", "", *["é"] * 4, "é😀"]


def test_an_answer_is_decoded_once_a_part_while_no_stop_is_in_it() -> None:
    calls = []

    def counting(tokens: Sequence[int]) -> str:
        calls.append(len(tokens))
        return detokenize(tokens)

    transcript = Transcript(Settings(stop=("never", "neither")), counting)
    tokens = np.array(list(b"all that was said " * 10), np.int32)
    for end in range(20, len(tokens) + 1, 20):
        transcript.update(tokens[:end], ended=False)
    assert calls == list(range(20, len(tokens) + 1, 20))
