"""The paper's ablations (its section 4.3): what a twig is grown, prunes and drafts with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from twig_jax.config import TwigConfig


@dataclass(frozen=True)
class Variant:
    """One line of an ablation.

    trained: overrides of the training configuration, none for the twig as it is configured.
    reinforced: those of the configuration that its P-Head is trained by after that, None where it
    is not. K_f, gamma, theta: other than the twig's and the call's. once: whether it is the
    same for every seed that a twig is trained with. answered: whether its accuracy has to be
    measured; drafting changes none.
    """

    ablation: str
    name: str
    trained: tuple[str, ...] = ()
    reinforced: tuple[str, ...] | None = None
    mode: str = "ttp_ssd"
    selector: str = "twig"
    K_f: int | None = None
    gamma: int | None = None
    theta: float | None = None
    once: bool = False
    answered: bool = True

    @property
    def grown(self) -> str:
        """What the folder of its twig is called, before any reinforcement."""
        return ",".join(self.trained) or "configured"

    @property
    def twig(self) -> str:
        """What the folder of its twig is called."""
        if self.reinforced is None:
            return self.grown
        return "+".join([self.grown, "reinforced", *self.reinforced])


def ablations(
    twig: TwigConfig,
    num_layers: int,
    twig_init: str = "next",
    p_head: bool = False,
    budgets: Sequence[float] = (),
) -> dict[str, list[Variant]]:
    """Every ablation, for a base of L layers and the twig as it is configured.

    twig_init: what it starts from. p_head: whether it has one; then there are the stages of
    TwigVLM++ (the paper's Table 5). budgets: those the P-Head is reinforced for; none leaves
    reinforcement out. The layers of FinalWipe are those of the paper's 32, in proportion.
    """

    def other(**trained: Any) -> tuple[str, ...]:
        """Without what is configured anyway, so that its twig is trained once."""
        own = {"twig_init": twig_init, "T": twig.T, "K": twig.K}
        return tuple(f"{k}={v}" for k, v in trained.items() if v != own[k])

    starts = {"next": "layers K .. K+T-1", "last": "the last T layers", "random": "random"}
    wipes = dict.fromkeys(round(num_layers * n / 32) for n in (20, 24, 28, 32))
    untaught = ("distill.prediction=0.0", "distill.attention=0.0")
    stages = [
        Variant("stages", "TwigVLM", ("p_head=False", *untaught)),
        Variant("stages", "taught attention", untaught[:1]),
        Variant("stages", "taught attention and words"),
        Variant("stages", "the same twig's attention", selector="twig_attention"),
    ]
    if budgets:
        one = (f"reinforce.budgets=({min(budgets)},)",)
        stages.append(Variant("stages", "reinforced, one budget", reinforced=one))
        stages.append(Variant("stages", "reinforced, all budgets", reinforced=()))
    return {
        **({"stages": stages} if p_head else {}),
        "attention": [
            Variant("attention", "base, layer K-1", selector="base_K", once=True, mode="ttp"),
            Variant("attention", "base, layer K+T-1", selector="base_K+T", once=True, mode="ttp"),
            Variant("attention", "twig, last layer"),
        ],
        "initialisation": [
            Variant("initialisation", name, other(twig_init=how)) for how, name in starts.items()
        ],
        "T": [Variant("T", f"T = {T}", other(T=T)) for T in (1, 2, 3, 4)],
        "K": [Variant("K", f"K = {K}", other(K=K)) for K in (0, 1, 2, 3)],
        "K_f": [
            Variant("K_f", f"K_f = {n}" if n < num_layers else "no FinalWipe", K_f=n) for n in wipes
        ],
        "gamma": [Variant("gamma", f"γ = {n}", gamma=n, answered=False) for n in (1, 3, 5, 7, 9)],
        "theta": [
            Variant("theta", f"θ = {p:g}", theta=p, answered=False) for p in (0, 0.3, 0.6, 0.9)
        ],
        "parts": [
            Variant("parts", "pruning alone", mode="ttp", answered=False),
            Variant("parts", "drafting alone", mode="ssd", answered=False),
            Variant("parts", "both", answered=False),
        ],
    }


def over_seeds(variant: Variant, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One line of the result file from a row a seed: means, and the values they are of.

    A figure that no row has is None.
    """
    line: dict[str, Any] = {
        "ablation": variant.ablation,
        "variant": variant.name,
        "mode": variant.mode,
        "selector": variant.selector,
        "avg_retained": rows[0]["avg_retained"],
        "retained": rows[0]["retained"],
        "seeds": len(rows),
    }
    for name in ("relacc", "relspd", "tokar", "mean_accepted"):
        values = [row[name] for row in rows if row.get(name) is not None]
        line[name] = float(np.mean(values)) if values else None
        line[f"{name}_of_seeds"] = values
    return line


def spread(line: Mapping[str, Any], name: str) -> float | None:
    """The standard deviation of a figure over seeds; None of fewer than two."""
    values = line[f"{name}_of_seeds"]
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
