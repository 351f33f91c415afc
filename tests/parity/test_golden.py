"""Every recorded case of the published implementation, in all modes it was recorded in.

Exact: ids, kept and positional indices, drafts and matches. Floats within the recordings' own
tolerances: 1e-3 on logits and states (reference against float64 differs by 1e-5), 1e-5 on scores.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity.golden import MODES, Case, load
from tests.pruned_pass import Prompt, forward
from twig_jax.config import TwigConfig
from twig_jax.decoding import draft as draft_module
from twig_jax.decoding import loop, network, prefill

CASES = Path(__file__).parent.parent / "golden"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "folder" in metafunc.fixturenames:
        root = Path(metafunc.config.getoption("golden_dir") or CASES)
        folders = sorted(p.parent for p in root.glob("*/case.json"))
        assert folders, f"no golden cases in {root}"
        metafunc.parametrize("folder", folders, ids=[f.name for f in folders])


def differences(case: Case, mode: str, **changed: object) -> list[str]:
    """What differs from the recording when the engine runs a case in one mode."""
    settings = dataclasses.replace(case.settings(mode), **changed)
    engine = case.generator()
    result = engine.generate([case.request], settings)[0]
    _, signals = engine.prefill(engine.batches.prepare([case.request], settings), [case.request])
    o, key = case.outputs, MODES[mode]
    wrong = []

    def exact(name: str, ours: np.ndarray, theirs: np.ndarray) -> None:
        if not np.array_equal(ours, theirs):
            wrong.append(name)

    def close(name: str, ours: np.ndarray, theirs: np.ndarray, atol: float) -> None:
        if np.shape(ours) != np.shape(theirs) or np.abs(ours - theirs).max(initial=0) > atol:
            wrong.append(name)

    exact("ids", result.tokens, o[f"{key}_ids"])
    close("prefill_logits", np.asarray(signals.logits[0]), o[f"{key}_prefill_logits"], 1e-3)
    if settings.draft:
        exact("n_draft", [len(d) for d in result.drafts], o[f"{key}_n_draft"])
        exact("n_match", result.matched, o[f"{key}_n_match"])
        gamma = case.facts["gamma"]
        for name, ours, atol in (("tokens", result.drafts, 0), ("probs", result.probs, 1e-4)):
            padded = [np.pad(x, (0, gamma - len(x)), constant_values=-1) for x in ours]
            close(f"draft_{name}", np.array(padded), o[f"{key}_draft_{name}"], atol)
    if settings.prune and case.facts["M"]:
        exact("keep_positions", result.kept, o["keep_positions"])
        close("importance_row", result.scores, o["importance_row"], 1e-5)
    return wrong


def test_recorded_runs(folder: Path) -> None:
    case = load(folder)
    for mode, key in MODES.items():
        if key in case.facts["modes"]:
            assert differences(case, mode) == [], mode


def test_recorded_states(folder: Path) -> None:
    """The teacher-forced pruned pass: states, positions and the logits of every step.

    A text-only case has nothing to prune; the same pass then is the plain one.
    """
    case = load(folder)
    o, r = case.outputs, case.request
    P, M, R = len(r.ids), case.facts["M"], case.facts["R"] or 0
    key = "ar_ttp" if M else "ar"
    visual = np.zeros((0, case.config.text.hidden_size), np.float32)
    forced = forward(
        case.config,
        case.twig_config,
        case.base,
        case.twig,
        Prompt(
            jnp.asarray(r.ids)[None],
            jnp.asarray(r.is_visual)[None],
            jnp.asarray([P], jnp.int32),
            jnp.asarray(visual if r.visual is None else r.visual)[None],
        ),
        jnp.asarray(o[f"{key}_ids"], jnp.int32)[None],
        jnp.asarray([R], jnp.int32),
        P - M,
        R,
    )
    np.testing.assert_allclose(forced.states_K[0], o["hidden_after_K"], atol=1e-3)
    steps = o[f"{key}_step_logits"]
    np.testing.assert_allclose(forced.logits[0, : len(steps)], steps, atol=1e-3)
    if M:
        kept = np.asarray(forced.kept[0])
        np.testing.assert_array_equal(kept, o["pos_mid"])
        np.testing.assert_array_equal(kept[~r.is_visual[kept]], o["pos_final"])
        np.testing.assert_array_equal(kept[r.is_visual[kept]], o["keep_positions"])
        np.testing.assert_allclose(forced.states_K_f[0], o["hidden_into_Kf"], atol=1e-3)
        np.testing.assert_allclose(forced.scores[0], o["importance_row"], atol=1e-5)


def average_for(case: Case, R: int, K_f: int) -> float:
    """The budget that keeps exactly R tokens with another K_f (Eq. 6)."""
    K, M, L = case.facts["K"], case.facts["M"], case.config.text.num_layers
    return (K * M + R * (K_f - K)) / L


@pytest.fixture
def case() -> Case:
    jax.clear_caches()  # mutated functions must be traced anew
    yield load(CASES / "p1_k2t2_m36")
    jax.clear_caches()


@pytest.mark.parametrize("off", [-1, 1])
def test_fails_when_the_budget_is_one_off(case: Case, off: int) -> None:
    average = average_for(case, case.facts["R"] + off, case.facts["K_f"])
    assert "keep_positions" in differences(case, "ttp_ssd", avg_retained=average)


@pytest.mark.parametrize("off", [-1, 1])
def test_fails_when_final_wipe_is_one_layer_off(case: Case, off: int) -> None:
    twig = TwigConfig(case.facts["K"], case.facts["T"], case.facts["K_f"] + off)
    average = average_for(case, case.facts["R"], twig.K_f)
    moved = dataclasses.replace(case, twig_config=twig)
    assert "prefill_logits" in differences(moved, "ttp_ssd", avg_retained=average)


def test_fails_with_the_base_head_in_the_twig(case: Case) -> None:
    wrong = dataclasses.replace(case, twig={**case.twig, "lm_head": case.base["text"]["lm_head"]})
    assert "draft_probs" in differences(wrong, "ttp_ssd")


def test_fails_with_compacted_positions(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = network.Program.layers

    def compacted(self, weights, first, last, x, positions, *args, **kwargs):
        if first >= self.K and kwargs.get("cached") is None:
            positions = jnp.broadcast_to(jnp.arange(x.shape[1]), positions.shape)
        return layers(self, weights, first, last, x, positions, *args, **kwargs)

    monkeypatch.setattr(network.Program, "layers", compacted)
    assert "prefill_logits" in differences(case, "ttp_ssd")


def test_fails_when_a_low_confidence_draft_is_dropped(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dropping(*args):
        d, controls = draft_module.draft(*args), args[-2]
        final = jnp.maximum(d.drafted - 1, 0)[:, None]
        low = jnp.take_along_axis(d.probs, final, axis=1)[:, 0] < controls.theta
        return d._replace(drafted=d.drafted - (low & (d.drafted > 0)).astype(jnp.int32))

    monkeypatch.setattr(loop, "draft", dropping)
    monkeypatch.setattr(prefill, "draft", dropping)
    assert {"n_draft", "n_match"} <= set(differences(case, "ttp_ssd"))
