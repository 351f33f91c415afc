"""Benchmarks' files and scores. Expected figures are worked out by hand from the official rules."""

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openpyxl import load_workbook

from twig_jax.evaluation.benchmarks import BENCHMARKS, normalise
from twig_jax.evaluation.benchmarks.choice import open_right, parse_choice
from twig_jax.evaluation.benchmarks.files import (
    answer_line,
    read_answers,
    texts,
    write_answers,
    write_upload,
)
from twig_jax.evaluation.benchmarks.pages import Digits

BRIEF = "\nAnswer the question using a single word or phrase."


def write(path, content):
    """A JSON-lines file of a list, a text, or a JSON file of what else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        path.write_text(content)
    elif path.suffix == ".jsonl" or path.name.startswith("coco_pope"):
        path.write_text("".join(json.dumps(line) + "\n" for line in content))
    else:
        path.write_text(json.dumps(content))


def asked(*questions, **more):
    return [
        {"question_id": i, "image": f"{i}.jpg", "text": text, **more}
        for i, text in enumerate(questions)
    ]


def answered(benchmark, *said):
    """Answers to the first questions in order, None for a question without."""
    pairs = zip(benchmark.questions(), said, strict=False)
    return {q.key: text for q, text in pairs if text is not None}


# Normalisation.


@pytest.mark.parametrize(
    ("text", "vqa", "textvqa"),
    [
        ("The cat.", "cat", "cat"),
        ("a man and an umbrella", "man and umbrella", "man and umbrella"),
        ("Ten", "10", "10"),
        ("none", "0", "0"),
        ("5,000", "5000", "5000"),  # a comma in a number takes every mark with it
        ("1,,000;", "1 000", "1000"),  # not so two commas
        ("red,blue", "red blue", "redblue"),
        ("red, blue", "red blue", "red blue"),
        ("black/white", "black white", "black white"),
        ("red;/blue/green", "red blue green", "red blue green"),  # as each mark lies in the whole
        ("black / white", "black white", "black white"),
        ("well-known (old)", "well known old", "well known old"),
        ("1.5 m.", "1.5 m", "1.5 m"),
        ("dont know", "don't know", "don't know"),
        ("wouldntve", "wouldntve", "wouldntve"),  # of two apostrophes one is put back, not both
        ("wouldnt've", "wouldn't've", "wouldn't've"),
        ("somebody'd", "somebodyd", "somebodyd"),  # a slip of the official table
        ("joe's", "joe's", "joe 's"),
        ("yes\n", "yes", "yes"),
        ("what?", "what", "what"),
        ("." * 40 + "x", "." * 8 + "x", "." * 8 + "x"),  # 32 periods go, no more
        ("", "", ""),
    ],
)
def test_answers_are_compared_as_evalai_does(text, vqa, textvqa):
    assert normalise.vqa(text) == vqa
    assert normalise.textvqa(text) == textvqa


WORDS = st.lists(st.sampled_from("cat dog red 3 tree".split()), min_size=1, max_size=4)


@given(WORDS, st.sampled_from(["a", "an", "the", "The"]), st.integers(0, 4))
def test_articles_and_capitals_do_not_matter(words, article, at):
    plain = " ".join(words)
    with_article = " ".join([*words[:at], article, *words[at:]])
    assert normalise.vqa(with_article.title()) == normalise.vqa(plain) == plain


@given(st.text(max_size=40))
def test_spaces_and_breaks_around_words_do_not_matter(text):
    once = normalise.vqa(text)
    assert once == " ".join(once.split())
    assert normalise.vqa(f"\n {text}\t") == once


@given(st.integers(0, 10))
def test_the_more_annotators_agree(agreeing):
    """With k of ten: the k that agree see k - 1 others, the others see k."""
    annotators = ["x"] * agreeing + ["y"] * (10 - agreeing)
    inner, outer = min(1, max(agreeing - 1, 0) / 3), min(1, agreeing / 3)
    expected = (agreeing * inner + (10 - agreeing) * outer) / 10
    assert normalise.consensus("x", annotators) == pytest.approx(expected)


# Each benchmark.


def test_gqa(tmp_path):
    write(
        tmp_path / "llava_gqa_testdev_balanced.jsonl", asked(*(f"Q{i}?{BRIEF}" for i in range(4)))
    )
    known = {str(i): {"answer": a} for i, a in enumerate(["yes", "red", "left", "tree"])}
    write(tmp_path / "data" / "testdev_balanced_questions.json", known)
    gqa = BENCHMARKS["gqa"](tmp_path)
    first = gqa.questions()[0]
    assert first.prompt == f"Q0?{BRIEF}"
    assert first.images == (tmp_path / "data" / "images" / "0.jpg",)
    answers = answered(gqa, "Yes.", "the red", "left")
    score = gqa.score(answers)
    assert score.figures == {"accuracy": 50}
    assert list(score.points.values()) == [1, 0, 1, 0]
    assert [key.id for key in score.unanswered] == ["3"]
    name, content = gqa.upload(answers)
    assert name == "testdev_balanced_predictions.json"
    assert content[0] == {"questionId": "0", "prediction": "yes"}
    assert content[3] == {"questionId": "3", "prediction": ""}


def test_vqav2_has_a_file_for_the_official_judge(tmp_path):
    lines = asked(*(f"Q{i}?{BRIEF}" for i in range(3)))
    write(tmp_path / "llava_vqav2_mscoco_test2015.jsonl", lines)
    write(tmp_path / "llava_vqav2_mscoco_test-dev2015.jsonl", lines[1:])
    vqav2 = BENCHMARKS["vqav2"](tmp_path)
    answers = answered(vqav2, "The cat.")
    assert vqav2.score(answers) is None
    assert vqav2.upload(answers) == (
        "vqav2_test_upload.json",
        [{"question_id": i, "answer": a} for i, a in enumerate(["", "cat", ""])],
    )


def test_vqav2_validation(tmp_path):
    found = [{"question_id": i, "image_id": 42, "question": f"Q{i}?"} for i in range(6)]
    write(tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": found})
    given = [
        ["two"] * 10,
        ["cat"] * 2 + ["the dog"] * 8,
        ["The cat"] * 10,
        ["The\ncat "] * 10,
        ["the beach"] * 5 + ["beach"] * 2 + ["sand"] * 3,
        ["no"] * 10,
    ]
    annotations = [
        {"question_id": i, "answers": [{"answer": a, "answer_id": j} for j, a in enumerate(own)]}
        for i, own in enumerate(given)
    ]
    write(tmp_path / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    benchmark = BENCHMARKS["vqav2_val"](tmp_path)
    assert benchmark.questions()[0].prompt == f"Q0?{BRIEF}"
    assert benchmark.questions()[0].images[0].name == "COCO_val2014_000000000042.jpg"
    score = benchmark.score(answered(benchmark, "2", "a cat", "the cat", "The\tcat", "a beach"))
    # Where annotators agree nothing is normalised: "two" is not "2" then, nor "The cat" "the cat".
    expected = [0, (2 * (1 / 3) + 8 * (2 / 3)) / 10, 0, 1, 1, 0]
    assert list(score.points.values()) == pytest.approx(expected)
    assert score.figures["accuracy"] == pytest.approx(100 * sum(expected) / 6)
    content = benchmark.upload(answered(benchmark, "2"))[1]
    assert content[:2] == [{"question_id": 0, "answer": "2"}, {"question_id": 1, "answer": ""}]
    assert len(content) == 6


def test_textvqa(tmp_path):
    prompts = [
        f"What Is it?\nReference OCR token: A, B{BRIEF}",
        f"Who?{BRIEF}",
        f"Reference OCR token: A, B\nWho?{BRIEF}",
        "OCR tokens: A, B. Question: Who? Short answer:",
    ]
    lines = [{"question_id": "im", "image": "im.jpg", "text": text} for text in prompts]
    write(tmp_path / "llava_textvqa_val_v051_ocr.jsonl", lines)
    data = [
        {"image_id": "im", "question": "what is it?", "answers": ["stop!"] * 3 + ["go"] * 7},
        {"image_id": "im", "question": "who?", "answers": ["joe's"] * 10},
    ]
    write(tmp_path / "TextVQA_0.5.1_val.json", {"data": data})
    textvqa = BENCHMARKS["textvqa"](tmp_path)
    score = textvqa.score(answered(textvqa, "Stop", "joe 's", "joe's", "joe's"))
    expected = [(3 * (2 / 3) + 7) / 10, 1, 1, 1]
    assert list(score.points.values()) == pytest.approx(expected)
    write(tmp_path / "TextVQA_0.5.1_val.json", {"data": data[:1]})
    with pytest.raises(ValueError, match=r"val.json has no question \('im', 'who\?'\)"):
        textvqa.score(answered(textvqa, "Stop", "joe 's"))


def pope(folder, labels):
    lines, at = [], 0
    for category, own in labels.items():
        write(folder / "coco" / f"coco_pope_{category}.json", [{"label": x} for x in own])
        for _ in own:
            lines.append({"question_id": at, "image": "x.jpg", "text": f"Q{at}?"})
            lines[-1]["category"] = category
            at += 1
    write(folder / "llava_pope_test.jsonl", lines)
    return BENCHMARKS["pope"](folder)


def test_pope(tmp_path):
    yes_no = ["yes", "yes", "no", "no"]
    benchmark = pope(tmp_path, {"random": yes_no, "popular": yes_no})
    said = [
        "Yes.",
        "No, there is none.",
        "not here",
        "There is. No doubt.",
        "yes",
        None,
        "no",
        None,
    ]
    score = benchmark.score(answered(benchmark, *said))
    # random: found 1 of 2, 2 said yes. popular: the same, with what was not answered wrong.
    for name in ("", "random ", "popular "):
        for figure in ("F1", "accuracy", "precision", "recall", "yes"):
            assert score.figures[name + figure] == pytest.approx(50)
    assert next(iter(score.figures)) == "F1"
    assert list(score.points.values()) == [1, 0, 1, 0, 1, 0, 1, 0]
    assert [key.id for key in score.unanswered] == ["5", "7"]


def test_pope_without_any_yes(tmp_path):
    benchmark = pope(tmp_path, {"random": ["no"]})
    figures = benchmark.score(answered(benchmark, "No")).figures
    assert (figures["F1"], figures["accuracy"], figures["yes"]) == (0, 100, 0)


def test_pope_labels_must_fit(tmp_path):
    benchmark = pope(tmp_path, {"random": ["yes"]})
    write(tmp_path / "coco" / "coco_pope_random.json", [{"label": "no"}] * 2)
    with pytest.raises(ValueError, match="2 labels for 1 questions"):
        benchmark.score({})


def test_mme(tmp_path):
    lines = []
    for category in ("color", "code_reasoning"):
        for image in ("1", "2"):
            file = tmp_path / "MME_Benchmark_release_version" / category / f"{image}.txt"
            # One of the questions has two spaces before its suffix, as in the published files.
            questions = [f"Is it {x}? Please answer yes or no." for x in "ab"]
            questions[1] = questions[1].replace("? ", "?  ")
            write(file, f"{questions[0]}\tYes\n{questions[1]}\tNo\n")
            for x in "ab":
                name, text = f"{category}/{image}.png", f"Is it {x}?{BRIEF}"
                lines.append({"question_id": name, "image": name, "text": text})
    write(tmp_path / "llava_mme.jsonl", lines)
    mme = BENCHMARKS["mme"](tmp_path)
    said = ["Yes", "No.\n\nNone\tis.", "yes it is", "Oh no", "Maybe", "no", None, "No"]
    answers = answered(mme, *said)
    score = mme.score(answers)
    # color: 3 of 4 questions, 1 of 2 images; code_reasoning: 2 of 4, none.
    assert score.figures["color"] == 75 + 50 and score.figures["code_reasoning"] == 50
    assert (score.figures["perception"], score.figures["cognition"]) == (125, 50)
    assert next(iter(score.figures.items())) == ("total", 175)
    assert len(score.unanswered) == 1
    path = write_upload(tmp_path, *mme.upload(answers))
    rows = (path / "color.txt").read_text().splitlines()
    assert rows[0] == "1.txt\tIs it a? Please answer yes or no.\tYes\tYes"
    # The official judge takes a line apart at its tabs.
    assert rows[1] == "1.txt\tIs it b?  Please answer yes or no.\tNo\tNo. None is."
    assert len(rows) == 4
    rows = (path / "code_reasoning.txt").read_text().splitlines()
    assert len(rows) == 4 and rows[2].endswith("\tYes\t")  # an image's two follow each other


def mmbench(folder, benchmark="mmbench", turned=False):
    image = base64.b64encode(b"an image").decode()
    names = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
    names += ["source", "l2-category", "comment", "split"]
    rows = [
        ["7", "Which?", "nan", "cat", "dog", "", "", "B", "c", image, "s", "l", "", "dev"],
        ["8", "Why?", "Look.", "x", "y", "z", "N/A", "A", "c", image, "s", "l", "", "dev"],
    ]
    if turned:
        rows += [
            ["1000007", "Which?", "nan", "dog", "cat", "", "", "A", *rows[0][8:]],
            ["1000008", "Why?", "Look.", "z", "x", "y", "N/A", "B", *rows[1][8:]],
        ]
    split = "test" if benchmark == "mmbench_test" else "dev"
    table = "".join("\t".join(row) + "\n" for row in [names, *rows])
    write(folder / f"mmbench_{split}_20230712.tsv", table)
    return BENCHMARKS[benchmark](folder)


def test_mmbench(tmp_path):
    benchmark = mmbench(tmp_path)
    first, second = benchmark.questions()
    assert first.stated == "Which?\nA. cat\nB. dog"
    suffix = "\nAnswer with the option's letter from the given choices directly."
    assert first.prompt == first.stated + suffix
    assert second.stated == "Look.\nWhy?\nA. x\nB. y\nC. z"
    assert first.images == (b"an image",)
    line = json.loads(answer_line(second, "A", "m", {}))
    assert (line["round_id"], line["options"], line["option_char"]) == (0, [*"xyz"], [*"ABC"])
    assert benchmark.score(answered(benchmark, "B", "C")).figures == {"accuracy": 50}
    # What a spreadsheet cannot hold is left out.
    path = write_upload(tmp_path, *benchmark.upload(answered(benchmark, "B\x0b")))
    # The official judge compares indices with numbers, and options end at an empty cell.
    assert list(load_workbook(path).active.values) == [
        ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split"),
        (7, "Which?", "cat", "dog", None, None, "B", "B", "dev"),
        (8, "Why?", "x", "y", "z", None, None, "A", "dev"),
    ]


@pytest.mark.parametrize(
    ("said", "read"),
    [
        *((x, "B") for x in ("B", "B.", "(B)", "**B**", "[B]", "Answer: B", "The answer is B.")),
        *((x, "B") for x in ("two dogs", "Two dogs.", "It is two dogs.", "B. two dogs")),
        ("A bird", "A"),  # a letter goes before words
        ("A cat sleeps here now", "A"),  # the first of five words is an article
        ("A dog sleeps here now", None),
        ("B it is, as I have told you", None),
        *((x, None) for x in ("A or B", "b", "B2", "Both", "", "a cat or two dogs")),
        (f"two dogs{'!' * 38}", "B"),  # not longer than twice all options
        (f"two dogs{'!' * 39}", None),
    ],
)
def test_what_mmbench_reads_off_an_answer(tmp_path, said, read):
    """As VLMEvalKit's can_infer does; of "a cat", "two dogs", "a bird", "fish"."""
    benchmark = mmbench(tmp_path)
    path = tmp_path / "mmbench_dev_20230712.tsv"
    for right in "ABCD":
        text = path.read_text().splitlines()
        cells = text[1].split("\t")
        cells[3:8] = ["a cat", "two dogs", "a bird", "fish", right]
        path.write_text("\n".join([text[0], "\t".join(cells)]) + "\n")
        points = benchmark.score(answered(benchmark, said)).points
        assert list(points.values()) == [right == read], right


