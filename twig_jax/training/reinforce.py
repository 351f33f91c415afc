"""TwigVLM++'s second stage: the P-Head learns from what prunings do to answers (GRPO).

For every question G prunings are drawn from the P-Head's scores (Plackett-Luce, see
pruning/sampling.py), and each is rewarded with the mean log-probability that the pruned base gives
to the known answer. How much better than the others of its question a pruning is, in standard
deviations, is what its log-probability is weighed with (arXiv 2503.14075v3, section 3.5):

    A_g = (r_g − mean r) / std r        loss = −mean over g of A_g · log π(a_g)

There is one step on each draw, so nothing has to be clipped. Trunk and twig run once a row; only
the deep layers run once a pruning, on the text and the tokens kept alone.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from twig_jax.config import LlavaConfig, TwigConfig
from twig_jax.data.packing import SHARED
from twig_jax.models.llava import Llava, Params
from twig_jax.pruning.budget import retained
from twig_jax.pruning.sampling import draw, log_probability
from twig_jax.pruning.select import first_of, take
from twig_jax.training.config import ReinforceConfig
from twig_jax.training.losses import Batch, Metrics, TwigPart, first_of_answers, in_chunks, trunk

_LEAST = 1e-20  # scores below it count as it


class _Asked(NamedTuple):
    """The questions of a batch's rows, A of each; slots are those of the rows, S where unused."""

    states: jax.Array  # [B, S, d], after layer K - 1
    s: jax.Array  # float32 [B, A, S], the P-Head's scores
    began: jax.Array  # float32 [B, A, S], those it began with
    visible: jax.Array  # bool [B, A, S], the visual tokens that a question sees
    text: jax.Array  # int32 [B, A, N], slots of the text it sees, and of its own
    targets: jax.Array  # int32 [B, A, N], the next token where it is an answer's, else -1
    counts: jax.Array  # int32 [B, A], R; 0 where there is no question, image or answer


def budget_at(config: ReinforceConfig, seed: int, step: int, steps: int) -> float:
    """R̄ of a step, the same on all hosts: P(i) ∝ exp(−β·(t/T)²·i) over the ascending budgets."""
    i = np.arange(len(config.budgets))
    p = np.exp(-config.beta * (step / steps) ** 2 * i)
    rng = np.random.default_rng([seed, step])
    return float(rng.choice(config.budgets, p=p / p.sum()))


def policy_loss(
    pi: jax.Array, rewards: jax.Array, least_spread: float
) -> tuple[jax.Array, jax.Array]:
    """(loss of each question [..., A], whether its group teaches anything, bool [..., A]).

    pi, rewards float32 [..., G, A]: log π of its actions, which alone have gradients, and r. A
    group teaches nothing where its rewards' standard deviation is not above least_spread.
    """
    mean, spread = rewards.mean(-2, keepdims=True), rewards.std(-2, keepdims=True)
    useful = spread > least_spread
    advantage = jnp.where(useful, (rewards - mean) / jnp.where(useful, spread, 1), 0)
    return -(advantage * pi).mean(-2), useful[..., 0, :]


