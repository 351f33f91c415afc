"""Losses of the three stages. Each is loss(trained, frozen, batch) -> (loss, metrics).

The metric `weight` is what the loss is a mean over: the weight of all targets of the batch.

A batch is what `data.pipeline` or `data.instruct` yields: rows of several samples that do not see
each other, in which some tokens may be shared by all (`packing.SHARED`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from twig_jax.config import LlavaConfig, TwigConfig
from twig_jax.data.packing import SHARED
from twig_jax.data.questions import KINDS
from twig_jax.models.attention import KV
from twig_jax.models.llava import Llava, Params
from twig_jax.models.twig import twig_decoder

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]  # (sum, count) pairs, and sums over the batch
Loss = Callable[[Params, Params, Batch], tuple[jax.Array, Metrics]]


def normalised(config: LlavaConfig, pixels: jax.Array) -> jax.Array:
    """Pixels of a batch, uint8 [..., 3], as the vision tower reads them, float32.

    On the device: as bytes they are copied in a quarter of the time.
    """
    mean, std = jnp.array(config.vision.image_mean), jnp.array(config.vision.image_std)
    return (pixels.astype(jnp.float32) / 255 - mean) / std


def _embed(model: Llava, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Visual embeddings [B, I·M, d] and those of all tokens [B, S, d]."""
    apply = {"params": params}
    # Without the cast, float32 pixels would make a bfloat16 tower compute in float32.
    dtype = params["projector"]["linear_1"]["kernel"].dtype
    pixels = normalised(model.config, batch["pixels"]).astype(dtype)
    visual = model.apply(apply, pixels, method="encode")
    merged = model.apply(apply, batch["tokens"], batch["is_visual"], visual, method="merge")
    return visual, merged


def seen(segments: jax.Array) -> jax.Array:
    """Which tokens each token of a row sees: bool [B, S, S] for segments int32 [B, S].

    Itself and the earlier ones of its own segment and of the shared one; padding (0) sees none.
    """
    query, key = segments[:, :, None], segments[:, None, :]
    causal = jnp.tril(jnp.ones((segments.shape[1],) * 2, bool))
    return causal & (query != 0) & ((query == key) | (key == SHARED))


def in_chunks(
    score: Callable[..., tuple[jax.Array, ...]], arrays: tuple[jax.Array, ...], chunk: int
) -> tuple[jax.Array, ...]:
    """score(*arrays), whose results are all [B, S, ...], for arrays [B, S, ...].

    It runs on `chunk` tokens of each row at a time, again in the backward pass, so that what is
    there once a token and word, [B, S, V], is never there as a whole.
    """
    S = arrays[0].shape[1]
    if chunk >= S:
        return score(*arrays)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, -S % chunk)] + [(0, 0)] * (x.ndim - 2))
        return rearrange(x, "B (n c) ... -> n B c ...", c=chunk)

    found = jax.lax.map(lambda part: jax.checkpoint(score)(*part), tuple(map(split, arrays)))
    return tuple(rearrange(y, "n B c ... -> B (n c) ...")[:, :S] for y in found)


