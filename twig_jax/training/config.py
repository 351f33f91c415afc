"""What one training run is: a frozen dataclass that configs/ fill in."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twig_jax.checkpoints.config_files import read_config
from twig_jax.checkpoints.llava import local_folder
from twig_jax.checkpoints.twig import read_notes
from twig_jax.config import LlavaConfig, TwigConfig
from twig_jax.data.digits import ASSETS
from twig_jax.models.twig import STARTS
from twig_jax.presets import preset


def _at_least(least: int, config: Any, group: str, *names: str) -> None:
    """Raises ValueError for counts that are lower; None is no count."""
    for name in names:
        count = getattr(config, name)
        if count is not None and count < least:
            raise ValueError(f"{group}{name} is {count}, it must be at least {least}")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay; the defaults are the paper's.

    The reference's script leaves transformers' own b2=0.999.
    """

    lr: float = 1e-4
    end_lr: float = 0.0
    warmup: float = 0.03  # fraction of all steps
    b1: float = 0.9
    b2: float = 0.98
    weight_decay: float = 0.0
    clip: float | None = None  # global gradient norm

    def __post_init__(self) -> None:
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"optim.warmup is {self.warmup:g}, a share of all steps is 0 to 1")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"optim.clip is {self.clip:g}, a norm is above 0; None clips nothing")
        if not 0 <= self.lr < float("inf"):
            raise ValueError(f"optim.lr is {self.lr:g}, a learning rate is 0 or more")


@dataclass(frozen=True)
class DataConfig:
    """What rows are made of; a batch has so many rows over all hosts.

    source: conversations, as `sources.open_source` takes it with `images`; None for digits pages
    with as many questions each as fit into a row, in the shares of `mix`. validation: conversations
    held out, with images beside those of the source. conventions: how they are read, as for
    `twig_jax.load`. The other fields are `InstructBatches`'.
    """

    batch_size: int = 32
    row_tokens: int = 404
    mix: tuple[tuple[str, float], ...] | None = None
    source: str | None = None
    images: str | None = None
    validation: str | None = None
    conventions: str | None = None
    row_images: int = 1
    max_tokens: int | None = None
    workers: int = 0
    by_modality: bool = False
    max_bad_fraction: float = 0.01

    def __post_init__(self) -> None:
        _at_least(1, self, "data.", "batch_size", "row_tokens", "max_tokens")
        _at_least(0, self, "data.", "row_images", "workers")


@dataclass(frozen=True)
class DistillConfig:
    """What a twig learns from its base beside the answers: TwigVLM++'s first stage.

    prediction: α, the weight of KL(base ‖ twig) over the next word; attention: γ_a, that of KL(base
    ‖ P-Head) over visual tokens; 0 leaves one out, both are TwigVLM's training. layer: the base
    layer whose attention is learned (0-based), None for the one at 60 % of the depth. queries: see
    `distill.queries`. targets: a folder with what the base teaches, computed before (see
    targets.py), so that the run needs its trunk alone; words: how many of the likeliest words that
    holds.
    """

    prediction: float = 0.0
    attention: float = 0.0
    layer: int | None = None
    queries: str = "answer"
    most_queries: int = 64
    targets: str | None = None
    words: int = 32

    def __post_init__(self) -> None:
        _at_least(1, self, "distill.", "most_queries", "words")

    def layer_of(self, num_layers: int) -> int:
        """`layer`, in a base of so many layers."""
        return round(0.6 * num_layers) if self.layer is None else self.layer


@dataclass(frozen=True)
class ReinforceConfig:
    """How a P-Head learns from what prunings do to answers: TwigVLM++'s second stage.

    actions: G, prunings drawn for a question, of which the base answers `at_a_time` together; 0
    trains by other losses. budgets: R̄, ascending; early steps draw any of them, later ones more and
    more the lowest, the faster the higher beta is (`reinforce.budget_at`). least_spread: groups
    whose rewards (nats a token) have a lower standard deviation teach nothing. questions: most of
    a row; text_tokens: most text of one with its answer; images: most images of one, those with
    more are left out.
    """

    actions: int = 0
    at_a_time: int = 8
    budgets: tuple[float, ...] = ()
    beta: float = 8.0
    least_spread: float = 1e-4
    questions: int = 8
    text_tokens: int = 64
    images: int = 1

    def __post_init__(self) -> None:
        _at_least(0, self, "reinforce.", "actions")
        _at_least(1, self, "reinforce.", "at_a_time", "questions", "text_tokens", "images")
        if list(self.budgets) != sorted(self.budgets):
            raise ValueError(f"reinforce.budgets are {self.budgets}, they must ascend")