def test_a_letter_is_no_other_option_s_words_to_mmbench(tmp_path):
    """Its table asks which of the letters in a picture is meant."""
    benchmark = mmbench(tmp_path)
    path = tmp_path / "mmbench_dev_20230712.tsv"
    path.write_text(path.read_text().replace("\tx\ty\tz\tN/A\tA\t", "\tD\tB\tA\tC\tD\t"))
    assert list(benchmark.score(answered(benchmark, "B", "D")).points.values()) == [1, 1]


@pytest.mark.parametrize("none", ["None", "NONE", "Nan", "none"])
def test_mmbench_knows_no_letter_without_its_option(tmp_path, none):
    """As of a table in which a right option reads "None": readers take it for an empty cell."""
    benchmark = mmbench(tmp_path)
    path = tmp_path / "mmbench_dev_20230712.tsv"
    path.write_text(path.read_text().replace("\tN/A\tA\t", f"\t{none}\tD\t"))
    assert benchmark.questions()[1].stated == "Look.\nWhy?\nA. x\nB. y\nC. z"
    assert list(benchmark.score(answered(benchmark, "B", "D")).points.values()) == [1, 0]
    # Pandas, which writes the upload, takes one of them for an empty cell.
    kept = None if none == "None" else none
    assert benchmark.upload({})[1][2][5] == kept


