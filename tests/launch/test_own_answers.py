"""The launcher that lets a base answer its training questions, as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

from twig_jax.data.images import load_image
from twig_jax.data.sources import DigitsSource, open_source

ROOT = Path(__file__).resolve().parents[2]


def own_answers(*arguments):
    command = [sys.executable, "-m", "launch.own_answers", "--max_new_tokens", "8", "--batch", "2"]
    return subprocess.run(
        [*command, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=500
    )


def test_the_base_s_own_words_in_every_turn(tmp_path):
    """A run that was killed while it wrote goes on; drafting changes no answer."""
    fast, out = tmp_path / "fast.jsonl", tmp_path / "plain" / "own.jsonl"
    done = own_answers("--out", fast, "--limit", 2)
    assert done.returncode == 0, done.stderr
    assert "2 conversations answered, 0 bad ones left out" in done.stdout
    out.parent.mkdir()
    out.write_bytes(fast.read_bytes()[:-20])
    base = ("--checkpoint", "twig_jax/assets/digits/base")  # without a twig
    done = own_answers(*base, "--out", out, "--limit", 3)
    assert done.returncode == 0 and "2 conversations answered" in done.stdout, done.stderr
    said = [
        [json.loads(line)["conversations"] for line in path.read_text().splitlines()]
        for path in (fast, out)
    ]
    assert said[0] == said[1][:2]

    source, asked = open_source(out), DigitsSource()
    assert len(source) == 3
    first = []
    for index in range(3):
        mine, theirs = source[index], asked[index]
        assert mine.id == theirs.id
        assert [q for q, _ in mine.turns] == [q for q, _ in theirs.turns[: len(mine.turns)]]
        assert all(answer and len(answer.split()) <= 8 for _, answer in mine.turns)
        assert (load_image(mine.images[0]).tobytes()) == load_image(theirs.images[0]).tobytes()
        first.append(mine.turns[0][1] == " ".join(theirs.turns[0][1].split()[:8]))
    assert any(first)  # the base is right 96 times of 100

    done = own_answers("--out", out, "--limit", 3)
    assert done.returncode == 0 and "has all 3 conversations" in done.stdout


def test_bad_input(tmp_path):
    done = own_answers("--out", tmp_path / "own.jsonl", "--data", "nowhere.json")
    assert done.returncode == 1 and "own_answers: no data at nowhere.json" in done.stderr
    assert own_answers("--out", tmp_path / "own.json").returncode == 1
