"""What the compiled decoding loop does with memory: bytes a step, copies of caches, collectives.

python -m tests.tools.memory --preset llava-1.5-7b --rows 8 --topology v5e:2x4 --tensor 8
python -m tests.tools.memory --preset digits --dtype float32

Compiles one iteration and the whole loop from shapes alone, for the machine's own device or, with
`jax[tpu]` installed, for a TPU topology ahead of time (JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1), and
prints one JSON line a mode. Exits with 1 where a loop copies a cache.
"""

import collections
import json
import re
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.sharding import AxisType, Mesh, NamedSharding

from twig_jax.config import INT8, MODES
from twig_jax.decoding.buckets import Bucket, program_for
from twig_jax.decoding.loop import decode, iterate
from twig_jax.decoding.network import Program, Weights, drafting_in_int8
from twig_jax.decoding.prefill import Inputs, prefill
from twig_jax.decoding.settings import Settings, controls
from twig_jax.models.int8 import quantised
from twig_jax.models.llava import Llava
from twig_jax.models.twig import init_twig
from twig_jax.presets import preset
from twig_jax.sharding.mesh import AXES
from twig_jax.sharding.placement import partition
from twig_jax.sharding.rules import shardings

COLLECTIVES = "all-reduce all-gather all-to-all reduce-scatter collective-permute".split()


def shapes(program: Program, rows: int, dtype: Any, int8: str | None = None) -> tuple[Weights, Any]:
    """Shapes of the weights and of a state after prefill; nothing is computed."""
    config, p = program.base, program
    size = config.vision.image_size

    def build() -> Weights:
        pixels = jnp.zeros((1, 1, size, size, 3))
        base = Llava(config).init(jax.random.key(0), pixels)["params"]
        base = jax.tree.map(lambda x: x.astype(dtype), base)
        twig = init_twig(base, config.text, p.twig)
        base = quantised(base) if int8 == "all" else base
        return Weights(base, twig) if int8 is None else drafting_in_int8(base, twig)

    weights = jax.eval_shape(build)
    P, d = p.prompt_slots, config.text.hidden_size
    inputs = Inputs(
        tokens=np.zeros((rows, P), np.int32),
        is_visual=np.zeros((rows, P), bool),
        lengths=np.ones(rows, np.int32),
        visual=np.zeros((rows, p.images * config.vision.num_tokens, d), dtype),
        retained=np.ones((rows, len(p.segments)), np.int32),
        scores=np.zeros((rows, P), np.float32),
    )
    cost = np.zeros(p.tree.depth + 1, np.float32)
    state, _ = jax.eval_shape(
        partial(prefill, p), weights, inputs, controls([Settings()] * rows, 2), cost
    )
    return weights, state


