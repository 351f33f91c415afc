"""Random weights at any size whose drafts are accepted as often as asked.

Speed depends on shapes and on which drafts are accepted, not on what the weights have learned. So a
base is drawn whose likeliest token after token u is u + 1: its head's columns are its embeddings,
moved by one, and its layers' branches are damped, so that a state remembers its token. Answers then
run through the whole vocabulary, where those of other random weights soon go round in circles of a
few tokens. The twig is copied from the base as ever, but for an error in its head:

    head = β (W / d + ρ N / sqrt(d)),   W [d, V] the base's head, N standard normal

β is about the logit of the right token, and ρ · β the standard deviation of each logit's error. ρ
decides how often another token wins, β how far a draft's probability is from θ, so that a draft
that may be wrong is one that the twig doubts, as with trained twigs. Both are found by measuring.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from twig_jax.config import LlavaConfig, TwigConfig
from twig_jax.decoding.generate import Generator
from twig_jax.decoding.settings import Request, Settings
from twig_jax.evaluation.scoring import acceptance
from twig_jax.models.int8 import quantised
from twig_jax.models.llava import Params, init_base
from twig_jax.models.twig import init_twig

# Mean drafted length where none is asked for, by TokAR. The paper prints 57.4 % and no length: with
# 1.4 drafts its speed-up by drafting alone, 146.7 % on answers of about 100 tokens, is what
# `scoring.ceiling` gives with a prefill of two plain steps. Nothing published stands beside 80 %.
LENGTHS = {0.574: 1.4, 0.8: 2.5}
TOLERANCE = (0.01, 0.05)  # of TokAR and of drafts an iteration
_MOST = 40  # measurements
_DAMPING = 0.2


@dataclass(frozen=True)
class Calibration:
    """What was asked for and what was reached, in one batch of drafted answers."""

    asked_tokar: float
    asked_drafted: float
    tokar: float
    mean_drafted: float
    mean_accepted: float
    drafts: int  # that these figures are over
    measurements: int
    error: float  # ρ
    logit: float  # β


def draw(
    config: LlavaConfig,
    twig_config: TwigConfig,
    weights: str,
    dtype: str,
    requests: Sequence[Request],
    settings: Settings,
    *,
    int8: str | None = None,
) -> tuple[Generator, Calibration | None]:
    """A model with weights "random", "calibrated:TOKAR[:DRAFTS]" or "mistaken:ERROR:LOGIT".

    The last is with the ρ and β that an earlier calibration found. requests: that a twig is
    calibrated on. settings: γ and θ there, and how long answers are; they are longer where that
    would be too little to tell a share from. int8: as for `twig_jax.load`. Raises ValueError for
    other weights, and as `target`, `draw_base` and `calibrate` do.
    """
    kind, _, asked = weights.partition(":")
    reached, mistakes = None, None
    if kind == "calibrated":
        reached = target(asked)
    elif kind == "mistaken" and len(numbers := _numbers(asked)) == 2:
        mistakes = numbers
    elif weights != "random":
        raise ValueError(
            "weights are random, calibrated:TOKAR[:DRAFTS] or mistaken:ERROR:LOGIT, "
            f"not {weights!r}"
        )
    base = draw_base(config, dtype)
    if reached is None:
        twig = init_twig(base, config.text, twig_config)
        if mistakes is not None:
            head = _mistaken(base["text"]["lm_head"]["kernel"], *mistakes)
            twig = {**twig, "lm_head": {"kernel": head}}
        return _generator(config, base, twig_config, twig, int8), None
    new = max(settings.max_new_tokens, -(-1000 // len(requests)))
    drafted = replace(settings, mode="ssd", max_new_tokens=new, min_new_tokens=new)
    return calibrate(config, base, twig_config, requests, drafted, reached, int8=int8)


def _generator(
    config: LlavaConfig, base: Params, twig_config: TwigConfig, twig: Params, int8: str | None
) -> Generator:
    base = quantised(base) if int8 == "all" else base
    return Generator(config, base, twig_config, twig, int8_drafts=int8 is not None)


def _numbers(text: str) -> list[float]:
    """Those between colons; none where anything there is not one."""
    try:
        return [float(part) for part in text.split(":")]
    except ValueError:
        return []


def target(text: str) -> tuple[float, float]:
    """(TokAR, drafts an iteration) of "TOKAR" or "TOKAR:DRAFTS"; ValueError for what is neither."""
    tokar, _, drafted = text.partition(":")
    try:
        rate = float(tokar)
        length = float(drafted) if drafted else LENGTHS[rate]
    except (ValueError, KeyError):
        known = ", ".join(f"{rate:g}" for rate in LENGTHS)
        raise ValueError(
            f"calibrated takes TOKAR:DRAFTS, as 0.6:2, or one of {known} alone, not {text!r}"
        ) from None
    if not (0 < rate < 1 and length > 1):
        raise ValueError(f"TokAR lies between 0 and 1, and drafts above 1, not {text!r}")
    return rate, length


def draw_base(config: LlavaConfig, dtype: str) -> Params:
    """A random base as above, drawn tensor by tensor: its peak is one in float32 beside the tree.

    Raises ValueError for a head tied to the embeddings.
    """
    if config.text.tied_head:
        raise ValueError("weights are drawn for models with a head of their own")
    shapes = jax.eval_shape(lambda key: init_base(config, key), jax.random.key(0))
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)

    def leaf(number: int, path: tuple[Any, ...], shape: tuple[int, ...]) -> jax.Array:
        names = [key.key for key in path]
        if names[-1] in ("scale", "bias"):
            return jnp.full(shape, names[-1] == "scale", dtype)
        scale = 1.0 if names[-1] == "embedding" else shape[0] ** -0.5
        if names[0] == "text" and names[-2] in ("o_proj", "down_proj"):
            scale *= _DAMPING
        return _normal(jax.random.key(number), scale, shape, dtype)

    drawn = [leaf(i, path, x.shape) for i, (path, x) in enumerate(leaves)]
    base = jax.tree.unflatten(tree, drawn)
    base["text"]["lm_head"]["kernel"] = _following(base["text"]["embed_tokens"]["embedding"])
    return base


def calibrate(
    config: LlavaConfig,
    base: Params,
    twig_config: TwigConfig,
    requests: Sequence[Request],
    settings: Settings,
    asked: tuple[float, float],
    *,
    int8: str | None = None,
) -> tuple[Generator, Calibration]:
    """The base with a twig that reaches `asked`, (TokAR, drafts an iteration), on the requests.

    settings: of a mode that drafts chains; long answers of several rows measure well. int8: as for
    `twig_jax.load`. Raises ValueError where no twig reaches it within TOLERANCE.
    """
    if not settings.draft or settings.children > 1:
        raise ValueError("calibration needs settings that draft a chain")
    kernel = base["text"]["lm_head"]["kernel"]
    twig = init_twig(base, config.text, twig_config)
    # An error of one in V logits, the largest of them, that is as large as the right logit.
    error = 1 / math.sqrt(2 * math.log(config.text.vocab_size))
    x = np.log([error, 4 / error])
    steps, before = np.array([0.15, 0.4]), np.zeros(2)
    found: Calibration | None = None
    for measurement in range(1, _MOST + 1):
        error, logit = np.exp(x).tolist()
        head = {"kernel": _mistaken(kernel, error, logit)}
        generator = _generator(config, base, twig_config, {**twig, "lm_head": head}, int8)
        results = generator.generate(requests, settings)
        told = acceptance(results)
        drafts = sum(len(d) for r in results for d in r.drafts)
        found = Calibration(
            *asked, told.tokar, told.drafted, told.accepted, drafts, measurement, error, logit
        )
        # A higher share needs a smaller error, more drafts a larger logit.
        off = np.array([told.tokar - asked[0], asked[1] - told.drafted])
        way = np.sign(off) * (np.abs(off) > TOLERANCE)
        if not way.any():
            return generator, found
        # Resilient steps (Riedmiller and Braun 1993): half as long after a change of sides.
        steps *= np.where(way * before < 0, 0.5, np.where(way * before > 0, 1.2, 1))
        before = np.where(way, way, before)
        x += way * steps
    assert found is not None
    raise ValueError(
        f"no twig with TokAR {asked[0]:g} and {asked[1]:g} drafts an iteration was found at "
        f"γ = {settings.gamma} and θ = {settings.theta:g}: the last of {_MOST} had "
        f"{found.tokar:.3f} and {found.mean_drafted:.2f} over {found.drafts} drafts"
    )


@partial(jax.jit, static_argnums=(2, 3))
def _normal(key: jax.Array, scale: float, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return (scale * jax.random.normal(key, shape)).astype(dtype)


@jax.jit
def _following(embedding: jax.Array) -> jax.Array:
    """The head [d, V] that answers every token with the next one."""
    return jnp.roll(embedding, 1, axis=0).T


@jax.jit
def _mistaken(kernel: jax.Array, error: float, logit: float) -> jax.Array:
    """The head above; the same N at every call, so that more error only adds mistakes."""
    d = kernel.shape[0]
    noise = jax.random.normal(jax.random.key(0), kernel.shape)
    head = logit * (kernel.astype(jnp.float32) / d + error * noise / d**0.5)
    return head.astype(kernel.dtype)
