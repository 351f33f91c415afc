"""Questions about pages of digits, and the visual tokens that answer them.

An answer is a function of the page and the question alone. A place is always named by two words,
its row letter and its column number, so that a reader has to combine them.
"""

import functools
import itertools
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from twig_jax.data import digits
from twig_jax.data.digits import COLUMNS, ROWS, SHADES, SIZES, Digit, Page
from twig_jax.data.wordings import (
    BESIDE,
    CELL,
    COMPARE,
    DIGIT_WORDS,
    DIRECTIONS,
    FAMILIES,
    FIND,
    LOCATE,
    NEIGHBOUR,
    NEIGHBOURS,
    PLACES,
    SUM,
    TRANSCRIBE,
    number,
)

# The default share of each kind; its order numbers the kinds.
MIX = {
    "cell": 0.24,
    "neighbour": 0.14,
    "compare": 0.1,
    "sum": 0.1,
    "describe": 0.28,
    "describe_neighbour": 0.14,
    # Asked for a place instead of by one: they are looked up from the question's own word, not from
    # the prompt's last token, where a selector reads attention. For training.
    "find": 0.0,
    "describe_find": 0.0,
    # For training alone: a whole page in order of places, or of values, names a place and its digit
    # every few words, which is the densest way to learn looking up the one by the other; so does a
    # list of all neighbours on one side, by value or by place.
    "transcribe": 0.0,
    "locate": 0.0,
    "neighbours": 0.0,
    "beside": 0.0,
}
KINDS = tuple(MIX)
_LONG = (
    "describe",
    "describe_find",
    "describe_neighbour",
    "transcribe",
    "locate",
    "neighbours",
    "beside",
)
TASKS = {kind: "long" if kind in _LONG else "short" for kind in KINDS}

# A kind that fails so often is one that a page does not allow: some draw a side, or how to name a
# digit, that happens to leave nothing to ask.
_FAILURES = 64
_BY_PLACE = 0.75  # how often the digit whose neighbour is asked for is named by its place

# Fields that do not depend on the page: `other` is in the question, `than` follows from `relation`.
_WORDING_FIELDS = frozenset({"other", "than"})


@dataclass(frozen=True)
class Question:
    """A question about a page.

    kind: one of KINDS. task: "short" or "long". cells: the digits that must be read to answer it.
    content: one flag per whitespace word of the answer, True where the word depends on the page.
    """

    text: str
    answer: str
    kind: str
    task: str
    cells: tuple[Digit, ...]
    content: tuple[bool, ...]


class NoQuestion(ValueError):
    """A page allows none of the kinds of question that are asked for."""


def stream(
    page: Page, rng: np.random.Generator, mix: Mapping[str, float] | None = None
) -> Iterator[Question]:
    """Endless questions about one page, kinds drawn by weight among those that the page allows.

    No text comes twice and no (kind, cells) comes twice, as far as the page has others left.
    Raises ValueError for a mix with an unknown kind, with a negative weight or without weight, and
    NoQuestion where the page allows none of its kinds.
    """
    kinds, bounds = _weights(mix)
    texts: set[str] = set()
    keys: set[tuple] = set()
    misses = 0
    while True:
        kind = kinds[bisect_right(bounds, rng.random() * bounds[-1])]
        question = _MAKERS[kind](page, rng)
        if question is None:
            if not any(_MAKERS[other](page, rng) for _ in range(_FAILURES) for other in kinds):
                raise NoQuestion(f"the page allows no question of the kinds {', '.join(kinds)}")
            continue
        key = (kind, question.cells)
        # After some fruitless draws little or nothing is left: repeat cells, then whole texts.
        if (question.text in texts and misses < 64) or (key in keys and misses < 16):
            misses += 1
            continue
        misses = 0
        texts.add(question.text)
        keys.add(key)
        yield question


def questions(
    page: Page, rng: np.random.Generator, n: int, mix: Mapping[str, float] | None = None
) -> list[Question]:
    """The first n questions of `stream`."""
    return list(itertools.islice(stream(page, rng, mix), n))


def example(
    split: str,
    seed: int,
    index: int,
    task: str | None = None,
    mix: Mapping[str, float] | None = None,
) -> tuple[Page, Question]:
    """Page number `index` with one question.

    The kind is drawn first, so that kinds come in exactly the shares of the mix; a page that does
    not allow the kind gives way to its next variant.

    task: "short", "long" or None for both. Raises ValueError for anything else, and as `stream`
    does.
    """
    if task not in (None, "short", "long"):
        raise ValueError(f"unknown task {task!r}, expected short, long or None")
    mix = MIX if mix is None else mix
    wanted = {kind: weight for kind, weight in mix.items() if task in (None, TASKS.get(kind, task))}
    kinds, bounds = _weights(wanted)
    rng = digits.generator(split, seed, index, 1)
    kind = kinds[bisect_right(bounds, rng.random() * bounds[-1])]
    for variant in itertools.count():
        drawn = digits.page(split, seed, index, variant)
        question = _MAKERS[kind](drawn, rng)
        if question is not None:
            return drawn, question
    raise AssertionError("unreachable")


