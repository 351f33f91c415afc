"""What decoding takes on machines that need not be there: memory, traffic, collectives, time."""

from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh

from twig_jax.config import LlavaConfig, TwigConfig
from twig_jax.decoding import cost
from twig_jax.decoding.buckets import Bucket, program_for, state_bytes
from twig_jax.decoding.cache import Caches
from twig_jax.decoding.cost import Shapes
from twig_jax.decoding.generate import jitted_decode
from twig_jax.decoding.settings import Settings
from twig_jax.hardware import Chip, find_topology
from twig_jax.programs import Collective, Hlo, device_bytes, working_memory
from twig_jax.sharding.mesh import AXES, mesh_sizes

# Seconds that a message takes to the next device of a ring, an assumption, and that a GPU takes
# for a kernel that moves next to nothing: 1.0 to 1.7 µs on an H200, without gaps between them.
HOP = 1e-6
LAUNCH = 1.5e-6


@dataclass(frozen=True)
class Plan:
    """What an iteration of decoding takes on a topology. Bytes and FLOPs are those of one device.

    compiled: by the compiler of the topology, ahead of time, or estimated from shapes. memory: by
    what it holds; its working memory is the larger of the loop's and an estimate of prefill's.
    floor: weights and caches, read once where they are needed. moved: what the program moves
    between main memory and chip. flops: of matrix products. copies: of caches, and of int8 kernels
    as floats, in main memory. kernels: what the device is given. tokens: what an iteration, which
    drafts all levels, emits a row.
    """

    topology: str
    mesh: tuple[int, int, int]
    mode: str
    rows: int
    compiled: bool
    memory: dict[str, float]
    capacity: float
    floor: float
    moved: float | None
    flops: float
    collectives: dict[str, Collective]
    copies: float | None
    kernels: float | None
    seconds: dict[str, float]
    tokens: float

    @property
    def total(self) -> float:
        """Bytes of all that a device holds."""
        return sum(self.memory.values())

    @property
    def iteration(self) -> float:
        """Predicted seconds: memory and arithmetic beside each other, all else after them."""
        part = self.seconds
        return max(part["memory"], part["arithmetic"]) + part["collectives"] + part["launches"]

    @property
    def token(self) -> float:
        """Predicted seconds of a row's token."""
        return self.iteration / self.tokens

    def as_json(self) -> dict[str, Any]:
        """All figures."""
        own = {"total": self.total, "iteration": self.iteration, "token": self.token}
        return {**asdict(self), **own, "fits": self.total <= self.capacity}


