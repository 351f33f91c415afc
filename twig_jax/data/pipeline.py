"""Training batches of digits pages: many turns about one page share its visual tokens.

A row begins with a prefix (BOS, the image slots and the fixed text around them), followed by as
many turns as fit. Every turn is to be trained as if it alone followed the prefix, so its positions
restart there. `segments` tells turns apart, and marks the prefix as what all of them see:

    tokens     BOS # # .. | What digit .. ASSISTANT: seven </s> | Where .. B 3 </s> | pad
    segments   -1 -1 -1   | 1    1     .. 1          1     1    | 2     .. 2 2 2    | 0
    positions  0   1 2 .. | P    P+1   ..                       | P     ..          | P
    targets    -1 -1 -1   | -1   -1    .. seven      </s>  -1   | -1    .. 3 </s> -1| -1
"""

import itertools
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from twig_jax.data import conversation, digits, questions
from twig_jax.data.digits import COLUMNS, ROWS, SHADES, SIZES, Page
from twig_jax.data.packing import SHARED
from twig_jax.data.questions import DIGIT_WORDS, KINDS, Question
from twig_jax.data.tokens import prompt_ids

TEMPLATE = "llava_hf"
BLANK = "blank"

Batch = dict[str, np.ndarray]

# A row is complete at the second turn that does not fit any more: stopping at the first wastes
# more, searching on would favour short turns.
_MISFITS = 2
# So many turns that do not fit into an empty row mean that none will.
_HOPELESS = 64