def _score(
    head: Callable[[jax.Array], jax.Array], x: jax.Array, targets: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy (float32) of the targets under head(x), and the best words; both [B, S].

    x [B, S, d], targets int32 [B, S]; chunk as in `in_chunks`.
    """

    def score(x: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = head(x)
        own = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - own, logits.argmax(-1)

    ce, best = in_chunks(score, (x, targets), chunk)
    return ce, best


def first_of_answers(targets: jax.Array) -> jax.Array:
    """Which targets int32 [B, S] are an answer's first, -1 standing for none."""
    answers = targets >= 0
    return answers & ~jnp.pad(answers, ((0, 0), (1, 0)))[:, :-1]


def cross_entropy(
    ce: jax.Array, best: jax.Array, batch: Batch, weight: jax.Array | float = 1.0
) -> tuple[jax.Array, Metrics]:
    """Mean of `_score`'s cross-entropy over the answers' tokens; accuracies as (sum, count)."""
    targets = batch["targets"]
    valid = targets >= 0
    right = (best == targets) & valid
    metrics = {"accuracy": jnp.stack([right.sum(), valid.sum()])}
    w = valid.astype(jnp.float32)
    if "content" in batch:
        content, kinds = batch["content"], batch["kinds"]
        w *= jnp.where(content, weight, 1.0)
        metrics["content_accuracy"] = jnp.stack([(right & content).sum(), (valid & content).sum()])
        first = first_of_answers(targets)
        for i, name in enumerate(KINDS):
            of_kind = first & (kinds == i)
            metrics[f"first/{name}"] = jnp.stack([(right & of_kind).sum(), of_kind.sum()])
    metrics["weight"] = w.sum()
    # A batch may hold no answer at all, where the data have ended.
    return (ce * w).sum() / jnp.maximum(w.sum(), 1.0), metrics


def _naming(visual: jax.Array, words: jax.Array, targets: jax.Array) -> tuple[jax.Array, Metrics]:
    """Every visual embedding names its digit, place, shade and size.

    visual [B, M, d], word embeddings [V, d], targets int32 [B, M, 5]. The names are scored with the
    decoder's own word embeddings, so that the projector is aligned with the words it will be asked
    about.
    """
    # A token that equals the sum of its words scores 10 for each of them.
    scale = 10 / jax.lax.stop_gradient(jnp.mean(jnp.sum(jnp.square(words), axis=-1)))
    logits = jnp.einsum("BMd,Vd->BMV", visual, words) * scale
    # Each name is weighed against the words that do not name this token, not the others that do.
    named = jax.nn.one_hot(jnp.maximum(targets, 0), words.shape[0], dtype=bool)
    named = (named & (targets >= 0)[..., None]).any(2)
    others = jax.nn.logsumexp(logits, axis=-1, where=~named)
    best_other = jnp.where(named, -jnp.inf, logits).max(-1)
    inked = targets[..., 3] >= 0
    metrics, total = {}, jnp.float32(0)
    for g, name in enumerate(("digit", "row", "column", "shade", "size")):
        target = targets[..., g]
        own = jnp.take_along_axis(logits, jnp.maximum(target, 0)[..., None], axis=-1)[..., 0]
        # Blank tokens are most of a page and soon known; the inked ones carry the digits.
        w = (target >= 0) * jnp.where(inked, 4.0, 1.0)
        ce = ((jnp.logaddexp(others, own) - own) * w).sum() / w.sum()
        total += ce * (4.0 if name == "digit" else 1.0)  # by far the hardest of the five
        metrics[f"ink/{name}"] = jnp.stack([((own > best_other) & inked).sum(), inked.sum()])
    return total, metrics


def vision_loss(config: LlavaConfig) -> Loss:
    """Warm-up of vision tower, projector and word embeddings: visual tokens name what they show."""
    model = Llava(config)

    def loss(params: Params, frozen: Params, batch: Batch) -> tuple[jax.Array, Metrics]:
        pixels = normalised(config, batch["pixels"])
        visual = model.apply({"params": params}, pixels, method="encode")
        words = params["text"]["embed_tokens"]["embedding"]
        naming, metrics = _naming(visual, words, batch["patch_words"])
        return naming, metrics | {"weight": jnp.float32(batch["patch_words"].shape[0])}

    return loss


def base_loss(config: LlavaConfig, chunk: int, content_weight: float, naming_weight: float) -> Loss:
    """Next-token cross-entropy on the answers, and the warm-up's loss; everything trains."""
    model = Llava(config)

    def loss(params: Params, frozen: Params, batch: Batch) -> tuple[jax.Array, Metrics]:
        apply = {"params": params}
        visual, x = _embed(model, params, batch)
        x, _ = model.apply(apply, x, batch["positions"], seen(batch["segments"]), method="run")

        def head(x: jax.Array) -> jax.Array:
            return model.apply(apply, x, method="logits")

        ce, metrics = cross_entropy(
            *_score(head, x, batch["targets"], chunk), batch, content_weight
        )
        words = params["text"]["embed_tokens"]["embedding"]
        naming, named = _naming(visual, words, batch["patch_words"])
        w = metrics["weight"]
        metrics |= named | {"cross_entropy": jnp.stack([ce * w, w])}
        return ce + naming_weight * naming, metrics

    return loss


def twig_loss(config: LlavaConfig, twig: TwigConfig, chunk: int, remat: bool = False) -> Loss:
    """Next-token cross-entropy of trunk + twig on the answers; only the twig trains.

    Everything is computed in the type of the frozen base, with the twig's parameters and their
    gradients in the type they have. remat: the backward pass computes the twig's layers again.
    """
    model, part = Llava(config), TwigPart(config, twig, remat)

    def loss(params: Params, frozen: Params, batch: Batch) -> tuple[jax.Array, Metrics]:
        x, where = trunk(model, frozen, batch, twig.K)
        x, _ = part.run(params, x, where)
        logits = partial(part.apply, params, "logits")
        return cross_entropy(*_score(logits, x, batch["targets"], chunk), batch)

    return loss


def twig_agreement(
    config: LlavaConfig, twig: TwigConfig, chunk: int
) -> Callable[[Params, Params, Batch], jax.Array]:
    """A function of twig, whole base and batch: on how many targets their best words agree.

    What it gives is (sum, count); the share is TokAR as it is to be expected of drafts.
    """
    model, part = Llava(config), TwigPart(config, twig)

    def agreement(params: Params, frozen: Params, batch: Batch) -> jax.Array:
        def head(x: jax.Array) -> jax.Array:
            return model.apply({"params": frozen}, x, method="logits")

        x, where = trunk(model, frozen, batch, twig.K)
        targets = batch["targets"]
        y, _ = part.run(params, x, where)
        _, drafted = _score(partial(part.apply, params, "logits"), y, targets, chunk)
        x, _ = model.apply({"params": frozen}, x, *where, first=twig.K, method="run")
        _, said = _score(head, x, targets, chunk)
        return jnp.stack([((drafted == said) & (targets >= 0)).sum(), (targets >= 0).sum()])

    return agreement


def trunk(
    model: Llava, frozen: Params, batch: Batch, K: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """What the twig reads: the states after base layer K - 1, and the positions and mask."""
    _, x = _embed(model, frozen, batch)
    where = batch["positions"], seen(batch["segments"])
    x, _ = model.apply({"params": frozen}, x, *where, last=K, method="run")
    return jax.lax.stop_gradient(x), where


@dataclass(frozen=True)
class TwigPart:
    """The twig as losses call it, computed in the type of what it reads.

    remat: the backward pass computes its layers again.
    """

    config: LlavaConfig
    twig: TwigConfig
    remat: bool = False

    def apply(self, params: Params, method: str, x: jax.Array, *args: Any, **kwargs: Any) -> Any:
        """A method of the twig."""
        # Cast where they are used: gradients of several uses then add up in their own type.
        cast = jax.tree.map(lambda p: p.astype(x.dtype), params)
        decoder = twig_decoder(self.config.text, self.twig)
        return decoder.apply({"params": cast}, x, *args, method=method, **kwargs)

    def run(
        self,
        params: Params,
        x: jax.Array,
        where: tuple[jax.Array, jax.Array],
        first: int = 0,
        last: int | None = None,
    ) -> tuple[jax.Array, tuple[KV, ...]]:
        """Layers first .. last-1, as `Decoder.run`; where: positions and mask."""
        kvs: tuple[KV, ...] = ()
        for t in range(self.twig.T)[first:last]:

            def layer(params: Params, x: jax.Array, t: int = t) -> Any:
                return self.apply(params, "run", x, *where, first=t, last=t + 1)

            x, kv = (jax.checkpoint(layer) if self.remat else layer)(params, x)
            kvs += kv
        return x, kvs
