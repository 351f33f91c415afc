"""What a training run takes, before any machine is there to run it."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from twig_jax.data.packing import Shape, fill
from twig_jax.hardware import Chip, find_topology
from twig_jax.models.llava import init_base
from twig_jax.models.twig import feeding, init_twig
from twig_jax.programs import Hlo, abstract, device_bytes, working_memory
from twig_jax.sharding.mesh import abstract_mesh, make_mesh, mesh_sizes
from twig_jax.sharding.rules import shardings
from twig_jax.training.config import TrainConfig
from twig_jax.training.data import open_batches
from twig_jax.training.distill import teaching
from twig_jax.training.flops import step_flops
from twig_jax.training.loop import stage_loss
from twig_jax.training.optim import optimizer
from twig_jax.training.step import TrainState, init_state, make_step

# What large matrices reach of a chip's peak, with all else that a step does.
UTILISATION = 0.4


@dataclass(frozen=True)
class Plan:
    """What one step of a run takes on a topology; bytes are those of one device.

    compiled: by the compiler of the topology, ahead of time, or estimated from shapes. memory: by
    what it holds. flops: model FLOPs of all devices. collectives: bytes by kind, of the larger of
    what goes in and what comes out.
    """

    topology: str
    devices: int
    mesh: tuple[int, int, int]
    rows: int
    parts: int
    compiled: bool
    memory: dict[str, float]
    capacity: float
    flops: float
    seconds: float
    collectives: dict[str, float]

    @property
    def total(self) -> float:
        """Bytes of all that a device holds at the height of a step."""
        return sum(self.memory.values())

    def as_json(self) -> dict[str, Any]:
        """All figures."""
        return {**asdict(self), "total": self.total, "fits": self.total <= self.capacity}

    def __str__(self) -> str:
        how = "compiled ahead of time" if self.compiled else "ESTIMATED from shapes, not compiled"
        data, fsdp, tensor = self.mesh
        share = self.total / self.capacity
        lines = [
            f"{self.topology}: {self.devices} devices, {how}",
            f"mesh data={data} fsdp={fsdp} tensor={tensor}; {self.rows} rows in {self.parts} parts",
            "",
            "memory of a device            GiB",
            *(f"  {name:24}{size / 2**30:9.2f}" for name, size in self.memory.items()),
            f"  {'total':24}{self.total / 2**30:9.2f}   {share:.0%} of "
            f"{self.capacity / 2**30:.0f}: {'fits' if share <= 1 else 'DOES NOT FIT'}",
            "",
            "a step",
            f"  model PFLOP             {self.flops / 1e15:9.2f}",
            f"  seconds                 {self.seconds:9.2f}   at {UTILISATION:.0%} of the peak, "
            "an assumption",
            *(
                f"  {name + ', GiB a device':24}{size / 2**30:9.2f}"
                for name, size in self.collectives.items()
            ),
        ]
        return "\n".join(lines)


def plan(config: TrainConfig, topology: str) -> Plan:
    """The plan of a run on TPUs, such as v5e:2x4, or on so many GPUs, such as h100:8.

    For TPUs the real step is compiled for them; for GPUs it is an estimate. The base has the shapes
    of the run's preset. Raises ValueError for a topology that is not known, for TPUs without their
    compiler, for settings that do not fit together, and for a step that the compiler refuses.
    """
    chip, count, devices = find_topology(topology)
    if devices is None:
        return _estimated(config, topology, chip, count)
    return _compiled(config, topology, chip, devices)


def _held(config: TrainConfig, mesh: Mesh | AbstractMesh) -> tuple[TrainState, Any, Any]:
    """(state, frozen, batch) by shape and sharding."""
    base_config, twig_config = config.model()
    base = jax.eval_shape(lambda key: init_base(base_config, key), jax.random.key(0))
    trained, frozen, whole = base, {}, base
    if config.stage == "twig":
        trained = jax.eval_shape(lambda p: init_twig(p, base_config.text, twig_config), base)
        if not config.whole_base:
            base = feeding(base, twig_config.K)
        dtype = jnp.dtype(config.base_dtype)
        frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), base)
        if config.reinforce.actions:
            frozen["p_head"] = trained["p_head"]
    tx = optimizer(config.optim, config.steps, config.trains_only)
    state = jax.eval_shape(lambda params: init_state(params, tx, config.ema is not None), trained)
    data = config.data
    if data.source is None:
        batch = next(open_batches(config, base_config))
    else:
        shape = Shape(
            data.batch_size, data.row_tokens, data.row_images, base_config.vision.image_size
        )
        batch = fill([], shape, 0)
    if config.distill.targets:
        teach = teaching(base_config, twig_config, config.distill, config.head_chunk)
        batch = {**batch, **jax.eval_shape(teach, whole, batch)}
    if config.reinforce.actions:
        batch = {**batch, "draws": np.zeros(data.batch_size, np.uint32)}
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    return (
        abstract(state, shardings(state, mesh)),
        abstract(frozen, shardings(frozen, mesh)),
        abstract(batch, dict.fromkeys(batch, rows)),
    )


def _memory(state: TrainState, frozen: Any, batch: Any) -> dict[str, float]:
    return {
        "frozen base": device_bytes(frozen),
        "trained parameters": device_bytes(state.params),
        "optimizer state": device_bytes((state.opt_state, state.step)),
        "moving average": device_bytes(state.ema),
        "batch": device_bytes(batch),
    }


def lowered(config: TrainConfig, mesh: Mesh) -> tuple[Any, tuple[TrainState, Any, Any]]:
    """The step of a run, ready to be compiled for a mesh, and the shapes of its arguments."""
    held = _held(config, mesh)
    tx = optimizer(config.optim, config.steps, config.trains_only)
    step = make_step(stage_loss(config), tx, config.accumulate(mesh.shape), config.ema)
    with jax.set_mesh(mesh):
        return step.lower(*held), held


def _compiled(config: TrainConfig, topology: str, chip: Chip, devices: Any) -> Plan:
    sizes = mesh_sizes(config.mesh, len(devices))
    mesh = make_mesh(*sizes, devices=devices)
    step, held = lowered(config, mesh)
    try:
        compiled = step.compile()
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"the compiler refuses the step: {str(error)[:2000]}") from error
    memory = _memory(*held)
    memory["working memory"] = working_memory(compiled)
    hlo = Hlo(compiled.as_text())
    return Plan(
        topology=topology,
        devices=len(devices),
        mesh=sizes,
        rows=config.data.batch_size,
        parts=config.accumulate(mesh.shape),
        compiled=True,
        memory=memory,
        capacity=chip.memory * 2**30,
        flops=step_flops(config),
        seconds=step_flops(config) / len(devices) / chip.flops / UTILISATION,
        collectives={kind: found.bytes for kind, found in hlo.collectives(hlo.entry).items()},
    )


def _estimated(config: TrainConfig, topology: str, chip: Chip, devices: int) -> Plan:
    sizes = mesh_sizes(config.mesh, devices)
    mesh = abstract_mesh(*sizes)
    parts = config.accumulate(dict(mesh.shape))
    state, frozen, batch = _held(config, mesh)
    base, twig = config.model()
    text, (data, fsdp, tensor) = base.text, sizes
    rows = config.data.batch_size // (data * fsdp * parts)
    tokens, wide = rows * config.data.row_tokens, text.intermediate_size // tensor
    number = jnp.dtype(config.base_dtype if config.stage == "twig" else jnp.float32).itemsize
    layers = twig.T if config.stage == "twig" else text.num_layers
    # Of a layer: inputs, normed inputs and the products of the feed-forward part, with gradients.
    layer = 2 * tokens * (4 * text.hidden_size + 3 * wide) * number
    kept = tokens * text.hidden_size * number if config.remat and config.stage == "twig" else layer
    # Of attention and head: what is scored at a time in float32, its exponentials and gradients.
    queries = min(config.data.row_tokens, 512)
    scores = 3 * 4 * rows * text.num_heads // tensor * queries * config.data.row_tokens
    chunk = min(config.head_chunk, config.data.row_tokens)
    logits = 3 * 4 * rows * chunk * text.vocab_size // tensor
    trained = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params)) // tensor
    used = feeding(frozen, twig.K) if config.stage == "twig" else frozen
    memory = _memory(state, frozen, batch)
    memory["gradients"] = (1 + (parts > 1)) * device_bytes(state.params)
    # Trained weights are there as a whole, in the type they are computed in.
    memory["working memory"] = layers * kept + layer + max(scores, logits) + trained * number
    spread = fsdp > 1
    frozen_bytes = sum(x.dtype.itemsize * math.prod(x.shape) for x in jax.tree.leaves(used))
    collectives = {
        # Frozen weights once, trained ones for the forward and the backward pass.
        "all-gather": spread * parts * (frozen_bytes // tensor + 2 * trained * number),
        "reduce-scatter": spread * parts * trained * 4,
        "all-reduce": (data > 1) * device_bytes(state.params)
        # Two a layer and direction, of the states of all tokens.
        + (tensor > 1)
        * parts
        * 2
        * (twig.K * (config.stage == "twig") + 2 * layers)
        * tokens
        * text.hidden_size
        * number,
    }
    return Plan(
        topology=topology,
        devices=devices,
        mesh=sizes,
        rows=config.data.batch_size,
        parts=parts,
        compiled=False,
        memory=memory,
        capacity=chip.memory * 2**30,
        flops=step_flops(config),
        seconds=step_flops(config) / devices / chip.flops / UTILISATION,
        collectives={name: float(size) for name, size in collectives.items() if size},
    )
