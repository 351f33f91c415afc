"""What a run starts from: its base and its twig, on the mesh."""

import contextlib
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from twig_jax.checkpoints.convert import placing
from twig_jax.checkpoints.llava import open_llava
from twig_jax.checkpoints.manager import CheckpointManager
from twig_jax.checkpoints.twig import read_twig
from twig_jax.models.grow import deepen
from twig_jax.models.llava import Params, init_base
from twig_jax.models.twig import fresh_p_head, init_twig
from twig_jax.sharding.placement import distribute
from twig_jax.sharding.rules import shardings
from twig_jax.training.config import TrainConfig


def start_base(config: TrainConfig, mesh: Mesh) -> Params:
    """The base of a run: random, a training run's result or a model folder's; deepened if told.

    Tensors of a model folder are put on the mesh one by one. Raises FileNotFoundError for a base
    that is not there, ValueError for one that is damaged, not supported, of a stage that this one
    does not follow, or of another number of decoder layers.
    """
    base_config, _ = config.model()
    folder = config.model_folder()
    if config.stage == "twig" and folder is not None:
        with open_llava(folder) as (_, source):
            return source.cast(config.base_dtype).tree(placing(mesh), _needed(config))
    fresh = init_base(base_config, jax.random.key(config.seed))
    stage = None
    if config.base is None:
        base = fresh
    elif folder is not None:
        with open_llava(folder) as (_, source):
            base = source.cast(np.float32).tree()
    else:
        stage, base = _result_of_run(config, mesh)
    if config.deepen is not None:
        base = deepen(base, config.deepen)
    layers = [name for name in base["text"] if name.startswith("layers_")]
    if len(layers) != base_config.text.num_layers:
        if stage != "vision":
            raise ValueError(
                f"base={config.base!r} has {len(layers)} decoder layers"
                f"{' once deepened' if config.deepen else ''}, this run's model has "
                f"{base_config.text.num_layers}: set layers={len(layers)}"
            )
        # The decoder never ran in that stage: everything but its layers.
        text = {name: part for name, part in base["text"].items() if name not in layers}
        base = {**base, "text": {**fresh["text"], **text}}
    if config.stage == "twig":
        base = jax.tree.map(lambda x: jnp.asarray(x, config.base_dtype), base)
    return distribute(base, mesh)


def _result_of_run(config: TrainConfig, mesh: Mesh) -> tuple[str, Params]:
    """(stage, parameters) of the run in `config.base`: what `fit` has returned, on the mesh."""
    folder = Path(config.base or "") / "checkpoints"
    with contextlib.closing(CheckpointManager(folder, reads_only=True)) as manager:
        if manager.latest() is None:
            raise FileNotFoundError(f"the training run in {config.base} has saved nothing yet")
        run = manager.notes()["config"]
        if run["stage"] == "twig" or (run["stage"] == "vision" and config.stage == "twig"):
            raise ValueError(
                f"{config.base} is a run of the {run['stage']} stage, which the {config.stage} "
                "stage cannot start from; set base to a run of the stage before, or a model folder"
            )
        step = manager.best() if run.get("best") else manager.latest()
        result = "params" if run.get("ema") is None else "ema"
        shapes = {result: manager.shapes(step)[result]}
        like = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            shapes,
            shardings(shapes, mesh),
        )
        return run["stage"], manager.restore_part(like, step)[result]


def _needed(config: TrainConfig) -> str:
    """A regular expression for the paths of the base that a twig's run reads."""
    if config.whole_base:
        return ""
    base, twig = config.model()
    layers = set(range(twig.K))
    if config.twig_init in ("next", "last"):
        first = twig.K if config.twig_init == "next" else base.text.num_layers - twig.T
        layers |= set(range(first, first + twig.T))
    return rf"(?!text/layers_)|text/layers_({'|'.join(map(str, sorted(layers)))})/"


def start_twig(config: TrainConfig, base: Params, mesh: Mesh) -> Params:
    """The float32 twig of a run: grown from its base, or a twig folder's to be trained on.

    A P-Head that the folder's twig lacks is a fresh one.
    Raises FileNotFoundError and ValueError for folders that hold no twig of this base, and
    ValueError for a twig of another shape than the run's.
    """
    base_config, twig_config = config.model()
    if config.twig_folder is None:
        twig = init_twig(base, base_config.text, twig_config, config.twig_init, config.seed)
        return distribute(jax.tree.map(lambda x: x.astype(jnp.float32), twig), mesh)
    grown, twig = read_twig(config.twig_folder, base, base_config, np.float32)
    if twig_config.p_head and not grown.p_head:
        grown = dataclasses.replace(grown, p_head=True)
        twig = {**twig, "p_head": fresh_p_head(base_config.text)}
    if grown != twig_config:
        raise ValueError(f"the twig in {config.twig_init} is {grown}, the run's is {twig_config}")
    return distribute(twig, mesh)
