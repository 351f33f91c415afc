"""One table from parameter path to mesh axes, for base, twig and what training keeps beside them.

Megatron's layout: projections into heads and feed-forward units split their outputs over
'tensor', those back to the residual stream split their inputs; the other axis goes to 'fsdp'.
"""

import re
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

RULES: tuple[tuple[str, P], ...] = (
    (r"((q|k|v|gate|up)_proj|lm_head)/kernel", P("fsdp", "tensor")),
    (r"(o|down|out)_proj/kernel", P("tensor", "fsdp")),
    (r"(q|k|v)_proj/bias", P("tensor")),
    (r"(q|k)_gate/kernel", P("fsdp", "tensor")),
    (r"(q|k)_gate/bias", P("tensor")),
    (r"fc1/kernel", P("fsdp", "tensor")),
    (r"fc1/bias", P("tensor")),
    (r"fc2/kernel", P("tensor", "fsdp")),
    (r"(fc2|out_proj)/bias", P()),
    (r"embed_tokens/embedding", P("tensor", "fsdp")),
    (r"linear_1/kernel", P("fsdp", "tensor")),
    (r"linear_1/bias", P("tensor")),
    (r"linear_2/kernel", P("tensor", "fsdp")),
    (r"linear_2/bias", P()),
    (r"(class|patch|position)_embedding", P()),
    (r"[a-z_0-9]*norm[a-z_0-9]*/(scale|bias)", P()),
    (r"count|step", P()),
)


def spec(path: str) -> P:
    """The partition of the parameter at 'a/b/c'; ValueError unless exactly one rule matches."""
    # Transposed kernels, of which those in int8 have a scale for every output.
    if transposed := re.fullmatch(r"(.+/kernel)/(values|scale)", path):
        inputs, outputs = spec(transposed[1])
        return P(outputs, inputs) if transposed[2] == "values" else P(outputs)
    found = [p for pattern, p in RULES if re.search(rf"(^|/)({pattern})$", path)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} sharding rules match the parameter {path}; need one")
    return found[0]


def path_string(path: tuple[Any, ...]) -> str:
    """A jax key path as 'a/b/c'."""
    return "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


def shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """A NamedSharding for every leaf (array or shape) of a parameter tree.

    An axis that does not divide a dimension is left out for that parameter: correct, only less
    spread.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        axes = [
            axis if axis and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(spec(path_string(path)), leaf.shape, strict=False)
        ]
        return NamedSharding(mesh, P(*axes))

    return jax.tree_util.tree_map_with_path(one, tree)
