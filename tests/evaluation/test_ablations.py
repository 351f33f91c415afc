"""What an ablation is made of, and its figures over seeds."""

import pytest

from twig_jax.config import TwigConfig
from twig_jax.evaluation.ablations import ablations, over_seeds, spread
from twig_jax.evaluation.plots import plot_ablations

KNOWN = ablations(TwigConfig(K=2, T=3, K_f=24), 32)


def test_every_variant_differs_in_one_thing():
    """The paper's tables, at its sizes."""
    names = {kind: [v.name for v in variants] for kind, variants in KNOWN.items()}
    assert names["T"] == ["T = 1", "T = 2", "T = 3", "T = 4"]
    assert names["K"] == ["K = 0", "K = 1", "K = 2", "K = 3"]
    assert [v.K_f for v in KNOWN["K_f"]] == [20, 24, 28, 32]
    assert [v.selector for v in KNOWN["attention"]] == ["base_K", "base_K+T", "twig"]
    for variants in KNOWN.values():
        assert all(len(v.trained) <= 1 for v in variants)


def test_a_twig_is_trained_once():
    """The twig as it is configured is the same in every ablation."""
    twigs = {v.twig for variants in KNOWN.values() for v in variants}
    assert twigs == {
        "configured", "twig_init=last", "twig_init=random",
        "T=1", "T=2", "T=4", "K=0", "K=1", "K=3",
    }  # fmt: skip


def test_another_start_is_the_configured_one():
    variants = ablations(TwigConfig(K=2, T=3, K_f=24), 32, "last")["initialisation"]
    assert [(v.name, v.twig) for v in variants] == [
        ("layers K .. K+T-1", "twig_init=next"),
        ("the last T layers", "configured"),
        ("random", "twig_init=random"),
    ]


def test_the_stages_of_a_p_head():
    """The paper's Table 5; both signals of a twig are read off the same one."""
    assert "stages" not in KNOWN
    taught = ablations(TwigConfig(K=2, T=3, K_f=24), 32, p_head=True)["stages"]
    stages = ablations(TwigConfig(K=2, T=3, K_f=24), 32, "next", True, (64.0, 128.0))["stages"]
    assert stages[: len(taught)] == taught
    assert [v.twig for v in stages] == [
        "p_head=False,distill.prediction=0.0,distill.attention=0.0",
        "distill.prediction=0.0",
        "configured",
        "configured",
        "configured+reinforced+reinforce.budgets=(64.0,)",
        "configured+reinforced",
    ]
    assert {v.grown for v in stages[2:]} == {"configured"}


def test_over_seeds(tmp_path):
    variant = KNOWN["T"][0]
    rows = [
        {"avg_retained": 64, "retained": 41, "relacc": x, "tokar": 0.5} for x in (0.9, 0.94, 0.98)
    ]
    line = over_seeds(variant, rows)
    assert (line["ablation"], line["variant"], line["seeds"]) == ("T", "T = 1", 3)
    assert line["relacc"] == pytest.approx(0.94) and spread(line, "relacc") == pytest.approx(0.04)
    assert line["relspd"] is None and spread(line, "relspd") is None
    one = over_seeds(variant, rows[:1])
    assert one["relacc"] == 0.9 and spread(one, "relacc") is None
    plot_ablations(tmp_path / "plot.png", [line, one])
    assert (tmp_path / "plot.png").stat().st_size > 5000
