"""What prefill and decoding take at least, from shapes: the roofline, and speeds that follow.

A pass through some layers takes its memory traffic (weights once, caches once) over the bandwidth,
or its arithmetic over the rate of matrix products, whichever is longer (Williams et al. 2009). What
lies between the passes, norms, masks and bookkeeping, counts as nothing. Shapes are those of the
program: what fills its slots up is computed and read too. All figures are of one device.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from twig_jax.config import LlavaConfig, TwigConfig
from twig_jax.decoding.cache import Caches, State
from twig_jax.decoding.network import Program, Weights, drafting_in_int8
from twig_jax.decoding.prefill import Inputs, prefill
from twig_jax.decoding.settings import Controls, Settings, controls
from twig_jax.models import flops
from twig_jax.models.int8 import quantised
from twig_jax.models.llava import init_base
from twig_jax.models.twig import init_twig
from twig_jax.programs import abstract, device_bytes
from twig_jax.sharding.mesh import abstract_mesh
from twig_jax.sharding.rules import partition, shardings

ONE_DEVICE = abstract_mesh()


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


class Shapes(NamedTuple):
    """A program and what it is given, by shape and sharding. split: devices that share a row."""

    program: Program
    weights: Weights
    inputs: Inputs
    controls: Controls
    cost: np.ndarray
    state: State  # after prefill
    split: int

    @property
    def rows(self) -> int:
        """Of one device."""
        return self.state.n.sharding.shard_shape(self.state.n.shape)[0]


def shapes_of_weights(
    config: LlavaConfig,
    twig: TwigConfig,
    dtype: str,
    mesh: Mesh | AbstractMesh = ONE_DEVICE,
    int8: str | None = None,
) -> Weights:
    """The weights that an engine has, by shape and sharding. int8: as for `twig_jax.load`."""

    def build(key: jax.Array) -> Weights:
        base = jax.tree.map(lambda x: x.astype(dtype), init_base(config, key))
        grown = init_twig(base, config.text, twig)
        base = quantised(base) if int8 == "all" else base
        return drafting_in_int8(base, grown) if int8 else Weights(base, grown)

    weights = jax.eval_shape(build, jax.random.key(0))
    return abstract(weights, shardings(weights, mesh))


def shapes(
    program: Program, rows: int, weights: Weights, mesh: Mesh | AbstractMesh = ONE_DEVICE
) -> Shapes:
    """What the program of a batch is given, as the engine places it; nothing is computed.

    weights: real, or of `shapes_of_weights`.
    """
    p, config = program, program.base
    dtype = weights.dtype

    def array(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((rows, *shape), dtype)

    def row(x: Any, *axes: str | None) -> Any:
        sharding = NamedSharding(mesh, partition(x.shape, ("rows", *axes), mesh))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    P, M, d = p.prompt_slots, config.vision.num_tokens, config.text.hidden_size
    inputs = Inputs(
        tokens=array(jnp.int32, P),
        is_visual=array(jnp.bool_, P),
        lengths=array(jnp.int32),
        visual=array(dtype, p.images * M, d),
        retained=array(jnp.int32, len(p.segments)),
        scores=array(jnp.float32, P),
    )
    told = controls([Settings()] * rows, config.eos_token_id)
    cost = np.zeros(p.tree.depth + 1, np.float32)
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), weights)
    state, _ = jax.eval_shape(functools.partial(prefill, p), plain, inputs, told, cost)
    rest = jax.tree.map(row, state._replace(caches=Caches((), (), ())))
    caches = jax.tree.map(lambda x: row(x, "tensor"), state.caches)
    return Shapes(
        p,
        weights,
        jax.tree.map(row, inputs),
        jax.tree.map(row, told),
        cost,
        rest._replace(caches=caches),
        mesh.shape["tensor"],
    )


def seconds(passes: Sequence[Pass], machine: Machine) -> float:
    """One pass after the other."""
    return sum(one.seconds(machine) for one in passes)


def encoding(given: Shapes) -> list[Pass]:
    """The vision tower on all images of a batch."""
    c, base = given.program.base.vision, given.weights.base
    images, width = given.rows * given.program.images, given.program.base.text.hidden_size
    tower = {k: v for k, v in base["vision"].items() if not k.startswith("layers_")}
    # The last layer is behind the one whose features are read.
    tower |= {f"layers_{i}": base["vision"][f"layers_{i}"] for i in range(c.layers_used)}
    read = device_bytes((tower, base["projector"]))
    return [Pass(images * flops.vision(c, width) / given.split, read)] if images else []


def prompt(given: Shapes, levels: float) -> list[Pass]:
    """Prefill without its images: trunk, twig, `levels` of first drafts, and the deep layers."""
    p, text, caches = given.program, given.weights.base["text"], given.state.caches
    P, W, G = p.prompt_slots, p.width, p.generated_slots
    passes = [_layers(given, _named(text, 0, p.K), caches.trunk, P, P / 2, P / (P + G))]
    if p.runs_twig:
        grown = _named(given.weights.twig, 0, p.twig.T)
        passes.append(_layers(given, grown, caches.twig, P, P / 2, P / (P + G)))
    passes += _drafts(given, levels)
    for segment, cache in zip(p.segments, caches.deep, strict=True):
        slots = p.text_slots + segment.slots
        layers = _named(text, segment.first, segment.last)
        passes.append(_layers(given, layers, cache, slots + W, slots / 2, slots / (slots + G)))
    return [*passes, _head(given, text, W)]


def step(given: Shapes, levels: float) -> list[Pass]:
    """One iteration of the decoding loop that drafts `levels` levels."""
    p, text, caches = given.program, given.weights.base["text"], given.state.caches
    G = p.generated_slots
    passes = [_layers(given, _named(text, 0, p.K), caches.trunk, 1, p.prompt_slots + G)]
    passes += _drafts(given, levels)
    for segment, cache in zip(p.segments, caches.deep, strict=True):
        slots = p.text_slots + segment.slots + G
        layers = _named(text, segment.first, segment.last)
        passes.append(_layers(given, layers, cache, p.width, slots))
    return [*passes, _head(given, text, p.width)]


def answer(given: Shapes, machine: Machine, new: int, drafting: Drafting) -> float:
    """Seconds from images and prompts to answers of `new` tokens."""
    first = [*encoding(given), *prompt(given, drafting.levels)]
    steps = max(new / (drafting.accepted + 1) - 1, 0)
    return seconds(first, machine) + steps * seconds(step(given, drafting.levels), machine)


def _drafts(given: Shapes, levels: float) -> list[Pass]:
    """Trunk, twig and its head on the nodes of every level."""
    p, drafter, caches = given.program, given.weights.drafter, given.state.caches
    if not p.draft or not levels:
        return []
    nodes, slots = p.tree.expanded, p.prompt_slots + p.generated_slots
    trunk = _named(given.weights.base["text"], 0, p.K)
    parts = [
        _layers(given, trunk, caches.trunk, nodes, slots),
        _layers(given, _named(drafter, 0, p.twig.T), caches.twig, nodes, slots),
        _head(given, drafter, nodes),
    ]
    return [Pass(part.flops, part.bytes, levels) for part in parts]


def _named(decoder: Any, first: int, last: int) -> list[Any]:
    return [decoder[f"layers_{i}"] for i in range(first, last)]


def _layers(
    given: Shapes, layers: list[Any], cache: Any, tokens: int, context: float, filled: float = 1
) -> Pass:
    """Layers on `tokens` a row that see `context` slots each. filled: share of the cache read."""
    one = flops.decoder_layer(given.program.base.text, tokens, context)
    return Pass(
        len(layers) * given.rows * one / given.split,
        device_bytes(layers) + filled * device_bytes(cache),
    )


def _head(given: Shapes, decoder: Any, tokens: int) -> Pass:
    """The logits of `tokens` a row."""
    c = given.program.base.text
    return Pass(
        given.rows * flops.head(c, tokens) / given.split,
        # A head tied to the embeddings has no weights of its own.
        device_bytes([decoder["norm"], decoder.get("lm_head", decoder.get("embed_tokens"))]),
    )
