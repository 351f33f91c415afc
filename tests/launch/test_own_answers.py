"""The launcher that lets a base answer its training questions, as a user runs it."""

import json

import pytest

from tests.launch.process import launch
from twig_jax.data.images import load_image
from twig_jax.data.sources import DigitsSource, open_source


def own_answers(*arguments):
    return launch("own_answers", "--max_new_tokens", 8, "--batch", 4, *arguments)


@pytest.fixture
def asked(tmp_path):
    """A file of three conversations of two turns each."""
    samples, entries = DigitsSource(), []
    for index in range(3):
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


def test_the_base_s_own_words_in_every_turn(asked, tmp_path):
    """A run that was killed while it wrote goes on; drafting changes no answer."""
    fast, out = tmp_path / "fast.jsonl", tmp_path / "plain" / "own.jsonl"
    data = ("--data", asked, "--images", tmp_path)
    done = own_answers(*data, "--out", fast, "--limit", 2)
    assert done.returncode == 0, done.stderr
    assert "2 conversations answered, 0 bad ones left out" in done.stdout
    out.parent.mkdir()
    out.write_bytes(fast.read_bytes()[:-20])
    base = ("--checkpoint", "twig_jax/assets/digits/base")  # without a twig
    done = own_answers(*data, *base, "--out", out, "--limit", 3)
    assert done.returncode == 0 and "2 conversations answered" in done.stdout, done.stderr
    said = [
        [json.loads(line)["conversations"] for line in path.read_text().splitlines()]
        for path in (fast, out)
    ]
    assert said[0] == said[1][:2]

    source, theirs = open_source(out), open_source(asked)
    assert len(source) == 3
    first = []
    for index in range(3):
        mine, given = source[index], theirs[index]
        assert mine.id == given.id
        assert [q for q, _ in mine.turns] == [q for q, _ in given.turns[: len(mine.turns)]]
        assert all(answer and len(answer.split()) <= 8 for _, answer in mine.turns)
        assert load_image(mine.images[0]).tobytes() == load_image(given.images[0]).tobytes()
        first.append(mine.turns[0][1] == " ".join(given.turns[0][1].split()[:8]))
    assert any(first)  # the base is right 96 times of 100

    # Of the pages the file was made of, too.
    done = own_answers("--out", out, "--limit", 3)
    assert done.returncode == 0 and "has all 3 conversations" in done.stdout


def test_what_cannot_be_read_is_left_out(asked, tmp_path):
    """A truncated image, which ends neither this run nor the next."""
    image, out = tmp_path / "1.png", tmp_path / "own.jsonl"
    image.write_bytes(image.read_bytes()[:-200])
    done = own_answers("--data", asked, "--images", tmp_path, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "2 conversations answered, 1 bad ones left out" in done.stdout
    assert "left out: " in done.stderr and "1.png" in done.stderr
    assert [json.loads(line)["index"] for line in out.read_text().splitlines()] == [0, 2]


def test_bad_input(tmp_path):
    done = own_answers("--out", tmp_path / "own.jsonl", "--data", "nowhere.json")
    assert done.returncode == 1 and "own_answers: no data at nowhere.json" in done.stderr
    assert own_answers("--out", tmp_path / "own.json").returncode == 1
