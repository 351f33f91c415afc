"""launch.generate: one question, a file of questions, and what goes wrong."""

import contextlib
import io
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from absl.flags import FLAGS
from PIL import Image

import twig_jax
from launch.generate import (
    _DECODING,
    answer_all,
    check_used,
    lines_to,
    questions,
    with_fitted_tree,
)
from tests.launch.process import ROOT, launch, python
from twig_jax.data import digits
from twig_jax.decoding import batch, buckets, shape
from twig_jax.programs import device_bytes

PAGE = ROOT / "docs" / "page.png"
ASK = "What digit is in row B, column 3?"


launcher = partial(launch, "generate")


@pytest.fixture(scope="module")
def model(shallow):
    _, base, _, twig = shallow
    return twig_jax.load(base, twig)


def test_text_comes_in_pieces(model):
    pieces = []
    ask = f"Describe the digit {ASK[14:-1]}, and use four."
    told = model.generate(ask, [PAGE], told=pieces.append)
    assert "".join(pieces) == told.text and sum(map(bool, pieces)) > 2
    silent = model.generate(ask, [PAGE])
    np.testing.assert_array_equal(told.tokens, silent.tokens)
    assert silent.text == told.text


def test_the_documented_page_has_what_is_asked():
    model = twig_jax.load("digits")
    np.testing.assert_array_equal(Image.open(PAGE), digits.page("test", 0, 28).image)
    table = (ROOT / "docs" / "digits.md").read_text().split("| example | answer |\n")[1]
    rows = [line.split(" | ")[3:] for line in table.split("\n\n")[0].splitlines()[1:]]
    asked = [model.request(question, [PAGE]) for question, _ in rows]
    for (question, answer), result in zip(
        rows, model.generator.generate(asked, model.settings), strict=True
    ):
        assert result.text.startswith(answer.removesuffix(" |").removesuffix("...")), question
    assert ASK in [question for question, _ in rows] and len(rows) == 6


def test_raw_prompts_have_no_template(model):
    plain = model.generate(ASK, [PAGE], mode="plain")
    raw = model.generate(f"USER: <image>\n{ASK} ASSISTANT:", [PAGE], raw=True, mode="plain")
    np.testing.assert_array_equal(raw.tokens, plain.tokens)
    other = model.request(ASK, raw=True)
    assert not other.is_visual.any() and other.pixels is None


def test_images_of_any_kind(model):
    image = Image.open(PAGE)
    results = [
        model.generate(ASK, [source], mode="plain", max_new_tokens=4).tokens
        for source in (PAGE, str(PAGE), PAGE.read_bytes(), image, np.asarray(image))
    ]
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_one_question():
    done = launcher("--image", PAGE, "--prompt", ASK, "--int8", "twig")
    assert done.returncode == 0, done.stderr
    text = done.stdout.strip()
    done = launcher("--image", PAGE, "--prompt", ASK, "--mode", "ttp", "--json", "-")
    line = json.loads(done.stdout)
    assert line["text"] == text and line["drafted"] == 0 and line["retained"]


def test_the_readme_s_python():
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    # What takes seconds to import, and nothing here needs, stays out.
    done = python("-c", code + "import sys; assert not {'torch', 'grain'} & sys.modules.keys()")
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_the_tree_that_fits_here(model, monkeypatch, tmp_path, capsys):
    """Timings are made up: four tokens a level, and no more than seven to verify, cost nothing."""
    made_up = ({1: 1.0, 4: 1.0, 10: 9.0}, {2: 5.0, 8: 5.0, 60: 99.0})
    monkeypatch.setattr(shape, "_timed", lambda *_: made_up)
    FLAGS(["generate", "--prompt", ASK])
    settings = replace(model.settings, max_new_tokens=16)
    asked = [{"text": ASK, "images": [PAGE]}]
    found = with_fitted_tree(model, settings, asked, tmp_path)
    assert found.gamma > 1 and found.nodes <= 8
    assert f"tree: --gamma {found.gamma} --children {found.children}" in capsys.readouterr().err
    assert (tmp_path / "costs.json").is_file()
    np.testing.assert_array_equal(
        model.generate(ASK, [PAGE], found).tokens, model.generate(ASK, [PAGE]).tokens
    )


