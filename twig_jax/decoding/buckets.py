"""Shapes: what a program is compiled for, and the memory it takes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from twig_jax.config import LlavaConfig, TwigConfig
from twig_jax.decoding.network import Program, Segment
from twig_jax.decoding.settings import Settings
from twig_jax.decoding.tree import Tree
from twig_jax.models.attention import queries_at_once
from twig_jax.pruning.schedule import Schedule, by_twig
from twig_jax.sharding.mesh import ROWS

TEXT_STEP = 32  # undeclared shapes are rounded up to multiples of these
_NEW_STEP = 32


@dataclass(frozen=True)
class Bucket:
    """The largest batch a program takes: rows, and per row text tokens, images and new tokens."""

    rows: int
    text: int
    images: int
    new: int

    def __str__(self) -> str:
        return f"{self.rows} rows x ({self.text} text, {self.images} images, {self.new} new)"

    def holds(self, other: "Bucket") -> bool:
        """Whether a batch of the other shape fits."""
        mine = (self.rows, self.text, self.images, self.new)
        return all(
            a >= b
            for a, b in zip(mine, (other.rows, other.text, other.images, other.new), strict=True)
        )


def fit(need: Bucket, declared: Sequence[Bucket]) -> Bucket:
    """The smallest declared bucket that holds `need`; without any, `need` rounded up.

    Raises ValueError where none is large enough.
    """
    if not declared:
        text = -(-need.text // TEXT_STEP) * TEXT_STEP
        return Bucket(need.rows, text, need.images, -(-need.new // _NEW_STEP) * _NEW_STEP)
    fitting = [bucket for bucket in declared if bucket.holds(need)]
    if not fitting:
        raise ValueError(
            f"a batch of {need} fits into none of the declared buckets: "
            + "; ".join(map(str, declared))
        )
    return min(fitting, key=lambda b: (b.rows, b.images, b.text, b.new))


def program_for(
    bucket: Bucket,
    settings: Settings,
    config: LlavaConfig,
    twig: TwigConfig | None,
    *,
    schedule: Schedule | None = None,
    retained: Sequence[int] = (),
    resumes: bool = False,
    gpu: bool = False,
) -> Program:
    """The program of a bucket.

    Levels of drafts that could never be emitted, or kept among so many nodes, are left out.
    schedule: None for the twig's. retained: R_max of each segment, where rows keep more than the
    call's budget. gpu: whether it is to run on GPUs.
    """
    M, L = config.vision.num_tokens, config.text.num_layers
    twig = twig or TwigConfig(K=min(1, L - 1), T=0, K_f=L)
    layers: tuple[int, ...] = (twig.K,)
    slots: tuple[int, ...] = (bucket.images * M,)
    if settings.prune:
        schedule = schedule or by_twig(twig)
        budgets = [tuple(retained)] if retained else []
        if settings.avg_retained is not None:
            budgets.append(schedule.budget(settings.avg_retained, L, M, bucket.images))
        layers, slots = schedule.layers, tuple(map(max, zip(*budgets, strict=True)))
    depth = min(settings.gamma, max(bucket.new - 1, 1), settings.nodes or settings.gamma)
    children = min(settings.children, config.text.vocab_size)
    segments = zip(layers, (*layers[1:], L), slots, strict=True)
    return Program(
        base=config,
        twig=twig,
        prune=settings.prune,
        draft=settings.draft,
        adaptive=settings.draft and settings.adaptive,
        resumes=resumes and settings.prune and not settings.draft,
        text_slots=bucket.text,
        images=bucket.images,
        segments=tuple(Segment(*segment) for segment in segments if segment[0] < L),
        rank=schedule.rank if settings.prune and schedule else None,
        tree=Tree.of(depth, children, settings.expanded, settings.nodes)
        if settings.draft
        else Tree.of(0),
        max_new=bucket.new,
        gpu=gpu,
    )


def state_bytes(program: Program, rows: int, itemsize: int, split: int = 1) -> float:
    """Bytes of a state and of the largest intermediate results of its prefill, on one device.

    The caches are exact, the rest an estimate from shapes: one layer's activations over all prompt
    slots (feed-forward and attention), and the logits of an iteration. split: devices that share
    heads and words.
    """
    p, text = program, program.base.text
    G = p.generated_slots
    slots = (p.K + (p.twig.T if p.keeps_twig else 0)) * (p.prompt_slots + G)
    slots += sum((s.last - s.first) * (p.text_slots + s.slots + G) for s in p.segments)
    caches = slots * 2 * text.num_kv_heads * text.head_dim * itemsize
    width = max(p.prompt_slots, p.text_slots + p.segments[0].slots + p.width)
    states, inner = (
        width * size * itemsize for size in (4 * text.hidden_size, 2 * text.intermediate_size)
    )
    attention = 0 if p.fused else text.num_heads * queries_at_once(width) * width * 2 * 4
    logits = max(p.width, p.tree.expanded) * text.vocab_size * 4 * 3
    split = split if text.num_kv_heads % split == 0 else 1
    return rows * (states + (caches + inner + attention + logits) / split)


def check_memory(
    program: Program,
    bucket: Bucket,
    weights: int,
    itemsize: int,
    limit: int | None,
    mesh: Mesh | None = None,
) -> None:
    """Raises MemoryError for a batch that `limit` bytes cannot hold, saying what would fit.

    weights: bytes of the parameters. Both are of one device of the mesh. limit None: not known,
    nothing is checked.
    """
    if limit is None:
        return
    sizes = {} if mesh is None else mesh.shape
    spread = math.prod(sizes.get(axis, 1) for axis in ROWS)
    spread = spread if bucket.rows % spread == 0 else 1
    one = state_bytes(program, 1, itemsize, sizes.get("tensor", 1))
    needed = weights + bucket.rows // spread * one
    if needed <= limit:
        return
    gb = 1e9
    rows = spread * int((limit - weights) // one)
    said = (
        f"{bucket} need about {needed / gb:.1f} GB of a device, {weights / gb:.1f} GB of it "
        f"parameters, and there are {limit / gb:.1f} GB; "
    )
    if rows < 1:
        raise MemoryError(said + "not even one row fits: shorten prompts or answers")
    raise MemoryError(said + f"about {rows} rows of this shape and budget would fit")


def device_memory(device: jax.Device) -> int | None:
    """Bytes a device has for arrays: what its runtime says, the machine's on CPUs."""
    import os

    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
