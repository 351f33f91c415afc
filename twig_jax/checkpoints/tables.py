"""One table between Hugging Face's LLaVA tensors and our parameter tree, read in both directions.

A tensor keeps its values; only its name and the order of its axes change. torch's linear layers
are [out, in] and Flax's kernels [in, out]; its convolutions are [out, channels, rows, columns].
"""

import difflib
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from twig_jax.config import GATES, LlavaConfig, TextConfig, TwigConfig

Params = dict[str, Any]  # nested, leaves are arrays
Shape = tuple[int, ...]

KEEP: tuple[int, ...] | None = None
LINEAR = (1, 0)
CONV = (2, 3, 1, 0)


@dataclass(frozen=True)
class Rule:
    """Their name, our path ({i} is the layer), their shape in letters, the axes in our order."""

    name: str
    path: str
    shape: str
    axes: tuple[int, ...] | None


# V vocabulary, d width, q queries (heads x head width), k keys and values, f feed-forward.
EMBEDDING = Rule("model.embed_tokens.weight", "embed_tokens/embedding", "V d", KEEP)
_LAYER, _OURS = "model.layers.{i}", "layers_{i}"
DECODER = (
    Rule(f"{_LAYER}.input_layernorm.weight", f"{_OURS}/input_layernorm/scale", "d", KEEP),
    Rule(f"{_LAYER}.self_attn.q_proj.weight", f"{_OURS}/q_proj/kernel", "q d", LINEAR),
    Rule(f"{_LAYER}.self_attn.k_proj.weight", f"{_OURS}/k_proj/kernel", "k d", LINEAR),
    Rule(f"{_LAYER}.self_attn.v_proj.weight", f"{_OURS}/v_proj/kernel", "k d", LINEAR),
    Rule(f"{_LAYER}.self_attn.o_proj.weight", f"{_OURS}/o_proj/kernel", "d q", LINEAR),
    Rule(
        f"{_LAYER}.post_attention_layernorm.weight",
        f"{_OURS}/post_attention_layernorm/scale",
        "d",
        KEEP,
    ),
    Rule(f"{_LAYER}.mlp.gate_proj.weight", f"{_OURS}/gate_proj/kernel", "f d", LINEAR),
    Rule(f"{_LAYER}.mlp.up_proj.weight", f"{_OURS}/up_proj/kernel", "f d", LINEAR),
    Rule(f"{_LAYER}.mlp.down_proj.weight", f"{_OURS}/down_proj/kernel", "d f", LINEAR),
    Rule("model.norm.weight", "norm/scale", "d", KEEP),
    Rule("lm_head.weight", "lm_head/kernel", "V d", LINEAR),
)

# Of a P-Head, by its gates: ours, and as it is published.
_GATES = (("q_gate", "q"), ("k_gate", "k"))
P_HEAD = {
    GATES[0]: tuple(
        rule
        for gate, out in _GATES
        for rule in (
            Rule(f"p_head.{gate}.weight", f"p_head/{gate}/kernel", f"{out} d", LINEAR),
            Rule(f"p_head.{gate}.bias", f"p_head/{gate}/bias", out, KEEP),
        )
    ),
    GATES[1]: tuple(
        Rule(f"leaf_attention_module.{gate}.weight", f"p_head/{gate}/kernel", f"{out} d", LINEAR)
        for gate, out in _GATES
    ),
}

