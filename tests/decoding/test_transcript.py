"""One answer as it comes, apart from any model: tokens are bytes of UTF-8."""

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from twig_jax.decoding.settings import Settings
from twig_jax.decoding.transcript import Transcript


def detokenize(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode("utf-8", errors="replace")


def told(tokens: Sequence[int], parts: Sequence[int], own: Settings) -> tuple[list[int], str, bool]:
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
    return transcript.tokens.tolist(), transcript.text, transcript.stopped


texts = st.text("ab é", min_size=1, max_size=3)


@given(
    st.text("ab é", max_size=30),
    st.lists(texts | texts.map(lambda text: tuple(text.encode())), max_size=3),
    st.integers(0, 10),
    st.lists(st.integers(1, 12), max_size=12),
)
def test_an_answer_stops_where_it_would_token_by_token(text, stops, min_new, parts) -> None:
    tokens = list(text.encode())
    own = Settings(stop=tuple(stops), min_new_tokens=min_new)
    assert told(tokens, parts, own) == told(tokens, [1] * len(tokens), own)


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
