"""TwigVLM++'s first stage: the twig also learns from its frozen base (arXiv 2503.14075v3).

L = NTP + α · KL(p_base ‖ p_twig) + γ_a · KL(a_base ‖ s), where p are the next words' probabilities
at the answers' tokens, a_base a deep base layer's attention to visual tokens and s the P-Head's
scores, both as distributions over the visual tokens that a query sees. The base teaches in the same
step; of its logits and the twig's, [B, S, V] are never there as a whole.
"""

from typing import Any

import jax
import jax.numpy as jnp

from twig_jax.config import LlavaConfig, TwigConfig
from twig_jax.models.llava import Llava, Params
from twig_jax.pruning.select import first_of, take
from twig_jax.training.config import DistillConfig
from twig_jax.training.losses import (
    Batch,
    Loss,
    Metrics,
    TwigPart,
    cross_entropy,
    in_chunks,
    trunk,
)

_LEAST = 1e-20  # probabilities below it count as it


def distill_loss(
    config: LlavaConfig,
    twig: TwigConfig,
    distill: DistillConfig,
    chunk: int,
    remat: bool = False,
) -> Loss:
    """The loss above; only the twig, P-Head included, trains, and the base has to be whole.

    Where a batch is taken in parts, each counts by its answers' tokens. Raises ValueError for a
    layer that the base does not have above the trunk, and for attention to be learned by a twig
    without a P-Head.
    """
    L = config.text.num_layers
    layer = distill.layer_of(L)
    if distill.attention and not twig.p_head:
        raise ValueError("attention is learned by a P-Head: set p_head, or distill.attention=0")
    if not twig.K <= layer < L:
        raise ValueError(f"distill.layer is from {twig.K} to {L - 1}, above the trunk, not {layer}")
    model, part = Llava(config), TwigPart(config, twig, remat)

    def teacher(frozen: Params, method: str, *args: Any, **kwargs: Any) -> Any:
        return jax.lax.stop_gradient(
            model.apply({"params": frozen}, *args, method=method, **kwargs)
        )

    def loss(params: Params, frozen: Params, batch: Batch) -> tuple[jax.Array, Metrics]:
        x, where = trunk(model, frozen, batch, twig.K)
        z, _ = part.run(params, x, where, 0, twig.T - 1)
        last, (own,) = part.run(params, z, where, twig.T - 1)
        y = x
        metrics: Metrics = {}
        total = jnp.float32(0)

        if distill.attention:
            y, _ = teacher(frozen, "run", y, *where, first=twig.K, last=layer)
            into = y
            y, (kv,) = teacher(frozen, "run", y, *where, first=layer, last=layer + 1)
            slots = queries(batch, distill.queries, distill.most_queries)
            at = take(batch["positions"], slots)
            sees = take(where[1], slots)  # [B, Q, S]
            visual = sees & batch["is_visual"][:, None]
            asked = (take(into, slots), at, kv.k, sees)
            taught = teacher(frozen, "attention_rows", layer, *asked).mean(1)
            gates = part.apply(params, "key_gates", z)
            s = part.apply(params, "visual_scores", take(z, slots), at, own.k, gates, visual)
            found = divergence(jnp.where(visual, taught, 0), s, visual.any(-1))
            metrics["attention_kl"] = found
            total += distill.attention * found[0] / jnp.maximum(found[1], 1)

        if distill.prediction:
            first = layer + 1 if distill.attention else twig.K
            y, _ = teacher(frozen, "run", y, *where, first=first)

        def score(z: jax.Array, y: jax.Array, targets: jax.Array) -> tuple[jax.Array, ...]:
            ours = jax.nn.log_softmax(part.apply(params, "logits", z))
            own = jnp.take_along_axis(ours, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
            kl = jnp.zeros_like(own)
            if distill.prediction:
                theirs = jax.nn.log_softmax(teacher(frozen, "logits", y))
                kl = (jnp.exp(theirs) * (theirs - ours)).sum(-1)
            return -own, ours.argmax(-1), kl

        ce, best, kl = in_chunks(score, (last, y, batch["targets"]), chunk)
        ntp, of_words = cross_entropy(ce, best, batch)
        valid = batch["targets"] >= 0
        metrics |= of_words
        metrics["cross_entropy"] = jnp.stack([(ce * valid).sum(), valid.sum()])
        if distill.prediction:
            metrics["prediction_kl"] = jnp.stack([(kl * valid).sum(), valid.sum()])
            total += distill.prediction * (kl * valid).sum() / jnp.maximum(valid.sum(), 1)
        return total + ntp, metrics

    return loss


def queries(batch: Batch, which: str, most: int) -> jax.Array:
    """The tokens of each row whose attention is learned: int32 [B, Q], S where there are fewer.

    which: "answer", those that predict an answer's first word; "text", all text that asks. The
    first `most` of a row. Raises ValueError for another kind.
    """
    answers = batch["targets"] >= 0
    if which == "answer":
        chosen = answers & ~jnp.pad(answers, ((0, 0), (1, 0)))[:, :-1]
    elif which == "text":
        chosen = ~answers & ~batch["is_visual"] & (batch["segments"] > 0)
    else:
        raise ValueError(f"no distill.queries {which!r}; there are: answer, text")
    return first_of(chosen, min(most, chosen.shape[1]))


def divergence(target: jax.Array, s: jax.Array, counts: jax.Array) -> jax.Array:
    """(sum, count) of KL(target ‖ s) over queries.

    target [B, Q, S], brought to sum 1 here; s [B, Q, S], which sums to 1; counts bool [B, Q]: the
    queries that see a visual token.
    """
    target = target / jnp.maximum(target.sum(-1, keepdims=True), _LEAST)
    logs = [jnp.log(jnp.maximum(p, _LEAST)) for p in (target, s)]
    kl = (target * (logs[0] - logs[1])).sum(-1)
    return jnp.stack([(kl * counts).sum(), counts.sum()])