def test_a_table_of_mmbench_that_is_cut_short_is_told(tmp_path):
    path = tmp_path / "mmbench_dev_20230712.tsv"
    benchmark = mmbench(tmp_path)
    text = path.read_text()
    path.write_text(text[: text.rindex("YW4gaW1") + 7])  # in the middle of an image
    with pytest.raises(ValueError, match=r"row 3 has no source, l2-category, comment, split"):
        benchmark.questions()


def test_mmbench_counts_what_is_right_however_it_is_turned(tmp_path):
    """The published table has each question once a turn, a million apart."""
    benchmark = mmbench(tmp_path, turned=True)
    asked = benchmark.questions()
    assert [q.id for q in asked] == [7, 8, 1_000_007, 1_000_008]
    groups = [q.group for q in asked]
    assert groups[:2] == groups[2:]
    answers = answered(benchmark, "B", "A", "A", "A")
    score = benchmark.score(answers)
    assert list(score.points.values()) == [1, 1, 1, 0]
    assert score.figures == {"accuracy": 50}
    predictions = [row[6] for row in benchmark.upload(answers)[1]]
    assert predictions == ["prediction", "B", "A", "A", "A"]


def test_scienceqa(tmp_path):
    asked_of = "Which?\nA. one\nB. two"
    lines = [
        {"id": str(i), "conversations": [{"value": f"{asked_of}\n<image>" if i else asked_of}]}
        for i in range(5)
    ]
    for line in lines[1:]:
        line["image"] = "x.png"
    write(tmp_path / "llava_test_CQM-A.json", lines)
    write(tmp_path / "problems.json", {str(i): {"choices": [1, 2], "answer": 1} for i in range(5)})
    write(tmp_path / "pid_splits.json", {"test": [str(i) for i in range(5)]})
    science = BENCHMARKS["scienceqa"](tmp_path)
    questions = science.questions()
    assert not questions[0].images and "<image>" not in questions[0].stated
    groups = [q.group for q in questions]
    assert len({*groups[1:]}) == 1 and groups[0] not in groups[1:]
    assert questions[1].stated == "<image>\n" + questions[1].prompt
    # The official pattern wants a character behind the letter, and is to be found once.
    twice = "The answer is B. The answer is B."
    said = ("B", "B. two", "The answer is B.", "The answer is B", twice)
    score = science.score(answered(science, *said))
    assert score.figures == {"IMG-accuracy": 50, "accuracy": 60}
    assert list(score.points) == [q.key for q in questions[1:]] and score.is_mean
    assert list(score.points.values()) == [1, 1, 0, 0]


