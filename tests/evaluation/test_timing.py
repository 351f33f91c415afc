"""Timings of answers side by side, by made-up clocks and by a real one."""

import dataclasses
from types import SimpleNamespace

import pytest

from tests.decoding.models import CALL, generator, request
from tests.evaluation.test_scoring import RESULT
from twig_jax.config import TwigConfig
from twig_jax.decoding.cost import Machine
from twig_jax.evaluation import speed
from twig_jax.evaluation.compare import Run, speed_rows
from twig_jax.evaluation.timing import beside, timed


def test_all_figures_are_of_the_median_call() -> None:
    """Of calls of which the first that is measured is interrupted by something else."""

    def call(*seconds: float):
        clock = iter(seconds)
        return lambda _: dataclasses.replace(RESULT, decode_s=next(clock), prefill_s=0)

    run = Run("ssd")
    timings = timed(call(9, 80, 4, 4), {run: call(9, 80, 2, 2)}, samples=1, repeats=3)
    question = SimpleNamespace(task="long", answer="five", content=(True,))
    words = SimpleNamespace(encode=lambda *_, **__: [5], decode=lambda *_, **__: "five")
    config = SimpleNamespace(text=SimpleNamespace(num_layers=8))
    base = SimpleNamespace(twig_config=TwigConfig(1, 2, 6), config=config)
    model = SimpleNamespace(generator=base, tokenizer=words)
    for row in speed_rows(model, [SimpleNamespace(question=question)], timings):
        assert row.tokens_per_s_total == row.tokens_per_s == (2 if row.mode == "plain" else 4)


def test_what_timings_amount_to() -> None:
    """Of eight tokens each: two samples, whose calls before the measured ones take longest."""

    def call(prefill: float, *seconds: float):
        clock = iter((90, 90, *seconds))
        return lambda _: dataclasses.replace(
            RESULT, decode_s=next(clock) - prefill, prefill_s=prefill
        )

    told = []
    calls = {"a": call(0.5, 1, 4), "b": call(1, 8, 8)}
    found = timed(call(1, 4, 8, 8, 8), calls, 2, 1, told=lambda: told.append(1))
    assert found["a"].figures() == {
        "tokens_per_s": 5,
        "tokens_per_s_total": pytest.approx(16 / 5),
        "relspd": pytest.approx(5 / 1.5),
        "first_token_s": 0.5,
        "first_token_speedup": 2,
        "tokar": 5 / 6,
        "mean_accepted": 2.5,
        "timings": [[8, 8, 8, 2], [8, 2, 8, 1]],
    }
    plain = beside(list(found.values()))
    assert plain.speeds.tolist() == plain.plain_speeds.tolist() == [1.5, 1]
    assert plain.first.tolist() == [1, 1] and len(told) == 2


def test_a_step_is_measured_where_a_row_ends_with_its_prompt() -> None:
    """The loop lasts until the last row is through, whichever that is."""
    model = generator(eos_token_id=-1)
    rows = [request(i, 1, 4, 4) for i in (22, 20)]
    fast = dataclasses.replace(CALL, mode="ssd", max_new_tokens=5, gamma=4, theta=0.0)
    answers = model.generate(rows, fast)
    assert [len(r.matched) for r in answers] == [1, 2]
    later = 4 - answers[1].matched[0]  # tokens, after those of the first step
    (found,) = speed.measure(model, rows, {"ssd": fast}, 3, Machine(1e9, 1e9))
    whole = found.token_ms * later
    assert found.step_ms > whole / 20