@dataclass(frozen=True)
class TrainConfig:
    """One run of one stage: "vision", "base" or "twig".

    It and its groups raise ValueError for settings that are out of range.
    """

    stage: str
    out: str
    steps: int
    preset: str = "digits"
    layers: int | None = None  # decoder layers, where fewer than the preset's
    K: int | None = None  # these three where other than the preset's
    T: int | None = None
    K_f: int | None = None
    base: str | None = None  # run folder, model folder or hub id that the base is read from
    base_dtype: str = "float32"  # that a frozen base is held and computed in
    whole_base: bool = True  # False: only the layers below the twig, so that nothing is answered
    deepen: tuple[int | None, ...] | None = None  # see models.grow.deepen
    twig_init: str = "next"  # "next", "last", "random", or a twig folder to be trained on
    p_head: bool = False  # the twig has a P-Head (TwigVLM++)
    distill: DistillConfig = DistillConfig()
    reinforce: ReinforceConfig = ReinforceConfig()
    optim: OptimConfig = OptimConfig()
    ema: float | None = None  # decay of a moving average of the parameters, which is the result
    data: DataConfig = DataConfig()
    seed: int = 0
    content_weight: float = 1.0  # loss weight of words that depend on the page ("base" stage)
    naming_weight: float = 0.0  # share of the vision stage's loss in the "base" stage
    log_every: int = 20
    save_every: int = 200
    keep: int = 2  # newest checkpoints kept, beside the one of lowest validation loss
    best: bool = False  # that one is the result, not the last
    validation_samples: int = 64
    device_rows: int | None = None  # rows that each device takes at a time; None: all at once
    head_chunk: int = 512  # tokens of a row whose logits are there at one time
    remat: bool = False  # compute the twig's layers again in the backward pass, to save memory
    mesh: tuple[int, int, int] = (0, 1, 1)  # see sharding.mesh.make_mesh

    def __post_init__(self) -> None:
        _at_least(0, self, "", "steps", "K")
        _at_least(1, self, "", "layers", "T", "K_f", "log_every", "save_every", "keep")
        _at_least(1, self, "", "validation_samples", "device_rows", "head_chunk")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema is {self.ema:g}, a decay is between 0 and 1")

    def model(self) -> tuple[LlavaConfig, TwigConfig]:
        """The base and twig configuration of this run; a twig's base has its own in its folder.

        Raises ValueError where the run would change that one's layers.
        """
        base, twig = preset(self.preset)
        if self.layers is not None:
            text = dataclasses.replace(base.text, num_layers=self.layers)
            base = dataclasses.replace(base, text=text)
        folder = self.model_folder()
        if self.stage == "twig" and folder is not None:
            base = read_config(folder)
            layers = base.text.num_layers
            if self.layers not in (None, layers) or self.deepen is not None:
                raise ValueError(
                    f"{self.base} is a model of {layers} decoder layers, which a twig grows on as "
                    "it is: leave out layers and deepen"
                )
        given: dict[str, Any] = {"K": self.K, "T": self.T, "K_f": self.K_f, "p_head": self.p_head}
        if self.p_head and self.twig_folder is not None:
            given["gate"] = read_notes(self.twig_folder)[0].gate
        twig = dataclasses.replace(twig, **{k: v for k, v in given.items() if v is not None})
        return base, twig

    def accumulate(self, mesh: Mapping[str, int]) -> int:
        """Into how many parts, one after the other, a mesh of these sizes takes a batch.

        Raises ValueError where its rows do not split evenly.
        """
        devices = mesh["data"] * mesh["fsdp"]
        rows = self.data.batch_size // devices
        parts = rows // (self.device_rows or max(rows, 1))
        if parts < 1 or self.data.batch_size != parts * (self.device_rows or rows) * devices:
            raise ValueError(
                f"{self.data.batch_size} rows a batch (data.batch_size) do not split over "
                f"{devices} devices that take {self.device_rows or 'all'} at a time (device_rows); "
                "choose a multiple, or give the mesh a tensor axis"
            )
        return parts

    def model_folder(self) -> Path | None:
        """The folder of a base in a published format, if that is where it is read from.

        Raises FileNotFoundError for a `base` that is neither that nor a training run's folder.
        """
        if self.base is None or (Path(self.base) / "checkpoints").is_dir():
            return None
        folder = local_folder(self.base)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} is neither a training run nor a model folder")
        return folder

    @property
    def twig_folder(self) -> Path | None:
        """The folder of the twig to be trained on, None where it grows from the base."""
        folder = Path(self.twig_init)
        return None if self.twig_init in STARTS or not folder.is_dir() else folder

    @property
    def trains_only(self) -> str | None:
        """The one part of the parameters that trains, None for all."""
        return "p_head" if self.reinforce.actions else None

    @property
    def holds_out(self) -> bool:
        """Whether there are data to validate on."""
        return self.data.source is None or self.data.validation is not None

    def reads_as(self) -> Path:
        """The folder whose tokenizer and conventions data are read with: the base's or digits'."""
        return self.model_folder() or ASSETS / "base"
