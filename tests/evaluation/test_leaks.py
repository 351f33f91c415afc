"""What was trained on is not judged by."""

import json

import numpy as np
import pytest
from PIL import Image

from twig_jax.data.sources import DigitsSource, InstructionFile
from twig_jax.evaluation.benchmarks.files import Question
from twig_jax.evaluation.benchmarks.leaks import leaks
from twig_jax.evaluation.benchmarks.pages import Digits


def trained_on(folder, *rows):
    """Rows of (id, image, question)."""
    content = []
    for name, image, text in rows:
        said = [{"from": "human", "value": text}, {"from": "gpt", "value": "x"}]
        content.append({"id": name, "conversations": said})
        if image is not None:
            (folder / image).parent.mkdir(exist_ok=True)
            Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(folder / image)
            content[-1]["image"] = image
            said[0]["value"] = f"<image>\n{text}"
    (folder / "data.json").write_text(json.dumps(content))
    return InstructionFile(folder / "data.json")


BRIEF = "\nAnswer the question using a single word or phrase."
ASKED = [
    Question(7, f"Is there a cat?{BRIEF}", ("eval/COCO_val2014_000000000042.jpg",)),
    Question(8, f"Is there a dog?{BRIEF}", ("eval/COCO_val2014_000000000042.jpg",)),
]


@pytest.mark.parametrize(
    ("row", "found"),
    [
        (("a", "000000000042.jpg", "Is there a cat?"), [7]),  # the same, with COCO's other name
        (("a", "000000000042.jpg", f"is there a dog?{BRIEF}"), [8]),
        (("8", "000000000042.jpg", "What is it?"), [8]),  # the same id about the same image
        (("a", "000000000042.jpg", "What is it?"), []),  # the image alone
        (("7", "000000000043.jpg", "Is there a cat?"), []),
    ],
)
def test_the_same_question_about_the_same_image(tmp_path, row, found):
    pairs = leaks(ASKED, trained_on(tmp_path, row))
    assert [question.id for question, _ in pairs] == found
    assert all(name == row[0] for _, name in pairs)


BY_LETTER = "\nAnswer with the option's letter from the given choices directly."


@pytest.mark.parametrize(
    ("row", "found"),
    [
        (("a", "7/image.png", "Which?\nA. x\nB. y"), [7]),
        (("a", "9/image.png", "Which?\nA. x\nB. y"), []),  # another image of the same name
        (("a", None, "Why?\nOf p.\nA. x\nB. y"), [5]),
        (("a", None, "Why?\nOf q.\nA. x\nB. y"), []),  # the same first line about another text
        (("5", None, "What?"), [5]),
    ],
)
def test_images_by_folder_and_questions_without_one(tmp_path, row, found):
    """As ScienceQA has them: an image.png in a folder each, and few first lines for many texts."""
    asked = [
        Question(i, f"Which?\nA. x\nB. y{BY_LETTER}", (f"test/{i}/image.png",)) for i in (7, 8)
    ]
    asked.append(Question(5, f"Why?\nOf p.\nA. x\nB. y{BY_LETTER}"))
    assert [q.id for q, _ in leaks(asked, trained_on(tmp_path, row))] == found


def test_a_number_of_coco_s_is_one_image_in_every_folder(tmp_path):
    """MME asks about some in two categories."""
    files = ("count/000000427034.jpg", "color/000000427034.jpg")
    asked = [Question(i, "What?", (file,)) for i, file in enumerate(files)]
    row = ("a", "train2017/000000427034.jpg", "What?")
    assert {name for _, name in leaks(asked, trained_on(tmp_path, row))} == {"a"}


def test_digits_are_held_out():
    """Test pages are known by their content; the training set has none of them."""
    questions = Digits(samples=60).questions()
    assert not leaks(questions, DigitsSource("train", pages=200))
    found = leaks(questions, DigitsSource("test", pages=60, turns=8))
    assert found and all(q.id == name for q, name in found)


def test_what_cannot_be_read_is_not_vouched_for(tmp_path):
    source = trained_on(tmp_path, ("a", "1.jpg", "Why?"))
    (tmp_path / "1.jpg").unlink()
    with pytest.raises(ValueError, match="1 of the first 1 samples are bad"):
        leaks(ASKED, source)