def test_mmmu(tmp_path):
    rows = [
        {
            "id": "val_Art_1",
            "question": "Compare <image 1> and <image 2>.",
            "options": "['same', \"other's\"]",
            "question_type": "multiple-choice",
            "answer": "B",
            "image_1": "1.png",
            "image_2": "2.png",
        },
        {"id": "2", "question": "How many?", "question_type": "open", "answer": "1,200"},
        {"id": "3", "question": "What?", "question_type": "open", "answer": "['24/7', '3.429']"},
    ]
    write(tmp_path / "mmmu_val.jsonl", rows)
    mmmu = BENCHMARKS["mmmu"](tmp_path)
    first, second, _ = mmmu.questions()
    assert first.prompt == (
        "Compare <image> and <image>.\n(A) same\n(B) other's\n\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert [i.name for i in first.images] == ["1.png", "2.png"]
    assert second.prompt == f"How many?{BRIEF}"
    answers = answered(mmmu, "It is (B).", "the answer is 1200", "about 3.43")
    assert mmmu.score(answers).figures == {"accuracy": 100}
    assert mmmu.upload(answers)[0] == "mmmu_val.json"
    content = mmmu.upload(answers)[1]
    assert content == {"val_Art_1": "B", "2": "the answer is 1200", "3": "about 3.43"}
    assert mmmu.upload({})[1] == {"val_Art_1": "", "2": "", "3": ""}
    rows[0]["image_2"] = None
    write(tmp_path / "mmmu_val.jsonl", rows)
    with pytest.raises(ValueError, match="val_Art_1 has no image_2"):
        mmmu.questions()


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(A) or rather (B)", "B"),
        ("A or B", "B"),
        ("I say that it is blue", "B"),  # more than five words: by the option itself
        ("I say it is blue", None),
        ("", None),
    ],
)
def test_mmmu_choices(text, letter):
    assert parse_choice(text, {"A": "red", "B": "blue"}) == letter