def test_no_tree_is_fitted_to_what_cannot_be_asked(model, tmp_path, capsys):
    FLAGS(["generate", "--prompt", ASK])
    asked = [{"text": ASK, "images": [tmp_path / f"{i}.png"]} for i in range(2)]
    assert with_fitted_tree(model, model.settings, asked, tmp_path) == model.settings
    assert "tree: not fitted" in capsys.readouterr().err


def test_a_question_too_large_for_the_memory_is_reported(model, monkeypatch):
    FLAGS(["generate", "--prompt", ASK])
    asked = [{"question_id": len(x), "text": ASK, "images": x} for x in ([], [PAGE])]
    settings = replace(model.settings, mode="plain", max_new_tokens=4)
    small = model.generator.batches.prepare([model.request(ASK)], settings).program
    most = device_bytes(model.generator.weights) + buckets.state_bytes(small, 1, 4)
    monkeypatch.setattr(batch, "device_memory", lambda _: most)
    out = io.StringIO()
    assert answer_all(model, settings, asked, out) == 1
    answer, error = map(json.loads, out.getvalue().splitlines())
    assert answer["ids"] and "not even one row fits" in error["error"]


def test_a_file_of_questions(shallow, tmp_path):
    (tmp_path / "page.png").write_bytes(PAGE.read_bytes())
    (tmp_path / "broken.png").write_bytes(PAGE.read_bytes()[:300])
    rows = [
        {"question_id": "a", "image": "page.png", "text": ASK},
        {"question_id": "b", "image": "broken.png", "text": ASK},
        {"question_id": "c", "text": "Who are\u2028you?"},  # that ends no line of JSON
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    lines.append(json.dumps({"question_id": "d", "text": "half a character \ud83d"}))
    (tmp_path / "ask.jsonl").write_text("\n".join(lines), "utf-8-sig")
    files = ("--batch_file", tmp_path / "ask.jsonl", "--json", tmp_path / "out.jsonl")
    done = launcher(*shallow, *files)
    # A question that cannot be answered is reported, never dropped.
    assert done.returncode == 1 and "2 of 4 questions could not be answered" in done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["question_id"] for line in lines] == ["a", "b", "c", "d"]
    assert "broken.png" in lines[1]["error"] and lines[2]["retained"] == []
    assert "not Unicode" in lines[3]["error"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ("--mode", "ttp", "--gamma", "3", "--theta", "0.1"),
            "drafts nothing: leave --gamma, --th",
        ),
        (("--top_p", "0.5"), "nothing is drawn at temperature 0: leave --top_p out"),
        (("--temperature", "1", "--top_p", "0.5", "--gamma", "0", "--theta", "0.1"), None),
    ],
)
def test_flags_that_say_nothing_are_refused(model, flags, said):
    FLAGS.unparse_flags()
    FLAGS(["generate", "--prompt", ASK, *flags])
    given = {name: flag.value for name, flag in _DECODING.items() if flag.value is not None}
    try:
        with pytest.raises(ValueError, match=said) if said else contextlib.nullcontext():
            check_used(replace(model.settings, **given))
    finally:
        for name in given:
            FLAGS[name].unparse()


def test_an_interrupted_run_leaves_the_answers_that_were_there(tmp_path):
    file = tmp_path / "new" / "answers.jsonl"
    with lines_to(str(file), many=True) as out:
        print("first", file=out)
    with pytest.raises(KeyboardInterrupt), lines_to(str(file), many=True) as out:
        print("second", file=out)
        raise KeyboardInterrupt
    assert file.read_text() == "first\n"
    assert (tmp_path / "new" / "answers.jsonl.part").read_text() == "second\n"


