"""The launcher that lets a base answer its training questions, as a user runs it."""

import json

import pytest

from tests.launch.process import launch
from twig_jax.data.images import load_image
from twig_jax.data.sources import DigitsSource, open_source


def own_answers(*arguments):
    return launch("own_answers", "--max_new_tokens", 64, "--batch", 4, *arguments)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def asked(tmp_path):
    """A file of four conversations of two turns each: the base says much in all but the first."""
    samples, entries = DigitsSource(), []
    for index in (0, 1, 2, 5):
        sample, image = samples[index], tmp_path / f"{index}.png"
        load_image(sample.images[0]).save(image)
        turns = [text for turn in sample.turns[:2] for text in turn]
        said = [
            {"from": who, "value": x} for who, x in zip(["human", "gpt"] * 2, turns, strict=True)
        ]
        entries.append({"id": sample.id, "image": image.name, "conversations": said})
    path = tmp_path / "asked.json"
    path.write_text(json.dumps(entries))
    return path


def test_the_base_s_own_words_in_every_turn(asked, shallow, tmp_path):
    """A run that was killed while it wrote goes on; drafting changes no answer."""
    fast, out = tmp_path / "fast.jsonl", tmp_path / "plain" / "own.jsonl"
    data = ("--data", asked, "--images", tmp_path)
    done = own_answers(*data, *shallow, "--out", fast, "--limit", 2)
    assert done.returncode == 0, done.stderr
    assert "2 conversations answered, 0 bad ones left out" in done.stdout
    out.parent.mkdir()
    out.write_bytes(fast.read_bytes()[:-20])
    base = shallow[:2]  # without the twig
    done = own_answers(*data, *base, "--out", out, "--limit", 3)
    assert done.returncode == 0 and "2 conversations answered" in done.stdout, done.stderr
    said = [[row["conversations"] for row in rows(path)] for path in (fast, out)]
    assert said[0] == said[1][:2]

    source, theirs = open_source(out), open_source(asked)
    assert len(source) == 3
    first = []
    for index in range(3):
        mine, given = source[index], theirs[index]
        assert mine.id == given.id
        assert [q for q, _ in mine.turns] == [q for q, _ in given.turns]
        assert load_image(mine.images[0]).tobytes() == load_image(given.images[0]).tobytes()
        first.append(mine.turns[0][1] == given.turns[0][1])
    assert any(first)  # the base is right nine times of ten

    # Of the pages the file was made of, too.
    done = own_answers("--out", out, "--limit", 3)
    assert done.returncode == 0 and "has all 3 conversations" in done.stdout

    # Not of others: its last conversation is another there, or there is none.
    kept, entries = out.read_bytes(), json.loads(asked.read_text())
    for other in (entries[:2], entries[1:]):
        asked.write_text(json.dumps(other))
        done = own_answers(*data, "--out", out)
        assert done.returncode == 1 and "has the answers to other data" in done.stderr
    assert out.read_bytes() == kept


def test_what_cannot_be_read_is_left_out(asked, shallow, tmp_path):
    """A truncated image, which ends neither this run nor the next, and what is no answer."""
    image, out = tmp_path / "1.png", tmp_path / "own.jsonl"
    image.write_bytes(image.read_bytes()[:-200])
    done = own_answers(*shallow, "--data", asked, "--images", tmp_path, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "3 conversations answered, 1 bad ones left out" in done.stdout
    assert "left out: " in done.stderr and "1.png" in done.stderr
    assert [row["index"] for row in rows(out)] == [0, 2, 3]


def test_an_answer_that_is_cut_off_ends_its_conversation(asked, shallow, tmp_path):
    """Before the first answer there is nothing to keep, nor to be asked for at each start."""
    out, rest = tmp_path / "own.jsonl", tmp_path / "own.unanswered.jsonl"
    few = (*shallow, "--data", asked, "--images", tmp_path, "--out", out, "--max_new_tokens", 8)
    done = own_answers(*few)
    assert done.returncode == 0, done.stderr
    assert "2 conversations answered, 0 bad ones left out" in done.stdout
    assert "3 end before an answer of more than 8 tokens" in done.stdout
    assert f"2 without an answer, listed in {rest}" in done.stdout
    assert [(row["index"], len(row["conversations"])) for row in rows(out)] == [(0, 4), (3, 2)]
    assert [row["index"] for row in rows(rest)] == [1, 2]
    done = own_answers(*few)
    assert f"{out} has all 4 conversations but 2 without an answer" in done.stdout
    assert len(open_source(out)) == 2
    rest.unlink()
    done = own_answers(*few[:-1], 9)
    assert done.returncode == 1 and "was made with max_new_tokens 8, not 9" in done.stderr
    out.unlink()
    assert own_answers(*few[:-1], 9).returncode == 0


def test_a_conversation_ends_before_what_cannot_be_asked(asked, shallow, tmp_path):
    entries, out = json.loads(asked.read_text()), tmp_path / "own.jsonl"
    entries[0]["conversations"][2]["value"] = "What? " * 400
    asked.write_text(json.dumps(entries))
    few = ("--data", asked, "--images", tmp_path, "--out", out, "--limit", 1)
    done = own_answers(*shallow, *few)
    assert done.returncode == 0 and "1 conversations answered, 0 bad ones" in done.stdout
    (row,) = rows(out)
    assert len(row["conversations"]) == 2


def test_bad_input(tmp_path):
    done = own_answers("--out", tmp_path / "own.jsonl", "--data", "nowhere.json")
    assert done.returncode == 1 and "own_answers: no data at nowhere.json" in done.stderr
    assert own_answers("--out", tmp_path / "own.json").returncode == 1
    others = tmp_path / "others.jsonl"  # whose last line does not end
    others.write_text('{"id": "1", "conversations": []}')
    done = own_answers("--out", others)
    assert done.returncode == 1 and "has not been written by this program" in done.stderr
    assert "Traceback" not in done.stderr
    assert others.read_text() == '{"id": "1", "conversations": []}'
    (tmp_path / "folder.jsonl").mkdir()
    for out in (tmp_path / "folder.jsonl", others / "own.jsonl"):
        done = own_answers("--out", out, "--checkpoint", "nowhere")  # which is looked for later
        assert done.returncode == 1 and str(tmp_path) in done.stderr
        assert "Traceback" not in done.stderr
