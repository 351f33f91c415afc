"""Random weights whose drafts are accepted as often as asked, of the smallest preset."""

import dataclasses

import jax
import numpy as np
import pytest

from twig_jax.decoding.settings import Request, Settings
from twig_jax.evaluation import calibration
from twig_jax.evaluation.scoring import acceptance
from twig_jax.presets import preset

CONFIG, TWIG = preset("toy")
CALL = Settings(mode="ssd", avg_retained=4, max_new_tokens=64, min_new_tokens=64)
ASKED = calibration.target("0.8")


def requests(seed, rows=8):
    rng, M, size = np.random.default_rng(seed), CONFIG.vision.num_tokens, CONFIG.vision.image_size
    made = []
    for _ in range(rows):
        ids = rng.integers(4, CONFIG.text.vocab_size, 6 + M).astype(np.int32)
        is_visual = np.repeat([False, True, False], [2, M, 4])
        pixels = rng.normal(size=(1, size, size, 3)).astype(np.float32)
        made.append(Request(ids, is_visual, pixels=pixels))
    return made


@pytest.fixture(scope="module", autouse=True)
def precise():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def base():
    return calibration.draw_base(CONFIG, "float32")


@pytest.fixture(scope="module")
def calibrated(base):
    return calibration.calibrate(CONFIG, base, TWIG, requests(0), CALL, ASKED)


@pytest.fixture(scope="module")
def drafted(calibrated):
    """Answers to the calibrating prompts and to others."""
    return [calibrated[0].generate(requests(seed), CALL) for seed in (0, 1)]


def test_drafts_are_accepted_as_often_as_asked(calibrated, drafted):
    told = calibrated[1]
    again, others = (acceptance(results) for results in drafted)
    assert (again.tokar, again.drafted) == (told.tokar, told.mean_drafted)
    assert abs(again.tokar - 0.8) <= 0.01 and abs(again.drafted - 2.5) <= 0.05
    # Five hundred tokens tell a share to within two percent.
    assert others.tokar == pytest.approx(0.8, abs=0.06)
    assert others.drafted == pytest.approx(2.5, abs=0.25)


def test_answers_are_the_bases_own(calibrated, drafted):
    """And run on and on: circles would tell the acceptance of a few tokens."""
    plain = calibrated[0].generate(requests(0), dataclasses.replace(CALL, mode="plain"))
    assert [r.tokens.tolist() for r in drafted[0]] == [r.tokens.tolist() for r in plain]
    assert min(len(set(r.tokens.tolist())) for r in plain) > 60


def test_what_was_found_can_be_had_again(calibrated, drafted):
    found = calibrated[1]
    weights = f"mistaken:{found.error}:{found.logit}"
    model, none = calibration.draw(CONFIG, TWIG, weights, "float32", requests(0), CALL)
    again = model.generate(requests(0), CALL)
    assert none is None
    assert [r.tokens.tolist() for r in again] == [r.tokens.tolist() for r in drafted[0]]
    assert acceptance(again).tokar == found.tokar


def test_what_cannot_be_reached_is_said(base, monkeypatch):
    monkeypatch.setattr(calibration, "_MOST", 1)
    said = (
        r"no twig with TokAR 0\.1 and 4\.9 drafts .* at γ = 5 and θ = 0\.6: the last of 1 had 0\."
    )
    with pytest.raises(ValueError, match=said):
        calibration.calibrate(CONFIG, base, TWIG, requests(0), CALL, (0.1, 4.9))
    with pytest.raises(ValueError, match="draft a chain"):
        plain = dataclasses.replace(CALL, mode="plain")
        calibration.calibrate(CONFIG, base, TWIG, requests(0), plain, ASKED)


@pytest.mark.parametrize("text", ["", "often", "0.7", "0.7:many", "1:2", "0.5:1"])
def test_targets(text):
    assert calibration.target("0.7:2.25") == (0.7, 2.25)
    with pytest.raises(ValueError, match=r"TOKAR:DRAFTS|between 0 and 1"):
        calibration.target(text)


@pytest.mark.parametrize("weights", ["trained", "random:0.5", "", "mistaken:0.1", "mistaken:a:1"])
def test_unknown_weights(weights):
    with pytest.raises(ValueError, match="weights are random, calibrated:"):
        calibration.draw(CONFIG, TWIG, weights, "float32", requests(0), CALL)


def test_the_full_size_is_drawn_within_little_more_than_its_own_memory():
    """Every tensor is a program of its own; the largest take a few of themselves in float32."""
    config, _ = preset("llava-1.5-7b")
    shape = (config.text.vocab_size, config.text.hidden_size)
    drawn = calibration._normal.lower(jax.random.key(0), 1.0, shape, "bfloat16").compile()
    assert drawn.memory_analysis().temp_size_in_bytes < 4e9
