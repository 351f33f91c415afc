"""What one training run is: a frozen dataclass that configs/ fill in."""

import dataclasses
from dataclasses import dataclass

from twig_jax.config import LlavaConfig, TwigConfig
from twig_jax.presets import preset


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay; the defaults are the paper's.

    The reference's script leaves transformers' own values: b2=0.999 and clip=1.0.
    """

    lr: float = 1e-4
    end_lr: float = 0.0
    warmup: float = 0.03  # fraction of all steps
    b1: float = 0.9
    b2: float = 0.98
    weight_decay: float = 0.0
    clip: float | None = None  # global gradient norm


@dataclass(frozen=True)
class DataConfig:
    """Digits pages with as many questions each as fit into a row of `row_tokens` tokens."""

    batch_size: int = 32
    row_tokens: int = 404
    mix: tuple[tuple[str, float], ...] | None = None


@dataclass(frozen=True)
class TrainConfig:
    """One run of one stage: "vision", "base" or "twig"."""

    stage: str
    out: str
    steps: int
    preset: str = "digits"
    layers: int | None = None  # decoder layers, where fewer than the preset's
    base: str | None = None  # run folder or model folder that the base is read from
    deepen: tuple[int | None, ...] | None = None  # see models.grow.deepen
    twig_init: str = "next"  # "next", "last", "random", or a twig folder to be trained on
    optim: OptimConfig = OptimConfig()
    data: DataConfig = DataConfig()
    seed: int = 0
    content_weight: float = 1.0  # loss weight of words that depend on the page ("base" stage)
    naming_weight: float = 0.0  # share of the vision stage's loss in the "base" stage
    log_every: int = 20
    save_every: int = 200
    accumulate: int = 1  # parts that the rows of a batch are taken in
    head_chunk: int = 512  # tokens of a row whose logits are there at one time
    remat: bool = False  # compute the twig's layers again in the backward pass, to save memory
    mesh: tuple[int, int, int] = (0, 1, 1)

    def model(self) -> tuple[LlavaConfig, TwigConfig]:
        """The base and twig configuration of this run."""
        base, twig = preset(self.preset)
        if self.layers is not None:
            text = dataclasses.replace(base.text, num_layers=self.layers)
            base = dataclasses.replace(base, text=text)
        return base, twig