def plan(
    config: LlavaConfig,
    twig: TwigConfig,
    settings: Settings,
    bucket: Bucket,
    topology: str,
    tensor: int = 0,
    dtype: str = "bfloat16",
    int8: str | None = None,
    tokar: float = 0.0,
) -> Plan:
    """The plan of decoding on TPUs, such as v5e:2x4, or on so many GPUs, such as h100:8.

    tensor: how many devices split heads and words, 0 for all; the others split rows. int8: as for
    `twig_jax.load`. tokar: share of the levels whose draft is accepted, 0 .. 1. The real loop is
    compiled for the devices; for GPUs without their compiler all is from shapes. Raises ValueError
    for a topology that is not known, for TPUs without their compiler, for a mesh that the devices
    do not make, and for a program that the compiler refuses.
    """
    chip, count, devices = find_topology(topology)
    sizes = mesh_sizes((0, 1, tensor) if tensor else (1, 1, 0), count)
    program = program_for(bucket, settings, config, twig, gpu=chip.cuda is not None)
    mesh = (
        AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)
        if devices is None
        else jax.make_mesh(sizes, AXES, (AxisType.Auto,) * 3, devices=devices)
    )
    weights = cost.shapes_of_weights(config, twig, dtype, mesh, int8)
    given = cost.shapes(program, bucket.rows, weights, mesh)
    passes = cost.step(given, program.tree.depth)
    floor = sum(one.bytes * one.times for one in passes)
    flops = sum(one.flops * one.times for one in passes)
    itemsize = jnp.dtype(dtype).itemsize
    # Prefill's, which is not compiled here; as if tensor parallelism split nothing of it.
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(given.state.caches))
    filling = (state_bytes(program, bucket.rows, itemsize) - whole) / (sizes[0] * sizes[1])
    working, moved, copies, kernels = 0.0, None, None, None
    collectives = _needed_collectives(given)
    if isinstance(mesh, Mesh):
        try:
            compiled = lower_decode(given, mesh).compile()
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(f"the compiler refuses the loop: {str(error)[:2000]}") from error
        hlo = Hlo(
            compiled.as_text(),
            # Of the loop's own loops, drafting alone has no length that is known beforehand.
            trips=max(program.tree.depth - 1, 0),
            # Greedy decoding takes the shorter way of all conditions but whether to draft.
            rare=r"(?<!/draft)/cond$",
        )
        body = hlo.loop()
        working, moved, kernels = working_memory(compiled), hlo.traffic(body), hlo.kernels(body)
        copies = hlo.copies(body, given.state.caches) + hlo.widened(body, given.weights)
        collectives = hlo.collectives(body)
    return Plan(
        topology=topology,
        mesh=sizes,
        mode=settings.mode,
        rows=bucket.rows,
        compiled=devices is not None,
        memory={
            "weights": device_bytes(given.weights),
            "caches": device_bytes(given.state.caches),
            "rest of the state": device_bytes(given.state._replace(caches=Caches((), (), ()))),
            "working memory": max(working, filling),
        },
        capacity=chip.memory * 2**30,
        floor=floor,
        moved=moved,
        flops=flops,
        collectives=collectives,
        copies=copies,
        kernels=kernels,
        seconds={
            "memory": (floor if moved is None else moved) / chip.bandwidth,
            "arithmetic": flops / chip.flops,
            "collectives": collective_seconds(collectives, chip, sizes[2]),
            "launches": LAUNCH * kernels if chip.cuda and kernels else 0.0,
        },
        tokens=1 + tokar * program.tree.depth,
    )


def lower_decode(given: Shapes, mesh: Mesh) -> Any:
    """The decoding loop, ready to be compiled for a mesh."""
    stop = jax.ShapeDtypeStruct(given.state.done.shape, jnp.bool_)
    with jax.set_mesh(mesh):
        return jitted_decode.lower(given.program, given.weights, given.state, stop, given.cost, 1)


def collective_seconds(found: dict[str, Collective], chip: Chip, devices: int) -> float:
    """Time of collectives over a ring of so many devices, used both ways.

    A collective sends (n - 1) / n of its bytes over n / 2 hops; an all-reduce does both twice, a
    permutation goes one hop.
    """
    total = 0.0
    for kind, one in found.items():
        twice = 2 if kind == "all-reduce" else 1
        share, hops = twice * (devices - 1) / devices, twice * devices / 2
        if kind == "collective-permute":
            share, hops = 1, 1
        total += one.count * hops * HOP + share * one.bytes / chip.link
    return total


def _needed_collectives(given: Shapes) -> dict[str, Collective]:
    """Two all-reduces of the states of all tokens in every layer, over the tensor axis."""
    if given.split == 1:
        return {}
    p, t, states = given.program, given.program.tree, given.state.states
    drafted = [t.expanded] * (t.depth - 1)
    # (layers, tokens of each pass)
    parts = [
        (p.K, [1, *drafted, t.leaves] if t.depth else [1]),
        (p.twig.T, [2, *drafted] if t.depth else []),
        (p.base.text.num_layers - p.K, [p.width]),
    ]
    of = given.rows * states.shape[-1] * states.dtype.itemsize
    return {
        "all-reduce": Collective(
            count=sum(2 * layers * len(passes) for layers, passes in parts),
            bytes=sum(2 * layers * sum(passes) * of for layers, passes in parts),
        )
    }
