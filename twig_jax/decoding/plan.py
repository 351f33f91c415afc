"""What decoding takes on machines that need not be there: memory, traffic, collectives, time."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from twig_jax.config import LlavaConfig, TwigConfig
from twig_jax.decoding import cost
from twig_jax.decoding.buckets import Bucket, program_for, state_bytes
from twig_jax.decoding.cache import Caches
from twig_jax.decoding.cost import Pass, Shapes
from twig_jax.decoding.generate import jitted_decode, jitted_prefill
from twig_jax.decoding.settings import Settings
from twig_jax.hardware import Chip, find_topology
from twig_jax.programs import Collective, Hlo, device_bytes, working_memory
from twig_jax.sharding.mesh import abstract_mesh, make_mesh, mesh_sizes

# Seconds that a message takes to the next device of a ring, an assumption, and that a GPU takes
# for a kernel that moves next to nothing: 1.0 to 1.7 µs on an H200, without gaps between them.
HOP = 1e-6
LAUNCH = 1.5e-6


@dataclass(frozen=True)
class Taken:
    """What a prompt, without its images, or an iteration takes. All figures are of one device.

    floor: bytes of weights and caches, read once where they are needed. moved: what the program
    moves between main memory and chip. flops: of matrix products. kernels: what the device is
    given. seconds: predicted, by what they are spent on.
    """

    floor: float
    moved: float | None
    flops: float
    collectives: dict[str, Collective]
    kernels: float | None
    seconds: dict[str, float]

    @property
    def total(self) -> float:
        """Predicted seconds: memory and arithmetic beside each other, all else after them."""
        part = self.seconds
        return max(part["memory"], part["arithmetic"]) + part["collectives"] + part["launches"]


@dataclass(frozen=True)
class Plan:
    """What decoding takes on a topology; bytes are those of one device.

    compiled: by the compiler of the topology, ahead of time, or estimated from shapes. memory: by
    what it holds; its working memory is the larger of the two programs'. copies: of caches, and of
    int8 kernels as floats, in main memory in an iteration. tokens: what an iteration, which drafts
    all levels, emits a row.
    """

    topology: str
    mesh: tuple[int, int, int]
    mode: str
    rows: int
    compiled: bool
    memory: dict[str, float]
    capacity: float
    prompt: Taken
    iteration: Taken
    copies: float | None
    tokens: float

    @property
    def total(self) -> float:
        """Bytes of all that a device holds."""
        return sum(self.memory.values())

    @property
    def token(self) -> float:
        """Predicted seconds of a row's token."""
        return self.iteration.total / self.tokens

    def as_json(self) -> dict[str, Any]:
        """All figures."""
        found = {**asdict(self), "total": self.total, "token": self.token}
        for name in ("prompt", "iteration"):
            found[name]["total"] = getattr(self, name).total
        return {**found, "fits": self.total <= self.capacity}


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
    `twig_jax.load`. tokar: share of the levels whose draft is accepted, 0 .. 1. The real programs
    are compiled for the devices; for GPUs without their compiler all is from shapes. Raises
    ValueError for a topology that is not known, for TPUs without their compiler, for a mesh that
    the devices do not make, and for a program that the compiler refuses.
    """
    chip, count, devices = find_topology(topology)
    sizes = mesh_sizes((0, 1, tensor) if tensor else (1, 1, 0), count)
    program = program_for(bucket, settings, config, twig, gpu=chip.cuda is not None)
    mesh = abstract_mesh(*sizes) if devices is None else make_mesh(*sizes, devices=devices)
    weights = cost.shapes_of_weights(config, twig, dtype, mesh, int8)
    given = cost.shapes(program, bucket.rows, weights, mesh)
    depth = program.tree.depth
    prompt = partial(_taken, chip, given.split, cost.prompt(given, depth))
    iteration = partial(_taken, chip, given.split, cost.step(given, depth))
    if isinstance(mesh, Mesh):
        filling, loop = (_compiled(lower(given, mesh)) for lower in (lower_prefill, lower_decode))
        whole, looped = (
            # Of the loops within, drafting alone has no length that is known beforehand. Greedy
            # decoding takes the shorter way of all conditions but whether to draft.
            Hlo(one.as_text(), trips=max(depth - 1, 0), rare=r"(?<!/draft)/cond$")
            for one in (filling, loop)
        )
        body = looped.loop()
        taken = prompt(*_read(whole, whole.entry)), iteration(*_read(looped, body))
        copies = looped.copies(body, given.state.caches) + looped.widened(body, given.weights)
        # Prompts make the state, which is counted already.
        made = device_bytes(given.state)
        working = max(working_memory(filling) - made, working_memory(loop))
    else:
        first, each = (_all_reduces(given, layers) for layers in _layers(given))
        taken, copies = (prompt(first), iteration(each)), None
        # Of a prompt, as if tensor parallelism split nothing of it.
        caches = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(given.state.caches))
        held = state_bytes(program, 1, jnp.dtype(dtype).itemsize)
        working = given.rows * (held - caches / bucket.rows)
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
            "working memory": working,
        },
        capacity=chip.memory * 2**30,
        prompt=taken[0],
        iteration=taken[1],
        copies=copies,
        tokens=1 + tokar * depth,
    )


def lower_prefill(given: Shapes, mesh: Mesh) -> Any:
    """Prompts without their images, ready to be compiled for a mesh."""
    with jax.set_mesh(mesh):
        return jitted_prefill.lower(
            given.program, given.weights, given.inputs, given.controls, given.cost
        )


def lower_decode(given: Shapes, mesh: Mesh) -> Any:
    """The decoding loop, ready to be compiled for a mesh."""
    stop = jax.ShapeDtypeStruct(given.state.done.shape, jnp.bool_)
    with jax.set_mesh(mesh):
        return jitted_decode.lower(given.program, given.weights, given.state, stop, given.cost, 1)


def _compiled(lowered: Any) -> Any:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"the compiler refuses a program: {str(error)[:2000]}") from error


def _read(hlo: Hlo, computation: str) -> tuple[dict[str, Collective], float, float]:
    """Collectives, bytes moved and kernels of what a compiled computation runs."""
    return hlo.collectives(computation), hlo.traffic(computation), hlo.kernels(computation)


def _taken(
    chip: Chip,
    split: int,
    passes: Sequence[Pass],
    collectives: dict[str, Collective],
    moved: float | None = None,
    kernels: float | None = None,
) -> Taken:
    """With predictions; split: devices that share a row."""
    floor = sum(one.bytes * one.times for one in passes)
    flops = sum(one.flops * one.times for one in passes)
    return Taken(
        floor=floor,
        moved=moved,
        flops=flops,
        collectives=collectives,
        kernels=kernels,
        seconds={
            "memory": (floor if moved is None else moved) / chip.bandwidth,
            "arithmetic": flops / chip.flops,
            "collectives": collective_seconds(collectives, chip, split),
            "launches": LAUNCH * kernels if chip.cuda and kernels else 0.0,
        },
    )


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


def _layers(given: Shapes) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(layers, tokens of a row) of every pass, of a prompt and of an iteration."""
    p, t = given.program, given.program.tree
    P = p.prompt_slots
    drafts = []
    if t.depth:
        each = [t.expanded] * (t.depth - 1)
        drafts = [(p.K, n) for n in (*each, t.leaves)] + [(p.twig.T, n) for n in (2, *each)]
    first = [(p.K, P), (p.twig.T, P)] if p.runs_twig else [(p.K, P)]
    deep = [(s.last - s.first, p.text_slots + s.slots + p.width) for s in p.segments]
    whole = p.base.text.num_layers - p.K
    return [*first, *drafts, *deep], [(p.K, 1), *drafts, (whole, p.width)]


def _all_reduces(given: Shapes, layers: Sequence[tuple[int, int]]) -> dict[str, Collective]:
    """Two of the states of all tokens in every layer, over the tensor axis."""
    if given.split == 1:
        return {}
    states = given.state.states
    of = given.rows * states.shape[-1] * states.dtype.itemsize
    return {
        "all-reduce": Collective(
            count=sum(2 * each for each, _ in layers),
            bytes=sum(2 * each * tokens * of for each, tokens in layers),
        )
    }