def ranked_patches(question: Question) -> tuple[int, ...]:
    """The visual tokens that show the needed digits: one of each in turn, most ink first."""
    turns = itertools.zip_longest(*(digit.patches for digit in question.cells))
    return tuple(patch for turn in turns for patch in turn if patch is not None)


def _weights(mix: Mapping[str, float] | None) -> tuple[list[str], list[float]]:
    mix = MIX if mix is None else mix
    for kind, weight in mix.items():
        if kind not in KINDS:
            raise ValueError(
                f"unknown kind of question {kind!r}, expected some of {', '.join(KINDS)}"
            )
        if weight < 0:
            raise ValueError(f"the weight of {kind} is negative: {weight}")
    kinds = [kind for kind, weight in mix.items() if weight > 0]
    if not kinds:
        raise ValueError("the mix of questions gives no kind a positive weight")
    return kinds, list(itertools.accumulate(mix[kind] for kind in kinds))


def _pick(options: Sequence[Any], rng: np.random.Generator) -> Any:
    return options[int(rng.random() * len(options))]


@functools.cache
def _parts(template: str) -> list[tuple[str, str, str, bool]]:
    """Each word of a template: (text before its field, field, text after, the page decides it)."""
    parts = []
    for word in template.split(" "):
        before, _, rest = word.partition("{")
        field, _, after = rest.partition("}")
        parts.append((before, field, after, bool(field) and field not in _WORDING_FIELDS))
    return parts


def _question(
    kind: str, ask: str, answer: str, cells: tuple[Digit, ...], fields: dict[str, str]
) -> Question:
    words, content = [], []
    for before, field, after, decided in _parts(answer):
        word = before + (fields[field] if field else "") + after
        words.append(word)
        content += [decided] * (word.count(" ") + 1)
    return Question(
        ask.format_map(fields), " ".join(words), kind, TASKS[kind], cells, tuple(content)
    )


def _fields(digit: Digit) -> dict[str, str]:
    return {
        "value": DIGIT_WORDS[digit.value],
        "row": ROWS[digit.row],
        "column": COLUMNS[digit.column],
        "shade": SHADES[digit.shade],
        "size": SIZES[digit.size],
    }


def _place(fields: dict[str, str], rng: np.random.Generator) -> str:
    return _pick(PLACES, rng).format_map(fields)


def _unique(page: Page) -> list[Digit]:
    """The digits whose value occurs once."""
    counts = Counter(digit.value for digit in page.digits)
    return [digit for digit in page.digits if counts[digit.value] == 1]


def _pairs(page: Page, anchors: Sequence[Digit]) -> list[tuple[Digit, str, Digit]]:
    """(anchor, direction, neighbour): one of the anchors and a digit in a cell beside it."""
    filled = {(digit.row, digit.column): digit for digit in page.digits}
    pairs = []
    for anchor in anchors:
        for direction, (down, across) in DIRECTIONS.items():
            neighbour = filled.get((anchor.row + down, anchor.column + across))
            if neighbour is not None:
                pairs.append((anchor, direction, neighbour))
    return pairs


def _cell(page: Page, rng: np.random.Generator) -> Question:
    digit = _pick(page.digits, rng)
    fields = _fields(digit)
    ask, answer = _pick(CELL, rng)
    return _question("cell", ask, answer, (digit,), fields | {"place": _place(fields, rng)})


def _find(page: Page, rng: np.random.Generator) -> Question | None:
    unique = _unique(page)
    if not unique:
        return None
    digit = _pick(unique, rng)
    ask, answer = _pick(FIND, rng)
    return _question("find", ask, answer, (digit,), _fields(digit))


def _beside_anchor(
    page: Page, rng: np.random.Generator
) -> tuple[Digit, tuple[Digit, ...], dict[str, str]] | None:
    """(a digit beside another, the digits to be read for it, how the question names it)."""
    by_place = rng.random() < _BY_PLACE
    pairs = _pairs(page, page.digits if by_place else _unique(page))
    if not pairs:
        return None
    anchor, direction, digit = _pick(pairs, rng)
    named = _fields(anchor)
    # The shortest name of a place, as the question names a direction too.
    name = f"digit in {PLACES[0].format_map(named)}" if by_place else named["value"]
    cells = (digit,) if by_place else (anchor, digit)
    return digit, cells, {"direction": direction, "anchor": name}


def _neighbour(page: Page, rng: np.random.Generator) -> Question | None:
    found = _beside_anchor(page, rng)
    if found is None:
        return None
    digit, cells, names = found
    ask, answer = _pick(NEIGHBOUR, rng)
    return _question("neighbour", ask, answer, cells, _fields(digit) | names)


def _compare(page: Page, rng: np.random.Generator) -> Question | None:
    """Balanced for every threshold: one that divides the page, then the verdict, then a digit."""
    values = [digit.value for digit in page.digits]
    low, high = min(values), max(values)
    if low == high:
        return None
    more = rng.random() < 0.5
    threshold = int(rng.integers(low, high)) + (0 if more else 1)
    verdict = rng.random() < 0.5
    fitting = [
        digit
        for digit in page.digits
        if (digit.value > threshold if more else digit.value < threshold) == verdict
    ]
    digit = _pick(fitting, rng)
    fields = {
        "place": _place(_fields(digit), rng),
        "relation": "more" if more else "less",
        "other": DIGIT_WORDS[threshold],
        "verdict": "yes" if verdict else "no",
    }
    ask, answer = _pick(COMPARE, rng)
    return _question("compare", ask, answer, (digit,), fields)


