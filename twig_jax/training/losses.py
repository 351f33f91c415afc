"""Losses of the three stages. Each is loss(trained, frozen, batch) -> (loss, metrics).

A batch is what `data.pipeline` yields: a prefix of P0 tokens with the page, shared by blocks of
questions and answers. A block attends to the prefix through its keys and values, exactly as
decoding attends to a prompt's cache, and to itself; questions inside a block do not see each other.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from twig_jax.config import LlavaConfig, TwigConfig
from twig_jax.data.questions import KINDS
from twig_jax.models.llava import Llava, Params
from twig_jax.models.twig import twig_decoder

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]  # (sum, count) pairs
Loss = Callable[[Params, Params, Batch], tuple[jax.Array, Metrics]]
Run = Callable[..., tuple[jax.Array, Any]]


def _inputs(model: Llava, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Visual embeddings [B, M, d], those of the prefix [B, P0, d] and of the blocks [B·n, S, d]."""
    apply = {"params": params}
    visual = model.apply(apply, batch["pixels"], method="encode")
    prefix = model.apply(apply, batch["prefix"], batch["prefix_visual"], visual, method="merge")
    tokens = rearrange(batch["tokens"], "B n S -> (B n) S")
    return visual, prefix, model.apply(apply, tokens, method="embed")


def _run(
    run: Run, prefix: jax.Array, blocks: jax.Array, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """A range of layers over prefix and blocks; `run` is a bound `Decoder.run`."""
    B, P0, _ = prefix.shape
    positions = jnp.broadcast_to(jnp.arange(P0), (B, P0))
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((P0, P0), bool)), (B, P0, P0))
    prefix, kvs = run(prefix, positions, causal)
    n, S = batch["tokens"].shape[1:]
    segments = rearrange(batch["segments"], "B n S -> (B n) S")
    mask = (segments[:, :, None] == segments[:, None, :]) & jnp.tril(jnp.ones((S, S), bool))
    blocks, _ = run(
        blocks,
        rearrange(batch["positions"], "B n S -> (B n) S"),
        mask,
        cached=jax.tree.map(lambda x: repeat(x, "B K P D -> (B n) K P D", n=n), kvs),
        cached_mask=jnp.ones((B * n, S, P0), bool),
    )
    return prefix, blocks


def _cross_entropy(
    logits: jax.Array, batch: Batch, weight: jax.Array | float = 1.0
) -> tuple[jax.Array, Metrics]:
    """Mean cross-entropy over the answers' tokens, and accuracies as (sum, count) pairs."""
    targets = rearrange(batch["targets"], "B n S -> (B n) S")
    content = rearrange(batch["content"], "B n S -> (B n) S")
    kinds = rearrange(batch["kinds"], "B n S -> (B n) S")
    valid = targets >= 0
    log_p = jax.nn.log_softmax(logits, axis=-1)
    ce = -jnp.take_along_axis(log_p, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    w = jnp.where(content, weight, 1.0) * valid
    right = (logits.argmax(-1) == targets) & valid
    metrics = {
        "accuracy": jnp.stack([right.sum(), valid.sum()]),
        "content_accuracy": jnp.stack([(right & content).sum(), (valid & content).sum()]),
    }
    first = jnp.concatenate([jnp.ones_like(valid[:, :1]), ~valid[:, :-1]], axis=1) & valid
    for i, name in enumerate(KINDS):
        of_kind = first & (kinds == i)
        metrics[f"first/{name}"] = jnp.stack([(right & of_kind).sum(), of_kind.sum()])
    return (ce * w).sum() / w.sum(), metrics


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
        visual = model.apply({"params": params}, batch["pixels"], method="encode")
        words = params["text"]["embed_tokens"]["embedding"]
        return _naming(visual, words, batch["patch_words"])

    return loss


def base_loss(config: LlavaConfig, content_weight: float, naming_weight: float) -> Loss:
    """Next-token cross-entropy on the answers, and the warm-up's loss; everything trains."""
    model = Llava(config)

    def loss(params: Params, frozen: Params, batch: Batch) -> tuple[jax.Array, Metrics]:
        def run(*args: Any, **kwargs: Any) -> Any:
            return model.apply({"params": params}, *args, method="run", **kwargs)

        visual, prefix, blocks = _inputs(model, params, batch)
        _, blocks = _run(run, prefix, blocks, batch)
        logits = model.apply({"params": params}, blocks, method="logits")
        ce, metrics = _cross_entropy(logits, batch, content_weight)
        words = params["text"]["embed_tokens"]["embedding"]
        naming, named = _naming(visual, words, batch["patch_words"])
        return ce + naming_weight * naming, metrics | named | {"cross_entropy": ce}

    return loss


def twig_loss(config: LlavaConfig, twig: TwigConfig) -> Loss:
    """Next-token cross-entropy of trunk + twig on the answers; only the twig trains."""
    model, decoder = Llava(config), twig_decoder(config.text, twig)

    def loss(params: Params, frozen: Params, batch: Batch) -> tuple[jax.Array, Metrics]:
        def trunk(*args: Any, **kwargs: Any) -> Any:
            return model.apply({"params": frozen}, *args, last=twig.K, method="run", **kwargs)

        def branch(*args: Any, **kwargs: Any) -> Any:
            return decoder.apply({"params": params}, *args, method="run", **kwargs)

        _, prefix, blocks = _inputs(model, frozen, batch)
        prefix, blocks = jax.lax.stop_gradient(_run(trunk, prefix, blocks, batch))
        _, blocks = _run(branch, prefix, blocks, batch)
        return _cross_entropy(decoder.apply({"params": params}, blocks, method="logits"), batch)

    return loss