class WordEncoder:
    """Encodes text word by word with a memory.

    For tokenizers that never join pieces across a space, as the one in assets/digits.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def word(self, text: str) -> list[int]:
        """Token ids of one word, with its leading space where it has one."""
        ids = self._known.get(text)
        if ids is None:
            ids = self._known[text] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def words(self, text: str) -> list[list[int]]:
        """Token ids of each whitespace word; every word but the first takes the space before it."""
        first, *rest = text.split(" ")
        return [self.word(first), *(self.word(f" {word}") for word in rest)]

    def single(self, text: str) -> int:
        """The id of a word that is one token. Raises ValueError where it is not."""
        ids = self.word(text)
        if len(ids) != 1:
            raise ValueError(
                f"the tokenizer needs {len(ids)} tokens for {text!r}, the digits data needs one"
            )
        return ids[0]


class DigitsBatches:
    """An endless iterator of batches; batch n is a function of the settings and n alone.

    tokenizer: as saved in assets/digits. batch_size: rows this shard gives per step.
    row_tokens: length of a row. mix: share of each kind of question (None: questions.MIX). shard:
    (index, count); shards of one step hold consecutive rows of one global batch.
    Batches are drawn ahead by a thread, which `close` ends.

    Each item, with B = batch_size, S = row_tokens, P = length of the prefix:
      pixels         uint8 [B, 1, 96, 96, 3]
      tokens         int32 [B, S]  image slots hold image_token_id, padding the pad id
      is_visual      bool [B, S]   the image slots
      positions      int32 [B, S]  from P on in every turn, P at padding
      segments       int32 [B, S]  -1 prefix, 1.. turns of the row, 0 padding
      targets        int32 [B, S]  the next token where it is an answer's or its EOS, else -1
      kinds          int32 [B, S]  index into questions.KINDS where targets >= 0, else -1
      content        bool [B, S]   the target is a word that depends on the page
      patch_words    int32 [B, 144, 5]  tokens that name what each patch shows: digit or " blank",
                                        row, column, shade and size (-1 and -1 where blank)

    Turns that no row can hold are left out, and a page that allows no question of the mix gives way
    to its next variant. Raises ValueError for rows that no turn fits, a bad shard, or a tokenizer
    made for other data.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        split: str = "train",
        seed: int,
        batch_size: int,
        row_tokens: int,
        image_token_id: int,
        mix: Mapping[str, float] | None = None,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        if not 0 <= shard[0] < shard[1]:
            raise ValueError(f"shard {shard} is not (index, count) with 0 <= index < count")
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} must be positive")
        self._next = 0  # row of all shards that the next batch begins with
        self._ahead: Generator[Batch] | None = None
        self._tokenizer, self._encoder = tokenizer, WordEncoder(tokenizer)
        self._split, self._seed, self._mix = split, seed, mix
        self._batch_size, self._row_tokens, self._shard = batch_size, row_tokens, shard
        self._all = batch_size * shard[1]
        self._prefix, self._is_visual = prompt_ids(
            tokenizer, conversation.head(TEMPLATE, images=1), image_token_id, digits.VISUAL_TOKENS
        )
        self._names = _PatchNames(self._encoder)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._ahead is None:
            self._ahead = prefetch(map(self._batch, itertools.count(self._next, self._all)))
        batch = next(self._ahead)
        self._next += self._all
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position behind the last batch that was given, to be saved as JSON."""
        return {"row": self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a saved position."""
        self.close()
        self._next = state["row"]

    @staticmethod
    def reshard(states: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
        """Positions of `count` shards that go on where others stopped."""
        return [states[0]] * count

    @property
    def counters(self) -> dict[str, float]:
        """Nothing is counted: no sample is bad."""
        return {}

    def close(self) -> None:
        """Ends the thread."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _batch(self, first: int) -> Batch:
        """Of all shards' rows from `first` on."""
        first += self._shard[0] * self._batch_size
        rows = [self._row(first + row) for row in range(self._batch_size)]
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        batch["pixels"] = batch["pixels"][:, None]
        return batch

    def _row(self, index: int) -> Batch:
        page, asking = self._asked(index)
        start, length = len(self._prefix), self._row_tokens
        if length <= start:
            raise ValueError(f"a row of {length} tokens does not even hold the page's {start}")
        row = {
            "tokens": np.full(length, self._tokenizer.pad_token_id, np.int32),
            "is_visual": np.zeros(length, bool),
            "positions": np.full(length, start, np.int32),
            "segments": np.zeros(length, np.int32),
            "targets": np.full(length, -1, np.int32),
            "kinds": np.full(length, -1, np.int32),
            "content": np.zeros(length, bool),
        }
        row["tokens"][:start], row["is_visual"][:start] = self._prefix, self._is_visual
        row["positions"][:start], row["segments"][:start] = np.arange(start), SHARED
        begin, misfits, segment = start, 0, 0
        for question in asking:
            asked, answer, content = self._turn(question)
            size = len(asked) + len(answer)
            end = begin + size
            if end > length:
                misfits += 1
                if misfits >= _MISFITS and segment:
                    break
                if misfits == _HOPELESS:
                    raise ValueError(
                        f"a row of {length} tokens is too short for a page of {start} and a turn "
                        f"of {size} tokens"
                    )
                continue
            segment += 1
            row["tokens"][begin:end] = asked + answer
            row["positions"][begin:end] = np.arange(start, start + size)
            row["segments"][begin:end] = segment
            predicting = slice(begin + len(asked) - 1, end - 1)
            row["targets"][predicting] = answer
            row["kinds"][predicting] = KINDS.index(question.kind)
            row["content"][predicting] = content
            begin = end
        return row | {"pixels": page.image, "patch_words": self._names(page)}

    def _asked(self, index: int) -> tuple[Page, Iterator[Question]]:
        """A page, or the first of its variants that allows a kind of the mix, and its questions."""
        for variant in itertools.count():
            page = digits.page(self._split, self._seed, index, variant)
            rng = digits.generator(self._split, self._seed, index, 1)
            asking = questions.stream(page, rng, self._mix)
            try:
                return page, itertools.chain([next(asking)], asking)
            except questions.NoQuestion:
                continue
        raise AssertionError("unreachable")

    def _turn(self, question: Question) -> tuple[list[int], list[int], list[bool]]:
        """Ids up to where the model answers, ids of the answer and EOS, and their content flags."""
        encoder, form = self._encoder, conversation.template(TEMPLATE)
        asked = [token for word in encoder.words(question.text + form.user_end) for token in word]
        answer, content = [], []
        # The answer's first word comes after a space, like all others.
        for word, decided in zip(
            encoder.words(form.answer_start + question.answer)[1:], question.content, strict=True
        ):
            answer += word
            content += [decided] + [False] * (len(word) - 1)  # punctuation is wording
        return asked, [*answer, self._tokenizer.eos_token_id], [*content, False]


class _PatchNames:
    """The words that name what each patch of a page shows."""

    def __init__(self, encoder: WordEncoder) -> None:
        def ids(words: tuple[str, ...]) -> list[int]:
            return [encoder.single(f" {word}") for word in words]

        self._digits, self._shades, self._sizes = ids(DIGIT_WORDS), ids(SHADES), ids(SIZES)
        side = digits.PATCHES_PER_SIDE
        cells = np.arange(side) // (digits.CELL // digits.PATCH)
        blank = np.full((side, side, 5), -1, np.int32)
        blank[..., 0] = encoder.single(f" {BLANK}")
        blank[..., 1] = np.array(ids(ROWS))[cells][:, None]
        blank[..., 2] = np.array(ids(COLUMNS))[cells]
        self._blank = blank.reshape(digits.VISUAL_TOKENS, 5)

    def __call__(self, page: Page) -> np.ndarray:
        """int32 [144, 5]: digit or blank, row, column, shade, size."""
        names = self._blank.copy()
        for digit in page.digits:
            patches = list(digit.patches)
            names[patches, 0] = self._digits[digit.value]
            names[patches, 3] = self._shades[digit.shade]
            names[patches, 4] = self._sizes[digit.size]
        return names


def prefetch(iterator: Iterator[Any]) -> Generator[Any]:
    """The same items in the same order, up to two of them drawn ahead by a background thread.

    The thread starts with the first item asked for. An error in the iterator is raised where its
    item would have come. Closing the generator ends the thread, after the item that it draws. What
    is drawn ahead counts in the iterator's own position, so a reader that resumes keeps its own
    count.
    """
    done = object()
    pool = ThreadPoolExecutor(1, "prefetch")
    try:
        ahead = deque(pool.submit(next, iterator, done) for _ in range(2))
        while (item := ahead.popleft().result()) is not done:
            ahead.append(pool.submit(next, iterator, done))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
