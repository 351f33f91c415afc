"""What prefill and decoding take at least, from shapes: the roofline, and speeds that follow.

A pass through some layers takes its memory traffic (weights once, caches once) over the bandwidth,
or its arithmetic over the rate of matrix products, whichever is longer (Williams et al. 2009). What
lies between the passes, norms, masks and bookkeeping, counts as nothing. Shapes are those of the
program: what fills its slots up is computed and read too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from twig_jax.decoding.network import Program
from twig_jax.models import flops


@dataclass(frozen=True)
class Machine:
    """bandwidth: bytes/s that are read. flops: multiplications and additions/s of products."""

    bandwidth: float
    flops: float


@dataclass(frozen=True)
class Pass:
    """A pass through layers, `times` of it."""

    flops: float
    bytes: float
    times: float = 1

    def seconds(self, machine: Machine) -> float:
        """The roofline."""
        return self.times * max(self.bytes / machine.bandwidth, self.flops / machine.flops)


@dataclass(frozen=True)
class Drafting:
    """levels: those of a batch's iteration, the deepest of its rows. accepted: drafts of a row."""

    levels: float = 0.0
    accepted: float = 0.0


def seconds(passes: Sequence[Pass], machine: Machine) -> float:
    """One pass after the other."""
    return sum(one.seconds(machine) for one in passes)


def encoding(program: Program, rows: int, itemsize: int) -> list[Pass]:
    """The vision tower on all images of a batch."""
    c = program.base.vision
    images, width = rows * program.images, program.base.text.hidden_size
    per_layer = 4 * c.hidden_size**2 + 2 * c.hidden_size * c.intermediate_size
    weights = c.layers_used * per_layer + width * (c.hidden_size + width)
    return [Pass(images * flops.vision(c, width), weights * itemsize)] if images else []


def prompt(program: Program, rows: int, itemsize: int, levels: float) -> list[Pass]:
    """Prefill without its images: trunk, twig, `levels` of first drafts, and the deep layers."""
    p = program
    P, W = p.prompt_slots, p.width
    passes = [_layers(p, p.K, rows, P, P / 2, P, itemsize)]
    if p.runs_twig:
        passes.append(_layers(p, p.twig.T, rows, P, P / 2, P, itemsize))
    passes += _drafts(p, rows, itemsize, levels)
    for s in p.segments:
        slots = p.text_slots + s.slots
        passes.append(_layers(p, s.last - s.first, rows, slots + W, slots / 2, slots, itemsize))
    return [*passes, _head(p, rows * W, itemsize)]


def step(program: Program, rows: int, itemsize: int, levels: float) -> list[Pass]:
    """One iteration of the decoding loop that drafts `levels` levels."""
    p, G = program, program.generated_slots
    slots = p.prompt_slots + G
    passes = [_layers(p, p.K, rows, 1, slots, slots, itemsize)]
    passes += _drafts(p, rows, itemsize, levels)
    for s in p.segments:
        slots = p.text_slots + s.slots + G
        passes.append(_layers(p, s.last - s.first, rows, p.width, slots, slots, itemsize))
    return [*passes, _head(p, rows * p.width, itemsize)]


def answer(
    program: Program, rows: int, itemsize: int, machine: Machine, new: int, drafting: Drafting
) -> float:
    """Seconds from images and prompts to answers of `new` tokens."""
    first = [
        *encoding(program, rows, itemsize),
        *prompt(program, rows, itemsize, drafting.levels),
    ]
    steps = max(new / (drafting.accepted + 1) - 1, 0)
    each = seconds(step(program, rows, itemsize, drafting.levels), machine)
    return seconds(first, machine) + steps * each


def deepest(levels: float, gamma: int, rows: int) -> float:
    """Levels that a batch's iteration drafts, where a row drafts `levels` of at most γ on average.

    A batch drafts until its last row stops. Rows are taken to go on below every level with the same
    probability q, so that levels = 1 + q + .. + q^(γ-1), independently of each other.
    """
    if not 1 < levels < gamma:
        return levels
    low, high = 0.0, 1.0
    below = np.arange(gamma)
    for _ in range(40):
        q = (low + high) / 2
        low, high = (q, high) if (q**below).sum() < levels else (low, q)
    return float((1 - (1 - q**below) ** rows).sum())


def _drafts(p: Program, rows: int, itemsize: int, levels: float) -> list[Pass]:
    """Trunk, twig and its head on the nodes of every level."""
    if not p.draft or not levels:
        return []
    nodes, slots = p.tree.expanded, p.prompt_slots + p.generated_slots
    parts = [_layers(p, n, rows, nodes, slots, slots, itemsize) for n in (p.K, p.twig.T)]
    parts.append(_head(p, rows * nodes, itemsize))
    return [Pass(part.flops, part.bytes, levels) for part in parts]


def _layers(
    p: Program, layers: int, rows: int, tokens: int, context: float, slots: int, itemsize: int
) -> Pass:
    """Layers on `tokens` a row, of which each sees `context` of the row's `slots`."""
    c = p.base.text
    cached = 2 * c.num_kv_heads * c.head_dim * rows * slots
    return Pass(
        layers * rows * flops.decoder_layer(c, tokens, context),
        layers * (flops.layer_weights(c) + cached) * itemsize,
    )


def _head(p: Program, tokens: int, itemsize: int) -> Pass:
    c = p.base.text
    return Pass(flops.head(c, tokens), c.hidden_size * c.vocab_size * itemsize)
