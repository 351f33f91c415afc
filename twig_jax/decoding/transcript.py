"""One answer as it comes: its text, and where it stops."""

from collections.abc import Callable, Sequence

import numpy as np

from twig_jax.decoding.settings import Settings

Detokenize = Callable[[Sequence[int]], str]

_UNFINISHED = "\ufffd"  # what stands for the bytes of a character that is not complete yet
_BYTES = 3  # that such a character has at most


def characters(detokenize: Detokenize, tokens: Sequence[int]) -> str:
    """The text of tokens up to a last character that is not complete.

    Llama's tokenizers have bytes for rare characters, and take all in a row for unknown where the
    last ones are no character yet: so those are left out before.
    """
    text = detokenize(tokens)
    if not text.endswith(_UNFINISHED):
        return text
    sizes = range(len(tokens), max(len(tokens) - _BYTES, 0) - 1, -1)
    return max((detokenize(tokens[:n]).rstrip(_UNFINISHED) for n in sizes), key=len)


class Transcript:
    """The tokens of one answer so far, its text, and whether a stop is in it.

    tokens: what the answer has so far, cut where it stopped. stopped: a stop was found. read: how
    many tokens that took.
    """

    def __init__(self, settings: Settings, detokenize: Detokenize | None) -> None:
        self.tokens = np.zeros(0, np.int32)
        self.stopped = False
        self.read = 0
        self._min_new = settings.min_new_tokens
        self._texts = tuple(s for s in settings.stop if isinstance(s, str))
        self._sequences = tuple(tuple(s) for s in settings.stop if not isinstance(s, str))
        self._detokenize = detokenize
        self._ended = False
        self._cut: str | None = None

    @property
    def can_stop(self) -> bool:
        """Whether there is a stop to look for."""
        return bool(self._texts or self._sequences)

    def end(self) -> None:
        """Nothing will follow."""
        self._ended = True

    def update(self, tokens: np.ndarray, ended: bool) -> None:
        """Takes all tokens so far; `ended`: none will follow."""
        if self.stopped:
            return
        self._ended = ended
        # Decoding takes as long as an answer is: once for all that came, and token by token only
        # where a stop is to be cut off, or may be among bytes that are no characters any more.
        text = self._decode(tokens) if self._texts else ""
        there = [stop for stop in self._texts if stop in text or _UNFINISHED in text]
        for size in range(len(self.tokens) + 1, len(tokens) + 1):
            self.tokens, self.read = tokens[:size], size
            if size > self._min_new and self._stop(there):
                self.stopped = self._ended = True
                return

    @property
    def text(self) -> str:
        """What can be shown: all whole characters once the answer ended, before that only what no
        further token can change (no part of a stop either).

        Bytes that are no characters are the exception: Llama's tokenizers then take the whole ones
        right before them for unknown too."""
        if self._cut is not None:
            return self._cut.strip()
        if self._ended:
            return self._characters(self.tokens).strip()
        longest = max(map(len, self._sequences), default=0)
        end = tuple(self.tokens[len(self.tokens) - min(len(self.tokens), longest) :].tolist())
        held = max((_overlap(end, stop) for stop in self._sequences), default=0)
        text = self._characters(self.tokens[: len(self.tokens) - held])
        held = max((_overlap(text, stop) for stop in self._texts), default=0)
        return text[: len(text) - held].strip()

    def _characters(self, tokens: np.ndarray) -> str:
        return "" if self._detokenize is None else characters(self._detokenize, tokens.tolist())

    def _decode(self, tokens: np.ndarray) -> str:
        return "" if self._detokenize is None else self._detokenize(tokens.tolist())

    def _stop(self, texts: Sequence[str]) -> bool:
        """Whether the newest token completes a stop, one of `texts` or a sequence; cuts it off."""
        size = len(self.tokens)
        for sequence in self._sequences:
            if tuple(self.tokens[size - len(sequence) :].tolist()) == sequence:
                self.tokens = self.tokens[: size - len(sequence)]
                return True
        if not texts:
            return False
        text, before = self._decode(self.tokens), self._characters(self.tokens[:-1])
        starts = []
        for stop in texts:
            # Only what the newest token completes: an earlier one came before min_new_tokens.
            start = text.find(stop, max(0, len(before) - len(stop) + 1))
            if start >= 0:
                starts.append(start)
        if not starts:
            return False
        self._cut = text[: min(starts)]
        while len(self.tokens) and len(self._decode(self.tokens)) > len(self._cut):
            self.tokens = self.tokens[:-1]
        return True


def _overlap(text: Sequence, stop: Sequence) -> int:
    """How many characters or tokens at the text's end may be the beginning of the stop."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text[len(text) - size :] == stop[:size]:
            return size
    return 0