# v width, n positions, u feed-forward, c channels, p patch side; d is still the decoder's width.
VISION = (
    Rule("embeddings.class_embedding", "class_embedding", "v", KEEP),
    Rule("embeddings.patch_embedding.weight", "patch_embedding", "v c p p", CONV),
    Rule("embeddings.position_embedding.weight", "position_embedding", "n v", KEEP),
    # Spelled so in every published checkpoint.
    Rule("pre_layrnorm.weight", "pre_layernorm/scale", "v", KEEP),
    Rule("pre_layrnorm.bias", "pre_layernorm/bias", "v", KEEP),
    Rule("post_layernorm.weight", "post_layernorm/scale", "v", KEEP),
    Rule("post_layernorm.bias", "post_layernorm/bias", "v", KEEP),
    *(
        Rule(f"encoder.layers.{{i}}.{norm}.{theirs}", f"layers_{{i}}/{norm}/{ours}", "v", KEEP)
        for norm in ("layer_norm1", "layer_norm2")
        for theirs, ours in (("weight", "scale"), ("bias", "bias"))
    ),
    *(
        rule
        for theirs, ours, out, into in (
            ("self_attn.q_proj", "q_proj", "v", "v"),
            ("self_attn.k_proj", "k_proj", "v", "v"),
            ("self_attn.v_proj", "v_proj", "v", "v"),
            ("self_attn.out_proj", "out_proj", "v", "v"),
            ("mlp.fc1", "fc1", "u", "v"),
            ("mlp.fc2", "fc2", "v", "u"),
        )
        for rule in (
            Rule(
                f"encoder.layers.{{i}}.{theirs}.weight",
                f"layers_{{i}}/{ours}/kernel",
                f"{out} {into}",
                LINEAR,
            ),
            Rule(f"encoder.layers.{{i}}.{theirs}.bias", f"layers_{{i}}/{ours}/bias", out, KEEP),
        )
    ),
)
PROJECTOR = (
    Rule("linear_1.weight", "linear_1/kernel", "d v", LINEAR),
    Rule("linear_1.bias", "linear_1/bias", "d", KEEP),
    Rule("linear_2.weight", "linear_2/kernel", "d d", LINEAR),
    Rule("linear_2.bias", "linear_2/bias", "d", KEEP),
)

# Other spellings of the names above: of the original checkpoints and CLIP's own, of transformers
# before version 5, and of its state dicts. Each tensor has one spelling that none of these matches.
_SPELLINGS = (
    (re.compile(r"^model\.vision_tower\.vision_tower\."), "vision_tower."),
    (re.compile(r"^vision_model\."), "vision_tower."),
    (re.compile(r"^model\.mm_projector\.0\."), "multi_modal_projector.linear_1."),
    (re.compile(r"^model\.mm_projector\.2\."), "multi_modal_projector.linear_2."),
    (re.compile(r"^model\.(?=(embed_tokens|layers|norm)\.)"), "language_model.model."),
    (re.compile(r"^model\.(?=vision_tower\.|multi_modal_projector\.)"), ""),
    (re.compile(r"^model\.language_model\."), "language_model.model."),
    (re.compile(r"^lm_head\."), "language_model.lm_head."),
    (re.compile(r"^vision_tower\.vision_model\."), "vision_tower."),
)
# Constants that some checkpoints store beside the weights.
_CONSTANTS = re.compile(r"\.(rotary_emb\.inv_freq|embeddings\.position_ids)$")


@dataclass(frozen=True)
class Tensor:
    """One tensor: their name and shape, our path, and the order of axes between them."""

    name: str
    path: str
    shape: Shape
    axes: tuple[int, ...] | None

    @property
    def our_shape(self) -> Shape:
        """The shape in our tree."""
        return self.shape if self.axes is None else tuple(self.shape[a] for a in self.axes)

    def to_ours(self, x: np.ndarray) -> np.ndarray:
        """Their array in our order of axes (a view)."""
        return x if self.axes is None else x.transpose(self.axes)

    def to_theirs(self, x: np.ndarray) -> np.ndarray:
        """Our array in their order of axes (a view)."""
        return x if self.axes is None else x.transpose(np.argsort(self.axes))


def _expand(
    rules: Iterable[Rule], layers: int, sizes: Mapping[str, int], name: str = "", path: str = ""
) -> list[Tensor]:
    """The tensors that rules stand for, layer by layer, with prefixes for names and paths."""
    return [
        Tensor(
            name + rule.name.format(i=i),
            path + rule.path.format(i=i),
            tuple(sizes[letter] for letter in rule.shape.split()),
            rule.axes,
        )
        for layered, group in itertools.groupby(rules, lambda rule: "{i}" in rule.name)
        for i, rule in itertools.product(range(layers if layered else 1), tuple(group))
    ]


