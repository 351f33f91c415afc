"""TwigVLM++'s first stage: the twig also learns from its frozen base (arXiv 2503.14075v3).

L = NTP + α · KL(p_base ‖ p_twig) + γ_a · KL(a_base ‖ s), where p are the next words' probabilities
at the answers' tokens, a_base a deep base layer's attention to visual tokens and s the P-Head's
scores: both are the mean over heads of each head's distribution over the visual tokens that a query
sees. The base teaches in the same step; of its logits and the twig's, [B, S, V] are never there as
a whole.
"""

from collections.abc import Callable
from dataclasses import dataclass
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
    first_of_answers,
    in_chunks,
    trunk,
)

_LEAST = 1e-20  # probabilities below it count as it


@dataclass(frozen=True)
class _Teacher:
    """The frozen base above the trunk."""

    model: Llava
    K: int
    distill: DistillConfig

    def _apply(self, frozen: Params, method: str, *args: Any, **kwargs: Any) -> Any:
        found = self.model.apply({"params": frozen}, *args, method=method, **kwargs)
        return jax.lax.stop_gradient(found)

    def __call__(
        self, frozen: Params, batch: Batch, x: jax.Array, where: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """Where `queries` look among visual tokens in the layer that is learned, float32 [B, Q, S],
        and the last states [B, S, d], from those of the trunk; Q is 0 and the states those of the
        trunk where they are not learned."""
        distill, first = self.distill, self.K
        taught = jnp.zeros((x.shape[0], 0, x.shape[1]))
        if distill.attention:
            layer = distill.layer_of(self.model.config.text.num_layers)
            into, _ = self._apply(frozen, "run", x, *where, first=first, last=layer)
            x, (kv,) = self._apply(frozen, "run", into, *where, first=layer, last=layer + 1)
            slots, visual = _asking(batch, distill, where[1])
            rows = take(into, slots), take(batch["positions"], slots), kv.k, visual
            taught = self._apply(frozen, "attention_rows", layer, *rows).mean(1)
            first = layer + 1
        if distill.prediction:
            x, _ = self._apply(frozen, "run", x, *where, first=first)
        return taught, x

    def words(self, frozen: Params, y: jax.Array) -> jax.Array:
        """Log-probabilities of the next words [B, S, V] from the last states."""
        return jax.nn.log_softmax(self._apply(frozen, "logits", y))


def _teacher(config: LlavaConfig, twig: TwigConfig, distill: DistillConfig) -> _Teacher:
    L = config.text.num_layers
    layer = distill.layer_of(L)
    if distill.attention and not twig.p_head:
        raise ValueError("attention is learned by a P-Head: set p_head, or distill.attention=0")
    if not twig.K <= layer < L:
        raise ValueError(f"distill.layer is from {twig.K} to {L - 1}, above the trunk, not {layer}")
    return _Teacher(Llava(config), twig.K, distill)


def teaching(
    config: LlavaConfig, twig: TwigConfig, distill: DistillConfig, chunk: int
) -> Callable[[Params, Batch], Batch]:
    """A function of the whole base and a batch that gives what `distill_loss` learns from them.

    taught_words int32 and taught_logs float32 [B, S, n]: the n = distill.words likeliest next words
    and their log-probabilities; taught_attention float32 [B, Q, S]. n or Q is 0 where it is not
    learned. Raises ValueError as `distill_loss` does.
    """
    teacher = _teacher(config, twig, distill)

    def teach(frozen: Params, batch: Batch) -> Batch:
        x, where = trunk(teacher.model, frozen, batch, twig.K)
        taught, y = teacher(frozen, batch, x, where)
        n = distill.words if distill.prediction else 0

        def likeliest(y: jax.Array) -> tuple[jax.Array, ...]:
            return tuple(jax.lax.top_k(teacher.words(frozen, y), n))

        logs, words = in_chunks(likeliest, (y,), chunk)
        return {"taught_words": words, "taught_logs": logs, "taught_attention": taught}

    return teach


def distill_loss(
    config: LlavaConfig,
    twig: TwigConfig,
    distill: DistillConfig,
    chunk: int,
    remat: bool = False,
) -> Loss:
    """The loss above; only the twig, P-Head included, trains.

    The base has to be whole, unless a batch has what it teaches, see `teaching`; of the words that
    are not among the n likeliest, KL then takes the sum. Where a batch is taken in parts, each
    counts by its answers' tokens. Raises ValueError for a layer that the base does not have above
    the trunk, and for attention to be learned by a twig without a P-Head.
    """
    teacher, part = _teacher(config, twig, distill), TwigPart(config, twig, remat)

    def loss(params: Params, frozen: Params, batch: Batch) -> tuple[jax.Array, Metrics]:
        x, where = trunk(teacher.model, frozen, batch, twig.K)
        z, _ = part.run(params, x, where, 0, twig.T - 1)
        last, (own,) = part.run(params, z, where, twig.T - 1)
        metrics: Metrics = {}
        total = jnp.float32(0)
        stored = "taught_words" in batch
        if stored:
            taught = batch["taught_attention"]
            theirs: tuple[jax.Array, ...] = batch["taught_words"], batch["taught_logs"]
        else:
            taught, y = teacher(frozen, batch, x, where)
            theirs = (y,)

        if distill.attention:
            slots, visual = _asking(batch, distill, where[1])
            at, gates = take(batch["positions"], slots), part.apply(params, "key_gates", z)
            s = part.apply(params, "visual_scores", take(z, slots), at, own.k, gates, visual)
            found = divergence(taught, s, visual.any(-1))
            metrics["attention_kl"] = found
            total += distill.attention * found[0] / jnp.maximum(found[1], 1)

        def score(z: jax.Array, targets: jax.Array, *theirs: jax.Array) -> tuple[jax.Array, ...]:
            ours = jax.nn.log_softmax(part.apply(params, "logits", z))
            own = jnp.take_along_axis(ours, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
            kl = jnp.zeros_like(own)
            if distill.prediction and stored:
                words, logs = theirs
                kl = of_likeliest(words, logs, ours)
            elif distill.prediction:
                logs = teacher.words(frozen, *theirs)
                kl = (jnp.exp(logs) * (logs - ours)).sum(-1)
            return -own, ours.argmax(-1), kl

        ce, best, kl = in_chunks(score, (last, batch["targets"], *theirs), chunk)
        ntp, of_words = cross_entropy(ce, best, batch)
        valid = batch["targets"] >= 0
        metrics |= of_words
        metrics["cross_entropy"] = jnp.stack([(ce * valid).sum(), valid.sum()])
        if distill.prediction:
            metrics["prediction_kl"] = jnp.stack([(kl * valid).sum(), valid.sum()])
            total += distill.prediction * (kl * valid).sum() / jnp.maximum(valid.sum(), 1)
        return total + ntp, metrics

    return loss


def of_likeliest(words: jax.Array, logs: jax.Array, ours: jax.Array) -> jax.Array:
    """KL [B, S] over the teacher's likeliest words and, as one more, all others together.

    words int32, logs float32 [B, S, n]; ours float32 [B, S, V].
    """
    own = jnp.take_along_axis(ours, words, axis=-1)
    rest, our_rest = (jnp.maximum(1 - jnp.exp(x).sum(-1), _LEAST) for x in (logs, own))
    among = (jnp.exp(logs) * (logs - own)).sum(-1)
    return among + rest * (jnp.log(rest) - jnp.log(our_rest))


def queries(batch: Batch, which: str, most: int) -> jax.Array:
    """The tokens of each row whose attention is learned: int32 [B, Q], S where there are fewer.

    which: "answer", those that predict an answer's first word; "text", all text that asks. The
    first `most` of a row. Raises ValueError for another kind.
    """
    if which == "answer":
        chosen = first_of_answers(batch["targets"])
    elif which == "text":
        chosen = (batch["targets"] < 0) & ~batch["is_visual"] & (batch["segments"] > 0)
    else:
        raise ValueError(f"no distill.queries {which!r}; there are: answer, text")
    return first_of(chosen, min(most, chosen.shape[1]))


def _asking(batch: Batch, distill: DistillConfig, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(`queries` of a batch, visual tokens that each sees, bool [B, Q, S]); mask bool [B, S, S]."""
    slots = queries(batch, distill.queries, distill.most_queries)
    return slots, take(mask, slots) & batch["is_visual"][:, None]


def divergence(target: jax.Array, s: jax.Array, counts: jax.Array) -> jax.Array:
    """(sum, count) of KL(target ‖ s) over queries.

    target, s [B, Q, S], which sum to 1; counts bool [B, Q]: the queries that see a visual token.
    """
    logs = [jnp.log(jnp.maximum(p, _LEAST)) for p in (target, s)]
    kl = (target * (logs[0] - logs[1])).sum(-1)
    return jnp.stack([(kl * counts).sum(), counts.sum()])
