"""Conversations as files have them: what is read, what is refused, and what is built of them."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from twig_jax.data import digits, questions
from twig_jax.data.build import build
from twig_jax.data.images import load_image
from twig_jax.data.sources import (
    BadSample,
    BuiltDataset,
    DigitsSource,
    InstructionFile,
    Sample,
    open_source,
)

ROOT = Path(__file__).resolve().parents[2]


def said(*texts):
    """A row's conversation, the human first."""
    return [
        {"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)
    ]


GOOD = [
    {"id": "lead", "image": "a.png", "conversations": said("<image>\nWhat?", "A cat")},
    {"id": "end", "image": "b/b.jpg", "conversations": said("What?\n<image>", "é", "And?", "漢")},
    {"id": "text", "conversations": said('Say "[{" \\', "]}\n")},
    {"id": 7, "image": ["a.png", "b/b.jpg"], "conversations": said("<image> or <image>?", "No")},
    {"id": "cut", "conversations": [{"from": "gpt", "value": "on"}, *said("And?", "Yes")]},
]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with two images and half of one."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "b").mkdir()
    rng = np.random.default_rng(0)
    for name in ("a.png", "b/b.jpg", "half.jpg"):
        Image.fromarray(rng.integers(0, 256, (30, 20, 3), np.uint8)).save(folder / name)
    whole = (folder / "half.jpg").read_bytes()
    (folder / "half.jpg").write_bytes(whole[: len(whole) // 2])
    return folder


def write(path, rows, **options):
    """Rows as .json or .jsonl."""
    lines = [json.dumps(row, **options) for row in rows]
    if path.suffix == ".json":
        path.write_text("[" + ",\n ".join(lines) + "]\n", encoding="utf-8")
    else:
        path.write_text("\n\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
@pytest.mark.parametrize("ascii", [True, False])
def test_rows_are_read_in_place(tmp_path, images, name, ascii):
    alone = {"id": "alone", "image": "a.png", "conversations": said(" <image>\n", "A cat")}
    source = open_source(write(tmp_path / name, [*GOOD, alone], ensure_ascii=ascii), images)
    assert isinstance(source, InstructionFile)
    a, b = images / "a.png", images / "b/b.jpg"
    assert list(source) == [
        Sample("lead", (("<image>\nWhat?", "A cat"),), (a,)),
        Sample("end", (("<image>\nWhat?", "é"), ("And?", "漢")), (b,)),
        Sample("text", (('Say "[{" \\', "]}\n"),), ()),
        Sample("7", (("<image> or <image>?", "No"),), (a, b)),
        Sample("cut", (("And?", "Yes"),), ()),
        Sample("alone", (("<image>", "A cat"),), (a,)),
    ]


def test_images_lie_beside_the_file_if_no_folder_is_named(tmp_path):
    Image.new("RGB", (3, 3)).save(tmp_path / "a.png")
    (sample,) = open_source(write(tmp_path / "data.json", GOOD[:1]))
    assert sample.images == (tmp_path / "a.png",)


values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.sampled_from('a"\\[{'), values), max_size=6),
    indent=st.sampled_from([None, 0, 2]),
    ascii=st.booleans(),
)
def test_any_rows_are_told_apart(tmp_path_factory, rows, indent, ascii):
    """Whatever else a row holds, the conversation behind it is found."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [{**row, **GOOD[2], "id": f"{n}{row}"} for n, row in enumerate(rows)]
    path = folder / "data.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii), encoding="utf-8")
    assert [sample.id for sample in InstructionFile(path)] == [row["id"] for row in rows]


BAD = {
    "has no turns": {"conversations": []},
    r"has 'Hi' where a speaker and a text are expected": {"conversations": ["Hi"]},
    r"part 2 is by 'human' instead of 'gpt'": {"conversations": said("a", "b")[:1] * 2},
    r"part 1 is by 'system' instead of 'human'": {
        "conversations": [{"from": "system", "value": "a"}, *said("a", "b")]
    },
    "turn 2 has no answer": {"conversations": said("a", "b", "c")},
    "the answer of turn 2 is empty": {"conversations": said("a", "b", "c", " \n")},
    "the answer of turn 1 has an image marker": {"conversations": said("a", "<image>")},
    "has 0 image markers for 1 images": {"image": "a.png", "conversations": said("a", "b")},
    "has 1 image markers for 0 images": {"conversations": said("<image>a", "b")},
    r"image .*none\.png is missing": {
        "image": "none.png",
        "conversations": said("<image>a", "b"),
    },
    rf"image .*{'n' * 300}\.png is missing": {
        "image": "n" * 300 + ".png",
        "conversations": said("<image>a", "b"),
    },
    "the text of part 2 is not Unicode": {"conversations": said("a", "b \ud83d")},
    "image is 3, expected a path": {"image": 3, "conversations": said("<image>a", "b")},
}


def test_bad_rows_are_named_when_they_are_read(tmp_path, images):
    rows = [{"id": f"row{n}", **row} for n, row in enumerate(BAD.values())]
    source = InstructionFile(write(tmp_path / "data.json", [*rows, GOOD[0]]), images)
    for index, cause in enumerate(BAD):
        with pytest.raises(BadSample, match=rf"^sample row{index}: {cause}"):
            source[index]
    assert source[len(BAD)].id == "lead"


def test_lines_that_are_no_rows_are_numbered(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"id": \n[1]\n' + "[" * 200_000 + "\n" + json.dumps(GOOD[2]))
    source = InstructionFile(path)
    for index, cause in enumerate(["is not JSON", "is no JSON object", "is not JSON"]):
        with pytest.raises(BadSample, match=f"in row {index}: {cause}"):
            source[index]
    assert source[3].id == "text"


def test_any_id_can_be_written_down(tmp_path):
    rows = [{**GOOD[2], "id": name} for name in (7, None, "half \ud83d")]
    source = InstructionFile(write(tmp_path / "data.json", rows))
    assert [source[n].id for n in range(3)] == ["7", "in row 1", "half \\ud83d"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("{}", "no JSON list of rows"),
        ('x [{"a": 1}]', "no JSON list of rows"),
        ('[{"a": 1}, {"a"', "cut short after 1 rows"),
        ('[{"a": 1}', "cut short after 1 rows"),
        ('[{"a": 1}] [', "no JSON list"),
        ('[{"a": 1} {"a": 1}]', "something else than a row at byte 9"),
        ('[{"a": 1}, [1]]', "something else than a row"),
        ('["a"]', "something else than a row"),
        ('[{"a": 1}, null, 5]', "something else than a row at byte 9"),
        ("[1, 2]", "something else than a row at byte 1"),
        ('[{"a": 1},]', "something else than a row"),
    ],
)
def test_a_file_that_is_no_list_of_rows_is_refused(tmp_path, text, message):
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"data\.json .*{message}"):
        InstructionFile(path)


def test_paths_that_hold_no_data_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data at nowhere"):
        open_source("nowhere")
    with pytest.raises(FileNotFoundError, match=r"no data at nowhere\.json"):
        open_source("nowhere.json")
    with pytest.raises(FileNotFoundError, match=r"no image folder .*none"):
        open_source(write(tmp_path / "data.json", GOOD), tmp_path / "none")
    (tmp_path / "data.txt").write_text("")
    with pytest.raises(ValueError, match=r"cannot tell what .*data\.txt is"):
        open_source(tmp_path / "data.txt")
    with pytest.raises(FileNotFoundError, match="holds no data set"):
        open_source(tmp_path)


def test_pages_of_digits_are_conversations():
    source = open_source("digits")
    assert isinstance(source, DigitsSource)
    assert len(source) == 10_000
    sample = source[3]
    page = digits.page("train", 0, 3)
    np.testing.assert_array_equal(sample.images[0], page.image)
    expected = questions.questions(page, digits.generator("train", 0, 3, 1), 4)
    first, *later = sample.turns
    assert first == ("<image>\n" + expected[0].text, expected[0].answer)
    assert later == [(question.text, question.answer) for question in expected[1:]]


@pytest.mark.parametrize("index", [-1, 3])
def test_an_index_out_of_range_is_refused(index):
    with pytest.raises(IndexError, match=f"no item {index} among 3"):
        DigitsSource(pages=3)[index]


def test_sources_and_errors_survive_pickling(tmp_path, images):
    source = InstructionFile(write(tmp_path / "data.json", GOOD), images)
    again = pickle.loads(pickle.dumps(source))
    assert list(again) == list(source)
    assert len(pickle.dumps(source)) < 2000  # where rows lie, not what they hold
    error = pickle.loads(pickle.dumps(BadSample("a", "is bad")))
    assert (error.id, error.cause, str(error)) == ("a", "is bad", "sample a: is bad")


def launch(*arguments):
    command = [sys.executable, "-m", "launch.build_dataset", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, images):
    """A file with good rows and two bad ones."""
    half = {"id": "half", "image": "half.jpg", "conversations": said("<image>What?", "A cat")}
    silent = {"id": "silent", "conversations": said("What?")}
    folder = tmp_path_factory.mktemp("mixed")
    return write(folder / "data.json", [GOOD[0], half, *GOOD[1:], silent, GOOD[0]])


def test_a_built_data_set_is_the_file_s(tmp_path, images, mixed):
    result = launch(
        *("--json", mixed, "--images", images, "--out", tmp_path / "a/out"),
        *("--max_bad_fraction", "0.3"),
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "6 samples in" in result.stdout
    assert "2 bad ones left out" in result.stdout
    assert "left out: sample half: cannot read image" in result.stderr
    assert "left out: sample silent: turn 1 has no answer" in result.stderr
    assert "%|" not in result.stderr  # no progress bar, as this is no terminal

    source = open_source(tmp_path / "a/out")
    assert isinstance(source, BuiltDataset)
    file = InstructionFile(mixed, images)
    expected = [file[index] for index in (0, 2, 3, 4, 5, 7)]
    for built in (source, pickle.loads(pickle.dumps(source))):
        assert len(built) == 6
        for sample, original in zip(built, expected, strict=True):
            assert (sample.id, sample.turns) == (original.id, original.turns)
            assert sample.images == tuple(path.read_bytes() for path in original.images)
            for image, path in zip(sample.images, original.images, strict=True):
                np.testing.assert_array_equal(load_image(image), load_image(path))
    assert "tensorflow" not in sys.modules

    with pytest.raises(FileNotFoundError, match="no split 'test', only train"):
        BuiltDataset(tmp_path / "a/out", "test")
    again = launch("--json", mixed, "--images", images, "--out", tmp_path / "a/out")
    assert again.returncode == 1
    assert "is there already" in again.stderr


def test_too_many_bad_rows_leave_nothing_behind(tmp_path, images, mixed):
    result = launch("--json", mixed, "--images", images, "--out", tmp_path / "out")
    assert result.returncode == 1
    assert "build_dataset: 1 of the first 2 samples are bad, more than" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_data_set_is_written_as_it_is_read(tmp_path, images, mixed, monkeypatch):
    """In several files, of any size, by one call at a time."""
    monkeypatch.setattr("twig_jax.data.build._FILE", 40)
    source = InstructionFile(write(tmp_path / "data.jsonl", GOOD * 40), images)
    other = tmp_path / ".out.part/llava_instruct"
    other.mkdir(parents=True)
    with pytest.raises(FileExistsError, match=r"\.out\.part is there: another call is writing"):
        build(source, tmp_path / "out")
    assert other.exists()
    shutil.rmtree(other.parent)
    there = []

    def seen(bad):
        there.append(len(list(tmp_path.glob(".out.part/*/*/*.array_record*"))))

    assert build(source, tmp_path / "out", seen=seen).written == 200
    assert (there[0], there[-1]) == (1, 5)
    assert not (tmp_path / ".out.part").exists()
    found = open_source(tmp_path / "out")
    assert [sample.turns for sample in found] == [sample.turns for sample in source]
    records = tensorflow_datasets.data_source("llava_instruct", data_dir=tmp_path / "out")["train"]
    assert records[199]["id"] == b"cut"

    path = next((tmp_path / "out").rglob("*-00003"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"-00003 is missing or cut short"):
        open_source(tmp_path / "out")
    path.unlink()
    with pytest.raises(ValueError, match=r"-00003 is missing or cut short"):
        open_source(tmp_path / "out")


def test_bad_rows_may_come_first(tmp_path):
    """They are a share of the whole file."""
    silent = {"id": "silent", "conversations": said("What?")}
    rows = [silent, silent, *[GOOD[2]] * 248]
    report = build(InstructionFile(write(tmp_path / "data.jsonl", rows)), tmp_path / "out")
    assert (report.written, len(report.bad)) == (248, 2)
    more = InstructionFile(write(tmp_path / "more.jsonl", [silent, *rows[:-1]]))
    with pytest.raises(ValueError, match=r"3 of the first 3 .* 0\.01 allows of 250"):
        build(more, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "data.json"], "give --json FILE"),
        (["--json", "nowhere.json", "--out", "out"], "nowhere.json"),
    ],
)
def test_mistakes_are_named(arguments, message):
    result = launch(*arguments)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_bucket_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="gs://bucket/out is no folder of this machine"):
        build(DigitsSource(pages=1), "gs://bucket/out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["grain", "tensorflow_datasets"])
def test_missing_packages_are_named(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[data\]'"):
        build(DigitsSource(pages=1), tmp_path)


def test_several_data_sets_in_a_folder_are_listed(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "dataset_info.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds 2 data sets, name one: .*/a, .*/b"):
        open_source(tmp_path)