def _text_sizes(text: TextConfig) -> dict[str, int]:
    return {
        "V": text.vocab_size,
        "d": text.hidden_size,
        "q": text.num_heads * text.head_dim,
        "k": text.num_kv_heads * text.head_dim,
        "f": text.intermediate_size,
    }


def llava_tensors(config: LlavaConfig) -> list[Tensor]:
    """Every tensor of a LLaVA checkpoint, under the names that transformers 5 writes."""
    text, vision = config.text, config.vision
    sizes = _text_sizes(text) | {
        "v": vision.hidden_size,
        "n": vision.num_patches + 1,
        "u": vision.intermediate_size,
        "c": 3,
        "p": vision.patch_size,
    }
    return [
        *_expand(VISION, vision.num_layers, sizes, "vision_tower.", "vision/"),
        *_expand(PROJECTOR, 1, sizes, "multi_modal_projector.", "projector/"),
        *(
            tensor
            for tensor in _expand(
                (EMBEDDING, *DECODER), text.num_layers, sizes, "language_model.", "text/"
            )
            if not (text.tied_head and tensor.path == "text/lm_head/kernel")
        ),
    ]


def twig_tensors(text: TextConfig, twig: TwigConfig) -> list[Tensor]:
    """Every tensor of a twig and its P-Head, under the names of the official checkpoints."""
    p_head = P_HEAD[twig.gate] if twig.p_head else ()
    return _expand(DECODER + p_head, twig.T, _text_sizes(text))


def canonical(names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """({name as `llava_tensors` spells it: name as found}, constants that are not read).

    Raises ValueError where one tensor is there under two spellings.
    """
    found: dict[str, str] = {}
    constants = []
    for name in names:
        if _CONSTANTS.search(name):
            constants.append(name)
            continue
        spelled = name
        for pattern, replacement in _SPELLINGS:
            spelled = pattern.sub(replacement, spelled)
        if spelled in found:
            raise ValueError(f"{found[spelled]} and {name} are the same tensor")
        found[spelled] = name
    return found, constants


_TOLD = 10  # tensors of a kind that a message names


def _nearest(name: str, *pools: Iterable[str]) -> str:
    """A hint at the most similar name in the first pool that has one at all similar."""
    for pool in pools:
        close = difflib.get_close_matches(name, list(pool), n=1)
        if close:
            return f" (nearest: {close[0]})"
    return ""


def check_shapes(expected: Mapping[str, Shape], found: Mapping[str, Shape], where: str) -> None:
    """Raises ValueError that names missing, unexpected and misshaped tensors, ten of each kind."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    misshaped = [name for name in expected if name in found and found[name] != expected[name]]

    def same_layer(name: str, names: Iterable[str]) -> list[str]:
        numbers = re.findall(r"\d+", name)
        return [other for other in names if re.findall(r"\d+", other) == numbers]

    def told_missing(name: str) -> str:
        return f"missing {name}{_nearest(name, same_layer(name, unexpected))}"

    def told_unexpected(name: str) -> str:
        # A name that nothing else claims is the likeliest to have been meant.
        pools = same_layer(name, missing), same_layer(name, expected), expected
        return f"unexpected {name}{_nearest(name, *pools)}"

    def told_misshaped(name: str) -> str:
        return f"{name} has shape {list(found[name])}, expected {list(expected[name])}"

    kinds = ((missing, told_missing), (unexpected, told_unexpected), (misshaped, told_misshaped))
    lines: list[str] = []
    for names, told in kinds:
        lines += map(told, names[:_TOLD])
        if len(names) > _TOLD:
            lines.append(f"and {len(names) - _TOLD} more like that")
    if lines:
        raise ValueError(f"{where} does not fit its configuration:\n  " + "\n  ".join(lines))


def flatten(tree: Params, prefix: str = "") -> dict[str, Any]:
    """A nested tree as {'a/b/c': leaf}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(dict(value), f"{prefix}{key}/")
        else:
            flat[prefix + key] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """The inverse of `flatten`."""
    tree: Params = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree
