"""Answering a benchmark in shares and in several goes gives one and the same file."""

import dataclasses
import json
import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import twig_jax
from twig_jax.decoding.buckets import state_bytes
from twig_jax.decoding.generate import Generator
from twig_jax.decoding.settings import Settings
from twig_jax.evaluation.answers import answer_share, digest, failure
from twig_jax.evaluation.benchmarks.files import Question, Score, answer_line
from twig_jax.evaluation.benchmarks.pages import Digits
from twig_jax.evaluation.judge import Judge, Way
from twig_jax.models.cpu import arrange
from twig_jax.programs import device_bytes

QUESTIONS = [Question(i, f"Q{i}", stated=f"Q{i}") for i in range(23)]


def spell_out(tokens):
    return "".join(f"{t} " for t in tokens)


class Model:
    """Answers `text i` to question i, longest first; stops after `most` answers."""

    def __init__(self, most=None, bad=()):
        self.asked, self.most, self.bad = [], most, bad

    def ask(self, question):
        if question.id in self.bad:
            error = MemoryError if question.id == 3 else ValueError
            raise error(f"no image of {question.id}")
        return SimpleNamespace(id=question.id, is_visual=np.array([0, 0, 0, 1, 1]))

    def decode(self, requests, told):
        for at in reversed(range(len(requests))):
            if len(self.asked) == self.most:
                raise KeyboardInterrupt
            self.asked.append(requests[at].id)
            result = SimpleNamespace(
                text=f"text {requests[at].id}",
                tokens=np.arange(3),
                stopped_by="eos",
                drafts=[np.arange(2)],
                levels=[2],
                matched=np.asarray([1]),
                accepted=np.asarray([True, False, False]),
                kept=np.asarray([4]),
            )
            told(at, result)

    def run(self, folder, share=(0, 1), told=lambda _: None, spell=spell_out, **settings):
        return answer_share(
            folder,
            QUESTIONS,
            share,
            self.ask,
            self.decode,
            batch=1,
            model_id="m",
            settings={"mode": "plain", **settings},
            detokenize=spell,
            told=told,
        )


@pytest.fixture
def whole(tmp_path):
    Model().run(tmp_path / "whole")
    return (tmp_path / "whole" / "answers.jsonl").read_bytes()


def test_all_answers_are_in_the_questions_order(whole):
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [line["question_id"] for line in lines] == list(range(23))
    assert lines[7]["text"] == "text 7"
    found = lines[7]["metadata"]
    assert found["matched"] == [1] and found["mode"] == "plain"
    assert (found["retained"], found["kept"]) == (1, [1])
    assert found["pieces"] == ["0 ", "1 ", "2 "]


def test_a_character_of_several_tokens_is_the_last_one_s(tmp_path):
    """As byte tokens decode: a mark stands for every byte of what is not complete."""
    texts = ["", "\ufffd", "\ufffd\ufffd", "好"]
    lines = Model().run(tmp_path, spell=lambda tokens: texts[len(tokens)])
    assert json.loads(next(iter(lines.values())))["metadata"]["pieces"] == ["", "", "好"]
    lines = Model().run(tmp_path / "cut", spell=lambda tokens: "\ufffd" * len(tokens))
    assert json.loads(next(iter(lines.values())))["metadata"]["pieces"] == ["", "", ""]


@pytest.mark.parametrize("after", [0, 1, 5, 16, 22])
@pytest.mark.parametrize("cut", [0, 1, 30])
def test_a_run_that_was_stopped_goes_on(tmp_path, whole, after, cut):
    """Wherever it was stopped, in the middle of a line too; what is there is not asked again."""
    folder = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        Model(most=after).run(folder)
    assert not (folder / "answers.jsonl").exists()
    own = folder / "answers.0-of-1.jsonl"
    if cut and after:
        own.write_bytes(own.read_bytes()[:-cut])
    rest, done = Model(), []
    rest.run(folder, told=done.append)
    assert (folder / "answers.jsonl").read_bytes() == whole
    assert len(rest.asked) == 23 - after + bool(cut and after)
    assert sum(done) == 23
    again = Model()
    again.run(folder)
    assert not again.asked and (folder / "answers.jsonl").read_bytes() == whole


@pytest.mark.parametrize("n", [2, 3])
def test_shares_make_up_the_whole(tmp_path, whole, n):
    folder = tmp_path / "shares"
    asked, done = [], []
    for i in reversed(range(n)):
        assert not (folder / "answers.jsonl").exists()
        model = Model()
        lines = model.run(folder, (i, n), done.append)
        asked += model.asked
    assert len(lines) == 23 and sorted(asked) == list(range(23))
    assert sum(done) == 23
    assert (folder / "answers.jsonl").read_bytes() == whole


def test_another_number_of_processes_goes_on(tmp_path, whole):
    folder = tmp_path / "changed"
    Model().run(folder, (1, 3))
    rest = Model()
    rest.run(folder)
    assert len(rest.asked) == 23 - 8
    assert (folder / "answers.jsonl").read_bytes() == whole


def test_what_cannot_be_asked_is_told_and_tried_again(tmp_path, whole):
    folder = tmp_path / "bad"
    lines = Model(bad=(3, 22)).run(folder)
    found = [json.loads(line) for line in lines.values() if failure(line)]
    assert [(x["question_id"], x["text"]) for x in found] == [(3, ""), (22, "")]
    errors = [x["metadata"]["error"] for x in found]
    assert errors == ["no image of 3", "no image of 22"]
    # The file is whole: what is missing in it would not be counted.
    assert len((folder / "answers.jsonl").read_text().splitlines()) == 23
    better = Model()
    better.run(folder)
    assert sorted(better.asked) == [3, 22]
    assert (folder / "answers.jsonl").read_bytes() == whole
    # An answer of another share stands, too.
    Model(bad=(22,)).run(tmp_path / "shares")
    lines = Model().run(tmp_path / "shares", (1, 3))
    assert not any(map(failure, lines.values()))


def test_a_question_that_is_there_twice_is_told_before_any_is_asked(tmp_path):
    with pytest.raises(ValueError, match="several questions have id '3' and the same prompt"):
        answer_share(
            tmp_path, [*QUESTIONS, QUESTIONS[3]], (0, 1), None, None,
            batch=1, model_id="m", settings={},
        )  # fmt: skip


def test_answers_to_other_questions_are_not_mixed(tmp_path):
    Model().run(tmp_path)
    with pytest.raises(ValueError, match=r"no question has id '15' .* choose another folder or"):
        answer_share(
            tmp_path, QUESTIONS[:11], (0, 1), None, None,
            batch=1, model_id="m", settings={"mode": "plain"},
        )  # fmt: skip


def test_a_question_that_cannot_be_asked_is_not_timed(tmp_path):
    benchmark, model = Digits(samples=3, seed=0), twig_jax.load("digits")
    good = benchmark.questions()
    long = dataclasses.replace(good[0], prompt="What? " * 600)
    judge = Judge(
        model, "digits", benchmark, [long, *good], tmp_path,
        Settings(max_new_tokens=4), batch=1, model_id="m", notes={},
    )  # fmt: skip
    speed = judge.speeds([Way("plain")], 2, 1)[Way("plain")]
    assert speed["timed_samples"] == len(speed["timings"]) == 2
    # The twig has no part in it, nor in its memory.
    request, plain = model.request(good[0].prompt, good[0].images), Settings("plain")
    program = model.generator.batches.prepare([request], replace(plain, max_new_tokens=4)).program
    base = device_bytes(model.generator.weights.base)
    assert speed["memory_bytes"] == base + round(state_bytes(program, 1, 4))
    few = dataclasses.replace(judge, questions=[long, good[0]])
    assert few.speeds([Way("plain")], 2, 1)[Way("plain")]["timed_samples"] == 1
    judge = dataclasses.replace(judge, questions=[long])
    with pytest.raises(ValueError, match=r"none of the questions can be asked, as .* tokens"):
        judge.row(Way("plain"), judge.answers(Way("plain")), None)


def test_what_answers_tell_is_counted_one_by_one(tmp_path):
    """All of a large benchmark's, each with the visual tokens it kept, would not fit in memory."""
    questions = [Question(i // 2, "Q", stated=f"Q{i}") for i in range(400)]
    told = {"drafted": [2, 0], "matched": [1, 0], "retained": 576, "kept": list(range(1000, 1576))}
    lines = {q.key: answer_line(q, "", "m", told) for q in questions}
    for q in questions[:2]:
        lines[q.key] = answer_line(q, "", "m", {"error": "no image"})
    lines[questions[-1].key] = answer_line(questions[-1], "", "m", told | {"retained": 5})
    model = SimpleNamespace(config=SimpleNamespace(vision=SimpleNamespace(num_tokens=576)))
    benchmark = SimpleNamespace(score=lambda answers: None)
    judge = Judge(
        model, "t", benchmark, questions, tmp_path, Settings(), batch=1, model_id="m", notes={}
    )
    tracemalloc.start()
    row, _ = judge.row(Way("ttp", "twig", 64.0), lines, None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (row["retained"], row["unanswered"]) == (576, ["0", "0"])  # an id may have two questions
    assert (row["tokar"], row["mean_drafted"], row["pruned"]) == (0.5, 1, 8 / 9)
    assert peak < sum(map(len, lines.values())) / 4


def test_intervals_are_over_images(tmp_path):
    """Of two pictures, one read right by plain decoding alone."""
    questions = [Question(i, "x", (f"{i % 2}.png",), f"x {i}") for i in range(8)]
    told = {"drafted": [0], "matched": [0], "retained": 0}
    lines = {q.key: answer_line(q, "", "m", told) for q in questions}
    right = {q.key: float(q.id % 2) for q in questions}
    (tmp_path / "ttp").mkdir()
    model = SimpleNamespace(config=SimpleNamespace(vision=SimpleNamespace(num_tokens=576)))
    own = SimpleNamespace(score=Score({"accuracy": 50.0}, right, []))
    benchmark = SimpleNamespace(score=lambda answers: own.score)
    judge = Judge(
        model, "t", benchmark, questions, tmp_path, Settings(), batch=1, model_id="m", notes={}
    )
    base = Score({"accuracy": 100.0}, dict.fromkeys(right, 1.0), [])
    row, _ = judge.row(Way("ttp"), lines, base)
    assert (row["relacc"], row["relacc_low"], row["relacc_high"]) == (0.5, 0, 1)
    points = json.loads((tmp_path / "ttp" / "points.json").read_text())
    assert points == [[right[q.key], q.group] for q in questions]
    # A figure that is not the mean over questions has none, nor has one beside it.
    for ours, plain in ((60.0, 100.0), (50.0, 90.0)):
        own.score = Score({"accuracy": ours}, right, [])
        row, _ = judge.row(Way("ttp"), lines, replace(base, figures={"accuracy": plain}))
        assert (row["relacc"], row["relacc_low"]) == (ours / plain, None)
    # Of some of the questions, their accuracy is what can be told.
    own.score = Score({"total": 900.0}, right, [])
    row, _ = replace(judge, limited=True).row(Way("ttp"), lines, None)
    assert row["figures"] == {"accuracy": 50.0}
    own.score = Score({"accuracy": 50.0}, right, [])
    # Of questions that do not count there is nothing.
    del right[questions[0].key]
    judge.row(Way("ttp"), lines, base)
    few = replace(judge, limited=True)
    own.score = Score({"IMG-accuracy": 400 / 7, "accuracy": 60.0}, right, [])
    assert few.row(Way("ttp"), lines, None)[0]["figures"] == {"IMG-accuracy": 100 * 4 / 7}
    none, score = replace(few, questions=questions[:1]).row(Way("plain"), lines, None)
    assert score is None and "figures" not in none
    points = json.loads((tmp_path / "ttp" / "points.json").read_text())
    assert [value for value, _ in points] == [None, *map(float, (q.id % 2 for q in questions[1:]))]


def test_weights_are_told_apart():
    """By what they are, however they lie."""
    rng = np.random.default_rng(0)
    weights = {"a": {"kernel": rng.normal(size=(3, 130))}, "embed_tokens": {"embedding": np.eye(4)}}
    weights = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), weights)
    other = {**weights, "a": {"kernel": weights["a"]["kernel"].at[0, 3].add(1)}}
    assert digest(arrange(weights)) == digest(weights) != digest(other)
    assert digest({"b": weights["a"]}) != digest({"a": weights["a"]})


def test_answers_by_other_weights_are_not_mixed(tmp_path):
    """Of the same names, as of a twig that was trained again."""
    digits = twig_jax.load("digits")
    asked = Digits(2)
    judge = Judge(
        digits, "digits", asked, asked.questions(), tmp_path, Settings(), 2, model_id="m", notes={}
    )
    judge.answers(Way("plain"))
    base = digits.generator.weights.base
    head = {"kernel": 2 * base["text"]["lm_head"]["kernel"]}
    base = {**base, "text": {**base["text"], "lm_head": head}}
    generator = Generator(digits.config, base)
    other = replace(judge, model=replace(digits, generator=generator))
    with pytest.raises(ValueError, match=r"plain was made with weights '.*', not '.*'; remove it"):
        other.answers(Way("plain"))


def test_answers_by_other_settings_are_not_mixed(tmp_path):
    Model(most=23).run(tmp_path / "run")
    message = "run was made with mode 'plain', not 'ttp', theta None, not 0.5; remove it"
    with pytest.raises(ValueError, match=message):
        Model().run(tmp_path / "run", mode="ttp", theta=0.5)