def placed(weights: Weights, state: Any, mesh: Mesh) -> tuple[Weights, Any]:
    """The shapes with the shardings that the engine gives them."""

    def struct(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def row(x: Any, *axes: str | None) -> jax.ShapeDtypeStruct:
        return struct(x, NamedSharding(mesh, partition(x.shape, ("rows", *axes), mesh)))

    weights = jax.tree.map(struct, weights, shardings(weights, mesh))
    caches = jax.tree.map(lambda x: row(x, "tensor"), state.caches)
    return weights, jax.tree.map(row, state._replace(caches=()))._replace(caches=caches)


def cache_copies(text: str, caches: Any) -> list[str]:
    """Copy instructions of a compiled program whose result has the shape of a whole cache."""
    names = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
    wanted = set()
    for x in jax.tree.leaves(caches):
        shape = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
        wanted.add(f"{names[x.dtype.name]}[{','.join(map(str, shape))}]")
    found = re.findall(r"= (\w+\[[\d,]*\])\S* copy(?:-start)?\(", text)
    return [shape for shape in found if shape in wanted]


def float_copies(text: str, weights: Any) -> list[str]:
    """Results of a compiled program, outside of fusions, that are int8 kernels made floats."""
    kernels = [x for x in jax.tree.leaves(weights) if x.dtype == jnp.int8]
    sizes = {",".join(map(str, x.sharding.shard_shape(x.shape))) for x in kernels}
    computations = [c for c in text.split("\n\n") if "fus" not in c.split("(")[0]]
    found = re.findall(
        r"= (?:f32|bf16|f16)\[([\d,]+)\]\S* (?:convert|fusion|multiply)\(", "\n".join(computations)
    )
    return [size for size in found if size in sizes]


def bodies(text: str) -> str:
    """What a compiled program's loops run: no entry, and no fusions, whose copies stay on chip."""
    computations = text.split("\nENTRY ")[0].split("\n\n")
    return "\n\n".join(c for c in computations if "fused_computation" not in c.split("(")[0])


def nbytes(tree: Any) -> int:
    """Bytes of a tree of placed shapes on one device."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def measure(
    program: Program, rows: int, dtype: Any, mesh: Mesh, int8: str | None = None
) -> dict[str, Any]:
    """Compiles an iteration and the loop, and reads off what they move."""
    weights, state = placed(*shapes(program, rows, dtype, int8), mesh)
    cost, stop = np.zeros(program.tree.depth + 1, np.float32), np.zeros(rows, bool)
    with jax.set_mesh(mesh):
        once = jax.jit(partial(iterate, program), donate_argnums=1)
        one = once.lower(weights, state, cost).compile()
        loop = (
            jax.jit(decode, static_argnums=0, donate_argnums=2)
            .lower(program, weights, state, stop, cost, 1000)
            .compile()
        )
    cost_of = one.cost_analysis()
    cost_of = cost_of[0] if isinstance(cost_of, list) else cost_of
    memory = loop.memory_analysis()
    text = loop.as_text()
    decoder = {k: v for k, v in weights.base["text"].items() if k != "embed_tokens"}
    used = nbytes(decoder) + nbytes(state.caches)
    if program.draft:
        used += nbytes(weights.drafter)
    return {
        "weights_and_caches_mb": used / 1e6,
        "step_accessed_mb": cost_of["bytes accessed"] / 1e6,
        "accessed_share": cost_of["bytes accessed"] / used,
        "caches_mb": nbytes(state.caches) / 1e6,
        "reused_mb": memory.alias_size_in_bytes / 1e6,
        "temporary_mb": memory.temp_size_in_bytes / 1e6,
        "float_copies": len(float_copies(text, weights)),
        "cache_copies": len(cache_copies(bodies(text), state.caches)),
        "collectives": dict(
            collections.Counter(re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", text))
        ),
    }


def main(argv: list[str]) -> None:
    config, twig = preset(_PRESET.value)
    if _TOPOLOGY.value:
        from jax.experimental import topologies

        found = topologies.get_topology_desc(platform="tpu", topology_name=_TOPOLOGY.value)
        devices = list(found.devices)
    else:
        devices = jax.devices()
    tensor = _TENSOR.value
    grid = np.array(devices[: _DEVICES.value or None]).reshape(-1, 1, tensor)
    mesh = Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)
    M, copies = config.vision.num_tokens, 0
    for mode in _MODES.value:
        settings = Settings(mode=mode, avg_retained=M / 3, adaptive=_ADAPTIVE.value)
        bucket = Bucket(_ROWS.value, _TEXT.value, 1, _NEW.value)
        program = program_for(bucket, settings, config, twig)
        line = measure(program, _ROWS.value, jnp.dtype(_DTYPE.value), mesh, _INT8.value)
        copies += line["cache_copies"]
        shape = {"preset": _PRESET.value, "mesh": list(grid.shape), "rows": _ROWS.value}
        shape["int8"] = _INT8.value
        print(json.dumps({"mode": mode, **shape, **line}), flush=True)
    if copies:
        sys.exit(f"memory: {copies} copies of whole caches inside loops")


if __name__ == "__main__":
    _PRESET = flags.DEFINE_string("preset", "digits", "whose shapes")
    _DTYPE = flags.DEFINE_string("dtype", "bfloat16", "of weights and caches")
    _ROWS = flags.DEFINE_integer("rows", 8, "batch size")
    _TEXT = flags.DEFINE_integer("text", 64, "text slots")
    _NEW = flags.DEFINE_integer("new", 128, "new tokens")
    _MODES = flags.DEFINE_list("modes", list(MODES), "modes to compile")
    _INT8 = flags.DEFINE_enum("int8", None, INT8, "what is in int8")
    _ADAPTIVE = flags.DEFINE_bool("adaptive", False, "with adaptive drafting")
    _TOPOLOGY = flags.DEFINE_string("topology", None, "TPU topology, as in v5e:2x4")
    _TENSOR = flags.DEFINE_integer("tensor", 1, "devices that split heads")
    _DEVICES = flags.DEFINE_integer("devices", 0, "devices to use, 0 for all")
    app.run(main)