@pytest.mark.parametrize(
    ("text", "known", "right"),
    [
        ("x = 3.14159", ["3.14"], True),
        ("The total is 1,234 dollars", ["1234"], True),
        ("thus a or b", ["b"], True),
        ("absent", ["b"], False),  # a single letter counts beside a space alone
        ("so it is a red car.", ["blue", "red car"], True),
        ("first is 5\nfinal is 6", ["5"], True),
        ("x = 5\nit is 6", ["5"], False),  # what "=" gives counts at the end alone
        ("7", ["8"], False),
    ],
)
def test_mmmu_open_answers(text, known, right):
    assert open_right(text, known) is right


def test_judged(tmp_path):
    write(tmp_path / "llava-mm-vet.jsonl", asked("Why?", "How?"))
    write(tmp_path / "questions.jsonl", asked("Why?", category="conv"))
    vet, wild = BENCHMARKS["mmvet"](tmp_path), BENCHMARKS["llava-bench"](tmp_path)
    assert vet.score({}) is None and wild.score({}) is None
    content = {"v1_0": "Because.", "v1_1": ""}
    assert vet.upload(answered(vet, "Because.")) == ("mm-vet.json", content)
    assert wild.upload({}) is None
    assert vet.max_new_tokens == wild.max_new_tokens == 1024


