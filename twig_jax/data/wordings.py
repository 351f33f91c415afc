"""The words of the digits data: numbers, places, and the templates of questions and answers.

The embedded tokenizer has one token for each of these words, so a new word needs a new tokenizer,
and with it a newly trained base.
"""

from dataclasses import dataclass

from twig_jax.data.digits import COLUMNS, ROWS, SHADES, SIZES

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def number(value: int) -> str:
    """The words of a number from 0 to 99: `twenty eight`."""
    if value < 20:
        return _ONES[value]
    tens, ones = divmod(value, 10)
    return _TENS[tens - 2] + (f" {_ONES[ones]}" if ones else "")


NUMBER_WORDS = tuple(_ONES + _TENS)
DIGIT_WORDS = NUMBER_WORDS[:10]

PLACES = (
    "row {row}, column {column}",
    "column {column} of row {row}",
    "the cell in row {row} and column {column}",
    "cell {row} {column}",
)
DIRECTIONS = {"right of": (0, 1), "left of": (0, -1), "above": (-1, 0), "below": (1, 0)}

# (question, answer) of the short kinds.
CELL = (
    ("What digit is in {place}?", "{value}"),
    ("Which digit do you see in {place}?", "{value}"),
    ("Read the digit in {place}.", "{value}"),
    ("Name the digit and its ink in {place}.", "{value}, {shade}"),
    ("Name the digit and its size in {place}.", "{value}, {size}"),
    ("Give the digit in {place}, its size and its ink.", "{value}, {size}, {shade}"),
)
FIND = (
    ("Where is the {value}?", "{row} {column}"),
    ("Which cell holds the {value}?", "{row} {column}"),
    ("Find the {value}.", "{row} {column}"),
    ("Name the row and column of the {value}.", "{row} {column}"),
)
NEIGHBOUR = (
    ("What digit is {direction} the {anchor}?", "{value}"),
    ("Which digit do you see {direction} the {anchor}?", "{value}"),
    ("Read the digit {direction} the {anchor}.", "{value}"),
)
COMPARE = (
    ("Is the digit in {place} {relation} than {other}?", "{verdict}"),
    ("Look at {place}. Is its digit {relation} than {other}?", "{verdict}"),
)
LOCATE = "Find the digits."
NEIGHBOURS = "Read the digits {direction} the digits."
BESIDE = "Read the digits {direction} the digits in row and column."
TRANSCRIBE = "Read the digits."
SUM = (
    ("Add up the digits in row {row}.", "{sum}"),
    ("What is the sum of the digits in row {row}?", "{sum}"),
    ("What do the digits in row {row} add up to?", "{sum}"),
)


@dataclass(frozen=True)
class Family:
    """One way to describe a digit.

    asks: two wordings. opening, opening_find: how the answer begins, for a digit that was asked for
    by its place and by its value. rest: how it goes on.
    """

    asks: tuple[str, str]
    opening: str
    opening_find: str
    rest: str


FAMILIES = (
    Family(
        ("Describe {subject}, and use {other}.", "Describe {subject} and use {other}."),
        "{value}, in {shade} ink and {size}, at row {row}, column {column}.",
        "{row} {column} holds {value}, in {shade} ink and {size}.",
        "{value} is {parity} and {relation} {than} {other}. {value} plus {other} is {sum}, "
        "twice that is {double}. {value} times {other} is {product}.",
    ),
    Family(
        ("Tell me about {subject} with {other}.", "Tell me about {subject}, with {other} in mind."),
        "{value} at row {row}, column {column} is {size}, in {shade} ink.",
        "{row} {column} is where {value} is, {size} and in {shade} ink.",
        "it is {parity}. {value} times {other} is {product}, and {value} plus {other} is {sum}. "
        "{value} is {relation} {than} {other}.",
    ),
    Family(
        ("Read {subject}, then compute with {other}.", "Read {subject} and compute with {other}."),
        "{value} is {parity}, {size} and {shade}, in column {column} of row {row}.",
        "{row} {column} has {value}, {parity}, {size} and {shade}.",
        "it is {relation} {than} {other}. {value} plus {other} is {sum}. "
        "{value} times {other} is {product}, plus one is {next}.",
    ),
)


def asks() -> tuple[str, ...]:
    """All question templates."""
    short = (ask for ask, _ in (*CELL, *FIND, *NEIGHBOUR, *COMPARE, *SUM))
    return (*short, *(ask for family in FAMILIES for ask in family.asks))


def vocabulary() -> tuple[str, ...]:
    """Every word that questions and answers are made of, without punctuation, in a fixed order."""
    templates = [*PLACES, *DIRECTIONS, "the digit in"]
    templates += asks()
    for family in FAMILIES:
        templates += [family.opening, family.opening_find, family.rest]
    words = [
        word.strip(".,?") for template in templates for word in template.split() if "{" not in word
    ]
    values = [*NUMBER_WORDS, *ROWS, *COLUMNS, *SHADES, *SIZES]
    values += ["odd", "even", "more", "less", "equal", "than", "to", "yes", "no"]
    return tuple(dict.fromkeys(words + values))
