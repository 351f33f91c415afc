"""The evaluation launcher, as a user runs it."""

import json
from functools import partial

import pytest
from PIL import Image

from tests.launch.process import launch, slurm_step

evaluate = partial(launch, "evaluate")


def test_shares_give_what_one_process_gives(shallow, tmp_path):
    common = (*shallow, "--task", "digits", "--limit", "6", "--batch", "4")
    common += ("--modes", "plain,ttp_ssd", "--avg_retained", "32")
    timed = ("--timed_samples", "2", "--repeats", "1")
    done = evaluate(*common, *timed, "--out", str(tmp_path / "one"), "--json", "-")
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert content["settings"]["dtype"] == "float32"  # which a GPU's default is not
    plain, fast = content["results"]
    assert (plain["mode"], plain["relacc"], plain["samples"]) == ("plain", 1, 6)
    assert (fast["selector"], fast["retained"], fast["unanswered"]) == ("twig", 16, [])
    assert fast["tokar"] > 0.5 and "accuracy" in fast["figures"]
    assert fast["relspd"] > 0 and len(fast["timings"]) == fast["timed_samples"] == 2
    assert fast["memory_bytes"] > 4 * 10**6
    assert "RelAcc %" in done.stderr
    for share in ("1/2", "0/2"):
        rest = ("--timed_samples", "0", "--share", share)
        done = evaluate(*common, "--out", str(tmp_path / "two"), *rest)
        assert done.returncode == 0, done.stderr
        assert ("the rest by other processes" in done.stdout) == (share == "1/2")
    for run in ("plain", "ttp_ssd-twig-32"):
        one, two = (tmp_path / x / "digits" / run / "answers.jsonl" for x in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
    # What was judged here before stays, with its speeds, and is what new figures are relative to.
    another = ("--modes", "ttp", "--selector", "random", "--timed_samples", "0")
    done = evaluate(*common, *another, "--out", str(tmp_path / "one"), "--json", "-")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["results"]
    assert [(r["mode"], r["selector"]) for r in rows] == [
        ("plain", None),
        ("ttp", "random"),
        ("ttp_ssd", "twig"),
    ]
    assert rows[0] == plain and rows[2] == fast
    assert rows[1]["relacc"] == rows[1]["exact"] / plain["exact"] and "relspd" not in rows[1]
    # Figures are of all ways: nothing is written while one waits for others.
    results = tmp_path / "two" / "digits" / "results.json"
    before = results.read_bytes()
    assert len(json.loads(before)["results"]) == 2
    more = ("--timed_samples", "0", "--share", "0/2", "--modes", "plain,ttp")
    done = evaluate(*common, *more, "--out", str(tmp_path / "two"))
    assert done.returncode == 0 and "ttp-twig-32: 3 of 6 answered" in done.stdout
    assert results.read_bytes() == before


def test_a_process_of_a_cluster_that_ends_ends_no_other(shallow, tmp_path):
    """One fails while the other still reads an orbax tree and answers its share."""
    base, out = tmp_path / "base", ("--out", tmp_path)
    source = ("--source", shallow[1])
    assert launch("convert", *source, "--to", "orbax", "--out", base).returncode == 0
    few = ("--task", "digits", "--limit", 4, "--batch", 4, "--modes", "plain")
    shares = [(*few, "--checkpoint", base, *out), ("--task", "gqa", "--data", "nowhere", *out)]
    with slurm_step("evaluate", shares) as (answers, fails):
        _, said = fails.communicate(timeout=600)
        assert fails.returncode == 1 and "evaluate: nowhere" in said
        own = tmp_path / "digits" / "plain" / "answers.0-of-2.jsonl"
        assert not own.exists() or not own.read_text()  # nobody waited for the answers
        found, said = answers.communicate(timeout=600)
    assert answers.returncode == 0, said
    assert "plain: 2 of 4 answered" in found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "cats"), "no --task cats; there are: gqa, vqav2"),
        (("--task", "gqa", "--selector", "best"), "no --selector best; there are: twig, random"),
        (("--task", "digits", "--modes", "fast"), "no --modes fast; there are: plain, ttp"),
        (("--task", "digits", "--share", "2/2"), "--share is i/n with i from 0 to n-1, not 2/2"),
        (
            ("--task", "digits", "--modes", "ttp_ssd", "--selector", "twig,fastv"),
            "fastv prunes at other layers than the twig; use mode ttp",
        ),
        (
            ("--task", "digits", "--selector", "dart", "--avg_retained", "48,8"),
            "no number of kept tokens gives 8 visual tokens a layer",
        ),
        (("--task", "pope", "--data", "nowhere"), "nowhere/llava_pope_test.jsonl is not there"),
        (("--task", "pope"), "--task pope needs --data, the folder that its questions lie in"),
        (
            ("--task", "digits", "--checkpoint", "twig_jax/assets/digits/base", "--modes", "ssd"),
            "mode ssd needs a twig",
        ),
    ],
)
def test_bad_input(arguments, message):
    done = evaluate(*arguments)
    assert done.returncode == 1 and f"evaluate: {message}" in done.stderr


def test_answers_have_room_for_a_token():
    done = evaluate("--task", "digits", "--max_new_tokens", "0")
    assert done.returncode == 1 and "--max_new_tokens=0" in done.stderr


def test_files_of_the_score_are_looked_for_first(tmp_path):
    line = {"question_id": 0, "image": "0.jpg", "text": "Is it?"}
    (tmp_path / "llava_gqa_testdev_balanced.jsonl").write_text(json.dumps(line) + "\n")
    done = evaluate("--task", "gqa", "--data", str(tmp_path), "--checkpoint", "nowhere")
    assert done.returncode == 1 and "testdev_balanced_questions.json is not there" in done.stderr
    # Of another split, too.
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "testdev_balanced_questions.json").write_text("{}")
    done = evaluate("--task", "gqa", "--data", str(tmp_path), "--checkpoint", "nowhere")
    assert done.returncode == 1 and "has no question" in done.stderr


def test_standard_output_is_json_alone(shallow, tmp_path):
    """Also where there is a file for an official judge."""
    lines = [{"question_id": i, "image": f"{i}.png", "text": "Is it?"} for i in range(2)]
    questions = "\n".join(map(json.dumps, lines))
    (tmp_path / "llava_gqa_testdev_balanced.jsonl").write_text(questions)
    (tmp_path / "data" / "images").mkdir(parents=True)
    Image.new("RGB", (96, 96)).save(tmp_path / "data" / "images" / "0.png")
    known = tmp_path / "data" / "testdev_balanced_questions.json"
    known.write_text(json.dumps({str(i): {"answer": "yes"} for i in range(2)}))
    task = ("--task", "gqa", "--data", tmp_path, "--modes", "plain", "--batch", "4")
    few = ("--timed_samples", "0", "--out", tmp_path / "out", "--json", "-")
    done = evaluate(*shallow, *task, *few)
    assert done.returncode == 0, done.stderr
    (plain,) = json.loads(done.stdout)["results"]
    assert (plain["samples"], plain["unanswered"]) == (2, ["1"])
    assert "question 1 cannot be asked: " in done.stderr and "1.png" in done.stderr
    assert "for the official judge: " in done.stderr
    assert " - " not in done.stderr  # there is no RelAcc of a base without a right answer