def test_digits():
    benchmark = Digits(samples=4, seed=1, start=3)
    questions = benchmark.questions()
    assert [q.id for q in questions] == [f"test-1-{i}" for i in range(3, 7)]
    again = Digits(samples=8, seed=1).questions()[3:7]
    assert [q.prompt for q in again] == [q.prompt for q in questions]
    assert benchmark.score({}).figures == {"accuracy": 0}


# The answers file.


def questions_of(tmp_path, n=3):
    write(tmp_path / "llava-mm-vet.jsonl", asked(*(f"Q{i}" for i in range(n))))
    return BENCHMARKS["mmvet"](tmp_path).questions()


def test_answers_have_llavas_fields(tmp_path):
    question = questions_of(tmp_path)[0]
    line = json.loads(answer_line(question, "yes", "llava", {"mode": "ttp"}))
    fields = ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert list(line) == fields
    assert (
        line["question_id"] == 0 and line["prompt"] == "Q0" and line["metadata"] == {"mode": "ttp"}
    )
    again = json.loads(answer_line(question, "no", "llava", {}))
    other = json.loads(answer_line(question, "yes", "other", {}))
    assert again["answer_id"] == line["answer_id"] != other["answer_id"]


def test_answers_are_read_and_put_in_order(tmp_path):
    questions = questions_of(tmp_path)
    path = tmp_path / "answers.jsonl"
    lines = {q.key: answer_line(q, f"text {q.id}", "m", {}) for q in reversed(questions)}
    path.write_text("".join(f"{line}\n" for line in lines.values()))
    assert read_answers(path, questions) == lines
    write_answers(path, questions, lines)
    assert [json.loads(x)["question_id"] for x in path.read_text().splitlines()] == [0, 1, 2]
    assert texts(read_answers(path, questions))[questions[1].key] == "text 1"
    # As after a kill: the last line is cut off, whether or not it happens to be JSON.
    for _ in range(20):
        path.write_text(path.read_text()[:-1])
        assert list(read_answers(path, questions)) == [q.key for q in questions[:2]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"answers.jsonl:2: no JSON"),
        ("[]", r"answers.jsonl:2: no question_id, prompt, text"),
        ('{"question_id": 0, "prompt": "Q0"}', r"answers.jsonl:2: no text"),
        ('{"question_id": 9, "prompt": "Q0", "text": ""}', r":2: no question has id '9'"),
        ('{"question_id": 0, "prompt": "Q1", "text": ""}', r":2: no question has id '0' and this"),
        ('{"question_id": 0, "prompt": "Q0", "text": ""}', r":2: a second answer to question '0'"),
    ],
)
def test_bad_answers_are_named(tmp_path, line, message):
    questions = questions_of(tmp_path)
    path = tmp_path / "answers.jsonl"
    path.write_text(f"{answer_line(questions[0], 'x', 'm', {})}\n{line}\n")
    with pytest.raises(ValueError, match=message):
        read_answers(path, questions)


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "digits"])
def test_missing_files_are_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=r"is not there; it should be [A-Z]"):
        BENCHMARKS[name](tmp_path).questions()


def test_bad_question_files_are_named(tmp_path):
    (tmp_path / "questions.jsonl").write_text('{"question_id": 1, "text": "x"}\n\n{"text": "y"}\n')
    with pytest.raises(ValueError, match=r"questions.jsonl:3: no question_id"):
        BENCHMARKS["llava-bench"](tmp_path).questions()
    (tmp_path / "questions.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"questions.jsonl is empty; it should be LLaVA's"):
        BENCHMARKS["llava-bench"](tmp_path).questions()
    (tmp_path / "mmbench_dev_20230712.tsv").write_text("index\tquestion\n")
    with pytest.raises(ValueError, match="has no rows"):
        BENCHMARKS["mmbench"](tmp_path).questions()
    (tmp_path / "mmbench_dev_20230712.tsv").write_text("index\tquestion\n3\twhat\n")
    with pytest.raises(ValueError, match="row 2 has no A, image"):
        BENCHMARKS["mmbench"](tmp_path).questions()
    (tmp_path / "llava_test_CQM-A.json").write_text("{")
    with pytest.raises(ValueError, match=r"CQM-A.json is no JSON"):
        BENCHMARKS["scienceqa"](tmp_path).questions()