def _sum(page: Page, rng: np.random.Generator) -> Question | None:
    rows = [tuple(digit for digit in page.digits if digit.row == row) for row in range(digits.GRID)]
    pairs = [row for row in rows if len(row) == 2]
    if not pairs:
        return None
    pair = _pick(pairs, rng)
    fields = {"row": ROWS[pair[0].row], "sum": number(pair[0].value + pair[1].value)}
    ask, answer = _pick(SUM, rng)
    return _question("sum", ask, answer, pair, fields)


def _described(
    kind: str,
    digit: Digit,
    cells: tuple[Digit, ...],
    fields: dict[str, str],
    rng: np.random.Generator,
) -> Question:
    """A long question about one digit; `fields` has its subject."""
    family = _pick(FAMILIES, rng)
    value, other = digit.value, int(rng.integers(2, 10))
    relation = "equal" if value == other else "more" if value > other else "less"
    fields = fields | {
        "other": DIGIT_WORDS[other],
        "parity": "odd" if value % 2 else "even",
        "relation": relation,
        "than": "to" if value == other else "than",
        "sum": number(value + other),
        "double": number(2 * (value + other)),
        "product": number(value * other),
        "next": number(value * other + 1),
    }
    opening = family.opening_find if kind == "describe_find" else family.opening
    return _question(kind, _pick(family.asks, rng), f"{opening} {family.rest}", cells, fields)


def _describe(page: Page, rng: np.random.Generator) -> Question:
    digit = _pick(page.digits, rng)
    fields = _fields(digit)
    fields["subject"] = f"the digit in {_place(fields, rng)}"
    return _described("describe", digit, (digit,), fields, rng)


def _describe_find(page: Page, rng: np.random.Generator) -> Question | None:
    unique = _unique(page)
    if not unique:
        return None
    digit = _pick(unique, rng)
    fields = _fields(digit)
    fields["subject"] = f"the {fields['value']}"
    return _described("describe_find", digit, (digit,), fields, rng)


def _describe_neighbour(page: Page, rng: np.random.Generator) -> Question | None:
    found = _beside_anchor(page, rng)
    if found is None:
        return None
    digit, cells, names = found
    fields = _fields(digit)
    fields["subject"] = "the digit {direction} the {anchor}".format_map(names)
    return _described("describe_neighbour", digit, cells, fields, rng)


def _transcribe(page: Page, rng: np.random.Generator) -> Question:
    read = [_fields(digit) for digit in page.digits]
    answer = ", ".join(f"{f['row']} {f['column']} {f['value']}" for f in read)
    content = (True,) * (3 * len(read))
    return Question(TRANSCRIBE, answer, "transcribe", TASKS["transcribe"], page.digits, content)


def _locate(page: Page, rng: np.random.Generator) -> Question:
    cells = tuple(sorted(page.digits, key=lambda digit: digit.value))
    read = [_fields(digit) for digit in cells]
    answer = ", ".join(f"{f['value']} {f['row']} {f['column']}" for f in read)
    content = (True,) * (3 * len(read))
    return Question(LOCATE, answer, "locate", TASKS["locate"], cells, content)


def _listed(
    kind: str, ask: str, page: Page, anchors: Sequence[Digit], by: str, rng: np.random.Generator
) -> Question | None:
    """All neighbours of the anchors on one side, each after its anchor's `by` fields."""
    direction = _pick(tuple(DIRECTIONS), rng)
    pairs = [(a, b) for a, side, b in _pairs(page, anchors) if side == direction]
    if not pairs:
        return None
    read = [f"{by.format_map(_fields(a))} {DIGIT_WORDS[b.value]}" for a, b in pairs]
    cells = tuple(dict.fromkeys(digit for pair in pairs for digit in pair))
    answer = ", ".join(read)
    content = (True,) * len(answer.split())
    return Question(ask.format(direction=direction), answer, kind, TASKS[kind], cells, content)


def _neighbours(page: Page, rng: np.random.Generator) -> Question | None:
    return _listed("neighbours", NEIGHBOURS, page, _unique(page), "{value}", rng)


def _beside(page: Page, rng: np.random.Generator) -> Question | None:
    return _listed("beside", BESIDE, page, page.digits, "{row} {column}", rng)


_MAKERS: dict[str, Callable[[Page, np.random.Generator], Question | None]] = {
    "cell": _cell,
    "find": _find,
    "neighbour": _neighbour,
    "compare": _compare,
    "sum": _sum,
    "describe": _describe,
    "describe_find": _describe_find,
    "describe_neighbour": _describe_neighbour,
    "transcribe": _transcribe,
    "locate": _locate,
    "neighbours": _neighbours,
    "beside": _beside,
}