@dataclass(frozen=True)
class Reinforcement:
    """The losses at a budget of R̄ = average; only the P-Head trains.

    frozen has, beside the base, the P-Head that the run began with, `p_head`. chunk: tokens whose
    logits are there at one time. Raises ValueError where the budget has no solution, where there is
    no P-Head, and where the actions do not split into equal parts.
    """

    config: LlavaConfig
    twig: TwigConfig
    reinforce: ReinforceConfig
    average: float
    chunk: int

    def __post_init__(self) -> None:
        G, part = self.reinforce.actions, self.reinforce.at_a_time
        if not self.twig.p_head:
            raise ValueError("what is reinforced is a P-Head: set p_head")
        if G < 2 or G % part:
            raise ValueError(
                f"{G} actions of a question (reinforce.actions) do not split into several of "
                f"{part} at a time (reinforce.at_a_time)"
            )
        self._budget(self.reinforce.images)

    def loss(self, params: Params, frozen: Params, batch: Batch) -> tuple[jax.Array, Metrics]:
        """The loss above; see `losses.Loss`.

        The batch has, beside what others have, `draws`: uint32 [B], another number for every row of
        the run.
        """
        G, R = self.reinforce.actions, self._budget(self.reinforce.images)
        asked = self._look(params, frozen, batch)
        logs = jnp.log(jnp.maximum(asked.s, _LEAST))
        tokens = jax.vmap(
            lambda seed, logs, visible: draw(
                jax.random.key(seed, impl="threefry2x32"),
                jnp.broadcast_to(logs, (G, *logs.shape)),
                visible,
                R,
            )
        )(batch["draws"], jax.lax.stop_gradient(logs), asked.visible)  # [B, G, A, R]

        parts = rearrange(tokens, "B (n g) A R -> n B A g R", g=self.reinforce.at_a_time)
        r = jax.lax.map(lambda kept: self._reward(frozen, batch, asked, kept), parts)
        r = rearrange(r, "n B A g -> B (n g) A")
        pi = log_probability(
            logs[:, None], asked.visible[:, None], tokens, asked.counts[:, None]
        )  # [B, G, A]
        losses, useful = policy_loss(pi, r, self.reinforce.least_spread)
        asks = asked.counts > 0
        number = asks.sum()

        def over(x: jax.Array) -> jax.Array:
            """(sum, count) over the questions of x [B, A]."""
            return jnp.stack([jnp.where(asks, x, 0).sum(), number])

        def kept(s: jax.Array) -> jax.Array:
            """Which visual tokens s [B, A, S] keeps, bool [B, A, S]."""
            counted = jnp.arange(R) < asked.counts[..., None]
            nothing = jnp.zeros(s.shape, bool)
            return jnp.put_along_axis(nothing, _best(s, asked, R), counted, axis=-1, inplace=False)

        same = (kept(asked.s) & kept(asked.began)).sum(-1)
        return over(losses)[0] / jnp.maximum(number, 1), {
            "weight": number.astype(jnp.float32),
            "reward": over(r.mean(1)),
            "reward_spread": over(r.std(1)),
            "useless_groups": over(jnp.where(useful, 0.0, 1.0)),
            "entropy": over(-(asked.s * logs).sum(-1)),
            "churn": over(1 - same / jnp.maximum(asked.counts, 1)),
        }

    def best(self, params: Params, frozen: Params, batch: Batch) -> tuple[jax.Array, Metrics]:
        """What `loss` is to bring down: the negative reward of the best tokens by s."""
        asked = self._look(params, frozen, batch)
        kept = _best(asked.s, asked, self._budget(self.reinforce.images))
        r = self._reward(frozen, batch, asked, kept[:, :, None])[..., 0]
        asks = asked.counts > 0
        number = asks.sum().astype(jnp.float32)
        return -jnp.where(asks, r, 0).sum() / jnp.maximum(number, 1), {"weight": number}

    def _budget(self, images: int) -> int:
        L, M = self.config.text.num_layers, self.config.vision.num_tokens
        return retained(self.average, self.twig, L, M, images)

    def _look(self, params: Params, frozen: Params, batch: Batch) -> _Asked:
        """What is asked, and how the P-Head ranks what is seen."""
        K, T, most = self.twig.K, self.twig.T, self.reinforce
        part, fixed = TwigPart(self.config, self.twig), jax.lax.stop_gradient(params)
        x, where = trunk(Llava(self.config), frozen, batch, K)
        z, _ = part.run(fixed, x, where, 0, T - 1)
        _, (own,) = part.run(fixed, z, where, T - 1)

        B, S = batch["tokens"].shape
        segments = batch["segments"]
        starts = first_of_answers(batch["targets"])
        # A segment may hold a conversation: its first question chooses for all of it.
        starts &= (where[1] & starts[:, None]).sum(-1) == 1
        slots = first_of(starts, min(most.questions, S))  # [B, A]
        segment = take(segments, slots)[..., None]
        visible = take(where[1], slots) & batch["is_visual"][:, None]
        text = (segments[:, None] == segment) | (segments[:, None] == SHARED)
        text &= (segment > 0) & ~batch["is_visual"][:, None]
        text = jax.vmap(lambda x: first_of(x, min(most.text_tokens, S)))(text)
        targets = take(batch["targets"], text.reshape(B, -1)).reshape(text.shape)
        targets = jnp.where(text < S, targets, -1)

        images = -(-visible.sum(-1) // self.config.vision.num_tokens)
        budgets = jnp.array([self._budget(i) for i in range(most.images + 1)], jnp.int32)
        counts = budgets[jnp.minimum(images, most.images)]
        counts = jnp.where((images <= most.images) & (targets >= 0).any(-1), counts, 0)

        def scores(head: Params) -> jax.Array:
            ours = {**fixed, "p_head": head}
            gates = part.apply(ours, "key_gates", z)
            at = take(batch["positions"], slots)
            return part.apply(ours, "visual_scores", take(z, slots), at, own.k, gates, visible)

        began = scores(frozen["p_head"])
        return _Asked(x, scores(params["p_head"]), began, visible, text, targets, counts)

    def _reward(self, frozen: Params, batch: Batch, asked: _Asked, kept: jax.Array) -> jax.Array:
        """The mean log-probability of answers under the base pruned to slots kept, [B, A, g, R].

        float32 [B, A, g]; what is longer than the text of `_Asked` is left out.
        """
        model, base, (K, K_f) = Llava(self.config), {"params": frozen}, (self.twig.K, self.twig.K_f)
        B, A, g, R = kept.shape
        S, N = asked.states.shape[1], asked.text.shape[-1]
        kept = jnp.where(jnp.arange(R) < asked.counts[..., None, None], kept, S)
        text = jnp.broadcast_to(asked.text[:, :, None], (B, A, g, N))
        slots = jnp.concatenate([text, kept], axis=-1).reshape(B, -1)

        def rows(x: jax.Array) -> jax.Array:
            """x [B, S, ...] at the slots of every pruning, [B·A·g, N + R, ...]."""
            return rearrange(take(x, slots), "B (n Q) ... -> (B n) Q ...", n=A * g)

        at = slots.reshape(-1, N + R)
        mask = (at[:, None, :] <= at[:, :, None]) & (at < S)[:, None, :]
        positions = rows(batch["positions"])
        lower = rows(asked.states), positions, mask
        x, _ = model.apply(base, *lower, first=K, last=K_f, method="run")
        # FinalWipe: the text comes first.
        upper = x[:, :N], positions[:, :N], mask[:, :N, :N]
        x, _ = model.apply(base, *upper, first=K_f, method="run")

        def score(x: jax.Array, targets: jax.Array) -> tuple[jax.Array, ...]:
            logits = model.apply(base, x, method="logits")
            own = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
            return (own - jax.nn.logsumexp(logits, axis=-1),)

        targets = jnp.broadcast_to(asked.targets[:, :, None], text.shape).reshape(-1, N)
        (logs,) = in_chunks(score, (x, targets), self.chunk)
        valid = targets >= 0
        mean = (logs * valid).sum(-1) / jnp.maximum(valid.sum(-1), 1)
        return jax.lax.stop_gradient(mean.reshape(B, A, g))


def _best(s: jax.Array, asked: _Asked, most: int) -> jax.Array:
    """Slots of the best visual tokens by s [B, A, S], int32 [B, A, most]."""
    return jax.lax.top_k(jnp.where(asked.visible, s, -1), most)[1]