def test_a_line_is_written_as_soon_as_those_before_it_are(model, monkeypatch):
    FLAGS(["generate", "--prompt", ASK])
    asked = [{"question_id": i, "text": ASK, "images": x} for i, x in enumerate(([], [PAGE]))]
    results = model.generator.generate_many(
        [model.request(ASK), model.request(ASK, [PAGE])], replace(model.settings, max_new_tokens=2)
    )
    out, there = io.StringIO(), []

    def answers(requests, settings, batch, told):
        for i in (1, 0):  # as the longest come first
            told(i, results[i])
            there.append(len(out.getvalue().splitlines()))

    monkeypatch.setattr(model.generator, "generate_many", answers)
    assert answer_all(model, model.settings, asked, out) == 0
    assert there == [0, 2]
    assert [json.loads(x)["question_id"] for x in out.getvalue().splitlines()] == [0, 1]


@pytest.mark.parametrize(
    "row",
    [{"text": "a", "image": [None]}, {"image": "a"}, {"text": None}, {"text": ["a"]}, ["text"]],
)
def test_a_bad_line_is_named_before_anything_is_asked(tmp_path, row):
    (tmp_path / "ask.jsonl").write_text(f'{{"text": "Who?"}}\n{json.dumps(row)}\n')
    FLAGS(["generate", "--batch_file", str(tmp_path / "ask.jsonl")])
    with pytest.raises(ValueError, match="line 2: needs a JSON object with text"):
        questions()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", ASK, "--raw_prompt", ASK), "give one of --prompt"),
        (("--prompt", ASK, "--checkpoint", "nowhere"), "no checkpoint folder nowhere"),
        (("--prompt", "<image> <image>", "--image", str(PAGE)), "2 <image> markers but 1 images"),
        (("--prompt", ASK, "--template", "vicuna"), "vicuna_v1"),
        (("--batch_file", "pyproject.toml"), "pyproject.toml, line 1"),
        (("--batch_file", "ask.jsonl", "--image", str(PAGE)), "leave --image out"),
        (("--batch_file", "README.md", "--json", "./README.md"), "over the questions"),
        (("--prompt", ASK, "--json", "docs"), "--json docs is a folder"),
        (
            ("--prompt", ASK, "--mode", "ssd", "--avg_retained", "16"),
            "--mode ssd prunes nothing: leave --avg_retained out",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    done = launcher(*arguments)
    assert done.returncode == 1 and message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_a_chat_has_the_tokens_of_the_whole_conversation(model):
    """The second answer is that to the ids of everything said so far."""
    chat, pieces = model.chat(max_new_tokens=24), []
    first = chat.ask(ASK, [PAGE])
    asked_before = chat.session.ids.tolist()
    second = chat.ask("What digit is right of the digit in row B, column 2?", told=pieces.append)
    assert first.text and "".join(pieces) == second.text
    ids, is_visual = chat.session.ids, chat.session.is_visual
    assert ids[: len(asked_before)].tolist() == asked_before
    answered = len(second.tokens) + (second.stopped_by == "eos")
    text = f"USER: <image>\n{ASK} ASSISTANT: {first.text}</s>"
    text += "USER: What digit is right of the digit in row B, column 2? ASSISTANT:"
    assert ids[:-answered].tolist() == model.request(text, [PAGE], raw=True).ids.tolist()
    request = model.request(ASK, [PAGE])
    whole = replace(request, ids=ids[:-answered], is_visual=is_visual[:-answered])
    settings = replace(model.settings, max_new_tokens=24)
    (again,) = model.generator.generate([whole], settings)
    assert again.tokens.tolist() == second.tokens.tolist()


def test_an_end_in_a_question_is_not_that_of_the_answer_before(model):
    """Where the template puts none there."""
    chat = replace(model, conventions=replace(model.conventions, template="plain")).chat()
    assert chat.ask(ASK, [PAGE]).stopped_by == "eos"
    before = len(chat.session.ids)
    chat.ask("Is </s> in it?")
    said = model.tokenizer.decode(chat.session.ids[before:])
    assert said.startswith("\nIs </s> in it?\n")
