"""Questions: every answer derived again from the page, by other code."""

import itertools
import re
from collections import Counter

import numpy as np
import pytest

from twig_jax.data import digits, questions, wordings

SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
TENS = {2: "twenty", 3: "thirty", 4: "forty", 5: "fifty", 6: "sixty", 7: "seventy", 8: "eighty"}
STEPS = {"right of": (0, 1), "left of": (0, -1), "above": (-1, 0), "below": (1, 0)}
PLACES = (
    r"row (?P<r>[A-D]), column (?P<c>[1-4])",
    r"column (?P<c>[1-4]) of row (?P<r>[A-D])",
    r"the cell in row (?P<r>[A-D]) and column (?P<c>[1-4])",
    r"cell (?P<r>[A-D]) (?P<c>[1-4])",
)


def words(value):
    if value < 20:
        return SMALL[value]
    return TENS[value // 10] + (" " + SMALL[value % 10] if value % 10 else "")


MIX = questions.MIX | {"find": 0.1, "describe_find": 0.1}


def pool(count=150, per_page=12, split="train"):
    for index in range(count):
        page = digits.page(split, 5, index)
        rng = digits.generator(split, 5, index, 1)
        for question in questions.questions(page, rng, per_page, MIX):
            yield page, question


@pytest.fixture(scope="module")
def asked():
    return list(pool())


def named_place(page, text):
    """The digit that the text names by row and column."""
    found = [match for place in PLACES if (match := re.search(place, text))]
    assert found, text
    row, column = "ABCD".index(found[0]["r"]), int(found[0]["c"]) - 1
    (digit,) = [d for d in page.digits if (d.row, d.column) == (row, column)]
    return digit


def named_value(page, text):
    """The one digit whose value comes after `the`."""
    (match,) = re.finditer(rf"the ({'|'.join(SMALL[:10])})\b", text)
    (digit,) = [d for d in page.digits if SMALL[d.value] == match[1]]
    return digit


def beside(page, text):
    """(the digit on the named side of another, the digits to be read for that)."""
    (side,) = [side for side in STEPS if f" {side} the " in text]
    by_place = f"{side} the digit in " in text
    anchor = named_place(page, text) if by_place else named_value(page, text)
    place = (anchor.row + STEPS[side][0], anchor.column + STEPS[side][1])
    (digit,) = [d for d in page.digits if (d.row, d.column) == place]
    return digit, (digit,) if by_place else (anchor, digit)


def short_answer(page, question):
    text = question.text
    if question.kind == "cell":
        digit = named_place(page, text)
        parts = [SMALL[digit.value]]
        size, shade = ["small", "large"][digit.size], ["faint", "dark"][digit.shade]
        # The order of the answer is that of the question.
        for word, part in sorted([(text.find("size"), size), (text.find("ink"), shade)]):
            parts += [part] if word >= 0 else []
        return ", ".join(parts), (digit,)
    if question.kind == "find":
        digit = named_value(page, text)
        return f"{'ABCD'[digit.row]} {digit.column + 1}", (digit,)
    if question.kind == "neighbour":
        digit, cells = beside(page, text)
        return SMALL[digit.value], cells
    if question.kind == "compare":
        digit = named_place(page, text)
        match = re.search(r"(more|less) than (\w+)\?", text)
        other = SMALL.index(match[2])
        true = digit.value > other if match[1] == "more" else digit.value < other
        return "yes" if true else "no", (digit,)
    row = "ABCD".index(re.search(r"in row ([A-D])", text)[1])
    first, second = [d for d in page.digits if d.row == row]
    return words(first.value + second.value), (first, second)


def long_answer(page, question):
    text = question.text
    if question.kind == "describe":
        digit = named_place(page, text)
        cells = (digit,)
    elif question.kind == "describe_find":
        digit = named_value(page, text)
        cells = (digit,)
    else:
        digit, cells = beside(page, text)
    other = SMALL.index(re.search(r"(?:with|use) (\w+)(?: in mind)?\.$", text)[1])
    v, n, row, column = digit.value, words(other), "ABCD"[digit.row], digit.column + 1
    name, size, shade = words(v), ["small", "large"][digit.size], ["faint", "dark"][digit.shade]
    parity = ["even", "odd"][v % 2]
    relation = "equal to" if v == other else "more than" if v > other else "less than"
    plus, times = words(v + other), words(v * other)
    by_value = question.kind == "describe_find"
    if text.startswith("Describe"):
        start = (
            f"{row} {column} holds {name}, in {shade} ink and {size}."
            if by_value
            else f"{name}, in {shade} ink and {size}, at row {row}, column {column}."
        )
        rest = (
            f"{name} is {parity} and {relation} {n}. {name} plus {n} is {plus}, twice that is "
            f"{words(2 * (v + other))}. {name} times {n} is {times}."
        )
    elif text.startswith("Tell"):
        start = (
            f"{row} {column} is where {name} is, {size} and in {shade} ink."
            if by_value
            else f"{name} at row {row}, column {column} is {size}, in {shade} ink."
        )
        rest = (
            f"it is {parity}. {name} times {n} is {times}, and {name} plus {n} is {plus}. "
            f"{name} is {relation} {n}."
        )
    else:
        start = (
            f"{row} {column} has {name}, {parity}, {size} and {shade}."
            if by_value
            else f"{name} is {parity}, {size} and {shade}, in column {column} of row {row}."
        )
        rest = (
            f"it is {relation} {n}. {name} plus {n} is {plus}. {name} times {n} is {times}, "
            f"plus one is {words(v * other + 1)}."
        )
    return f"{start} {rest}", cells


def test_every_answer_follows_from_the_page(asked):
    for page, question in asked:
        derive = short_answer if question.task == "short" else long_answer
        assert (question.answer, question.cells) == derive(page, question), question.text
    tested = {kind for kind, share in MIX.items() if share}
    assert {question.kind for _, question in asked} == tested


def test_whole_pages_are_read_by_place_by_value_and_by_neighbour():
    for index in range(20):
        page, by_place = questions.example("train", 1, index, mix={"transcribe": 1.0})
        told = {(d.row, d.column): SMALL[d.value] for d in page.digits}
        places = sorted(told)
        expected = ", ".join(f"{'ABCD'[r]} {c + 1} {told[r, c]}" for r, c in places)
        assert by_place.answer == expected
        page, by_value = questions.example("train", 1, index, mix={"locate": 1.0})
        values = sorted((d.value, d.row, d.column) for d in page.digits)
        expected = ", ".join(f"{SMALL[v]} {'ABCD'[r]} {c + 1}" for v, r, c in values)
        assert by_value.answer == expected
        page, beside = questions.example("train", 1, index, mix={"neighbours": 1.0})
        (side,) = [side for side in STEPS if f" {side} the " in beside.text]
        found = {(d.row, d.column): d.value for d in page.digits}
        pairs = [
            (d.value, found[d.row + STEPS[side][0], d.column + STEPS[side][1]])
            for d in page.digits
            if (d.row + STEPS[side][0], d.column + STEPS[side][1]) in found
            and list(found.values()).count(d.value) == 1
        ]
        assert beside.answer == ", ".join(f"{SMALL[a]} {SMALL[b]}" for a, b in pairs)
        assert by_place.content == by_value.content == (True,) * 3 * len(values)


def test_content_marks_what_the_page_decides(asked):
    varying = set(wordings.NUMBER_WORDS) | set("ABCD1234") | {"faint", "dark", "small", "large"}
    varying |= {"odd", "even", "more", "less", "equal", "yes", "no"}
    for _, question in asked:
        told = question.answer.split()
        assert len(told) == len(question.content)
        assert question.content[0]
        marked = {
            word.strip(".,") for word, flag in zip(told, question.content, strict=True) if flag
        }
        assert marked <= varying
        plain = [w.strip(".,") for w, flag in zip(told, question.content, strict=True) if not flag]
        if question.task == "short":
            assert not plain
        else:
            # The number that the question gave, and the one of "plus one", are all that is left.
            given = re.search(r"(?:with|use) (\w+)", question.text)[1]
            assert {word for word in plain if word in varying} <= {given, "one"}


def test_questions_read_well(asked):
    for _, question in asked:
        assert question.text[0].isupper()
        assert question.text[-1] in ".?"
        assert not re.search(r"[{}]|  |\.\.", question.text + question.answer)
        assert question.answer == re.sub(r"\b[A-Z](?=[a-z])", "", question.answer)
    assert len(wordings.asks()) >= 24


def test_a_page_is_not_asked_the_same_twice():
    for index in range(80):
        page = digits.page("train", 5, index)
        drawn = questions.questions(page, digits.generator("train", 5, index, 1), 10)
        assert len({question.text for question in drawn}) == 10
        assert len({(question.kind, question.cells) for question in drawn}) == 10


def test_an_exhausted_page_goes_on_with_repeats():
    page = digits.page("train", 5, 0)
    drawn = questions.questions(page, np.random.default_rng(0), 200, {"cell": 1.0})
    assert len(drawn) == 200
    first = {question.cells for question in drawn[: len(page.digits)]}
    assert len(first) >= len(page.digits) - 1


@pytest.mark.parametrize("wanted", ["more", "less"])
def test_compare_is_balanced_for_every_threshold(wanted):
    verdicts: dict[str, Counter] = {}
    for index in range(700):
        _, question = questions.example("train", 9, index, mix={"compare": 1.0})
        relation, other = re.search(r"(more|less) than (\w+)\?", question.text).groups()
        if relation == wanted:
            verdicts.setdefault(other, Counter())[question.answer] += 1
    for other, count in verdicts.items():
        total = count.total()
        assert abs(count["yes"] - total / 2) < 4 * np.sqrt(total) / 2, other
    assert len(verdicts) >= 8


def test_examples_follow_the_mix_exactly():
    count = 1500
    drawn = Counter(questions.example("test", 2, index)[1].kind for index in range(count))
    for kind, share in questions.MIX.items():
        tolerance = 4 * np.sqrt(share * (1 - share) / count)
        assert drawn[kind] / count == pytest.approx(share, abs=tolerance), kind


@pytest.mark.parametrize("task", ["short", "long"])
def test_examples_of_one_task(task):
    for index in range(50):
        page, question = questions.example("validation", 2, index, task)
        assert question.task == task
        assert set(question.cells) <= set(page.digits)
        again = questions.example("validation", 2, index, task)[1]
        assert again == question


@pytest.mark.parametrize("kind", questions.KINDS)
def test_every_kind_can_be_asked_for_alone(kind):
    for index in range(20):
        assert questions.example("train", 4, index, mix={kind: 1.0})[1].kind == kind


@pytest.mark.parametrize("kind", ["neighbours", "beside"])
def test_a_page_is_asked_what_it_allows_on_one_side_alone(kind):
    """As here, where two digits stand one above the other: nothing is left of or right of any."""
    index = next(
        index
        for index in itertools.count()
        if sorted(
            (abs(a.row - b.row), abs(a.column - b.column))
            for a, b in itertools.combinations(digits.page("train", 0, index).digits, 2)
            if abs(a.row - b.row) + abs(a.column - b.column) == 1
        )
        == [(1, 0)]
    )
    page = digits.page("train", 0, index)
    for seed in range(20):
        asked = questions.questions(page, np.random.default_rng(seed), 3, {kind: 1.0})
        assert {question.kind for question in asked} == {kind}


def test_long_answers_have_the_intended_length(asked, tokenizer):
    lengths = [
        len(tokenizer.encode(f" {question.answer}", add_special_tokens=False))
        for _, question in asked
        if question.task == "long"
    ]
    assert 30 <= np.mean(lengths) <= 42


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda page, rng: questions.questions(page, rng, 1, {"cells": 1.0}),
            "unknown kind .*'cells'",
        ),
        (lambda page, rng: questions.questions(page, rng, 1, {"cell": -1.0}), "negative"),
        (lambda page, rng: questions.questions(page, rng, 1, {"cell": 0.0}), "no kind a positive"),
        (lambda page, rng: questions.questions(page, rng, 1, {}), "no kind a positive"),
        (lambda page, rng: questions.example("test", 0, 0, "medium"), "unknown task 'medium'"),
        (lambda page, rng: questions.example("test", 0, 0, "long", {"cell": 1.0}), "no kind a pos"),
    ],
)
def test_bad_mixes_and_tasks_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(digits.page("train", 0, 0), np.random.default_rng(0))


def test_a_page_that_allows_no_kind_of_the_mix_says_so():
    index = next(
        index
        for index in range(1000)
        if 2 not in Counter(digit.row for digit in digits.page("train", 0, index).digits).values()
    )
    page = digits.page("train", 0, index)
    with pytest.raises(ValueError, match="allows no question of the kinds sum"):
        questions.questions(page, np.random.default_rng(0), 1, {"sum": 1.0})


def test_ranked_patches_take_from_each_digit_in_turn():
    for index in range(20):
        _, question = questions.example("test", 1, index, mix={"sum": 0.5, "cell": 0.5})
        longest = max(len(digit.patches) for digit in question.cells)
        order = [
            digit.patches[rank]
            for rank in range(longest)
            for digit in question.cells
            if rank < len(digit.patches)
        ]
        assert list(questions.ranked_patches(question)) == order
