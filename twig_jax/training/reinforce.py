"""TwigVLM++'s second stage: the P-Head learns from what prunings do to answers (GRPO).

For every question G prunings are drawn from the P-Head's scores (Plackett-Luce, see
pruning/sampling.py), and each is rewarded with the mean log-probability that the pruned base gives
to the known answer. How much better than the others of its question a pruning is, in standard
deviations, is what its log-probability is weighed with (arXiv 2503.14075v3, section 3.5):

    A_g = (r_g − mean r) / std r        loss = −mean over g of A_g · log π(a_g)

There is one step on each draw, so nothing has to be clipped. Trunk and twig run once a row; only
the deep layers run once a pruning, on the text and the tokens kept alone.
"""

from typing import Any, NamedTuple

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
from twig_jax.training.losses import Batch, Loss, Metrics, TwigPart, in_chunks, trunk

_LEAST = 1e-20  # scores below it count as it


class _Asked(NamedTuple):
    """The questions of a batch's rows, A of each; slots are those of the rows, S where unused."""

    states: jax.Array  # [B, S, d], after layer K - 1
    s: jax.Array  # float32 [B, A, S], the P-Head's scores
    began: jax.Array  # float32 [B, A, S], those it began with
    visible: jax.Array  # bool [B, A, S], the visual tokens that a question sees
    text: jax.Array  # int32 [B, A, N], slots of the text it sees, and of its own
    counts: jax.Array  # int32 [B, A], R; 0 where there is no question, image or answer


def budget_at(config: ReinforceConfig, seed: int, step: int, steps: int) -> float:
    """R̄ of a step, the same on all hosts: P(i) ∝ exp(−β·(t/T)²·i) over the ascending budgets."""
    i = np.arange(1, len(config.budgets) + 1)
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


def reinforce_loss(
    config: LlavaConfig,
    twig: TwigConfig,
    reinforce: ReinforceConfig,
    average: float,
    chunk: int,
) -> Loss:
    """The loss above at a budget of R̄ = average; only the P-Head trains.

    A batch has, beside what others have, `draws`: uint32 [B], another
    number for every row of the run. frozen has, beside the base, the P-Head that the run began
    with, `p_head`. Raises ValueError where the budget has no solution, where there is no P-Head,
    and where the actions do not split into equal parts.
    """
    G, part = reinforce.actions, reinforce.at_a_time
    if G < 2 or G % part:
        raise ValueError(
            f"{G} actions of a question (reinforce.actions) do not split into several of "
            f"{part} at a time (reinforce.at_a_time)"
        )
    look = _looking(config, twig, reinforce, average)
    reward = _rewarding(config, twig, chunk)

    def loss(params: Params, frozen: Params, batch: Batch) -> tuple[jax.Array, Metrics]:
        asked = look(params, frozen, batch)
        logs = jnp.log(jnp.maximum(asked.s, _LEAST))
        R = _most(config, twig, average, reinforce.images)
        tokens = jax.vmap(
            lambda seed, logs, visible: draw(
                jax.random.key(seed, impl="threefry2x32"),
                jnp.broadcast_to(logs, (G, *logs.shape)),
                visible,
                R,
            )
        )(batch["draws"], jax.lax.stop_gradient(logs), asked.visible)  # [B, G, A, R]

        parts = rearrange(tokens, "B (n g) A R -> n B A g R", g=part)
        r = jax.lax.map(lambda kept: reward(frozen, batch, asked, kept), parts)
        r = rearrange(r, "n B A g -> B (n g) A")
        pi = log_probability(
            logs[:, None], asked.visible[:, None], tokens, asked.counts[:, None]
        )  # [B, G, A]
        losses, useful = policy_loss(pi, r, reinforce.least_spread)
        asks = asked.counts > 0
        number = asks.sum()

        def over(x: jax.Array) -> jax.Array:
            """(sum, count) over the questions of x [B, A]."""
            return jnp.stack([jnp.where(asks, x, 0).sum(), number])

        best, first = (_best(x, asked, R) for x in (asked.s, asked.began))  # bool [B, A, S]
        changed = 1 - (best & first).sum(-1) / jnp.maximum(asked.counts, 1)
        return over(losses)[0] / jnp.maximum(number, 1), {
            "weight": number.astype(jnp.float32),
            "reward": over(r.mean(1)),
            "reward_spread": over(r.std(1)),
            "useless_groups": over(jnp.where(useful, 0.0, 1.0)),
            "entropy": over(-(asked.s * logs).sum(-1)),
            "churn": over(changed),
        }

    return loss


def pruned_loss(
    config: LlavaConfig,
    twig: TwigConfig,
    reinforce: ReinforceConfig,
    average: float,
    chunk: int,
) -> Loss:
    """What `reinforce_loss` is to bring down: the negative reward of the best tokens by s."""
    look = _looking(config, twig, reinforce, average)
    reward = _rewarding(config, twig, chunk)

    def loss(params: Params, frozen: Params, batch: Batch) -> tuple[jax.Array, Metrics]:
        asked = look(params, frozen, batch)
        R = _most(config, twig, average, reinforce.images)
        _, kept = jax.lax.top_k(jnp.where(asked.visible, asked.s, -1), R)
        r = reward(frozen, batch, asked, kept[:, :, None])[..., 0]
        asks = asked.counts > 0
        number = asks.sum().astype(jnp.float32)
        return -jnp.where(asks, r, 0).sum() / jnp.maximum(number, 1), {"weight": number}

    return loss


def _most(config: LlavaConfig, twig: TwigConfig, average: float, images: int) -> int:
    return retained(average, twig, config.text.num_layers, config.vision.num_tokens, images)


def _best(s: jax.Array, asked: _Asked, most: int) -> jax.Array:
    """Which visual tokens s [B, A, S] keeps, bool [B, A, S]."""
    _, at = jax.lax.top_k(jnp.where(asked.visible, s, -1), most)
    kept = jnp.arange(most) < asked.counts[..., None]
    return jnp.put_along_axis(jnp.zeros(s.shape, bool), at, kept, axis=-1, inplace=False)


def _looking(
    config: LlavaConfig,
    twig: TwigConfig,
    reinforce: ReinforceConfig,
    average: float,
) -> Any:
    """A function of twig, frozen parameters and batch that gives what is asked, and s."""
    if not twig.p_head:
        raise ValueError("what is reinforced is a P-Head: set p_head")
    model, part = Llava(config), TwigPart(config, twig)
    budgets = [_most(config, twig, average, images) for images in range(reinforce.images + 1)]

    def look(params: Params, frozen: Params, batch: Batch) -> _Asked:
        fixed = jax.lax.stop_gradient(params)
        x, where = trunk(model, frozen, batch, twig.K)
        z, _ = part.run(fixed, x, where, 0, twig.T - 1)
        _, (own,) = part.run(fixed, z, where, twig.T - 1)

        S = x.shape[1]
        segments = batch["segments"]
        answers = batch["targets"] >= 0
        starts = answers & ~jnp.pad(answers, ((0, 0), (1, 0)))[:, :-1]
        # A segment may hold a conversation: its first question chooses for all of it.
        starts &= (where[1] & starts[:, None]).sum(-1) == 1
        slots = first_of(starts, min(reinforce.questions, S))  # [B, A]
        segment = take(segments, slots)[..., None]
        visible = take(where[1], slots) & batch["is_visual"][:, None]
        text = (segments[:, None] == segment) | (segments[:, None] == SHARED)
        text &= (segment > 0) & ~batch["is_visual"][:, None]
        text = jax.vmap(lambda x: first_of(x, min(reinforce.text_tokens, S)))(text)

        images = -(-visible.sum(-1) // config.vision.num_tokens)
        table = jnp.array(budgets, jnp.int32)
        counts = jnp.where(images < len(budgets), table[jnp.minimum(images, len(budgets) - 1)], 0)

        def scores(head: Params) -> jax.Array:
            ours = {**fixed, "p_head": head}
            gates = part.apply(ours, "key_gates", z)
            at = take(batch["positions"], slots)
            return part.apply(ours, "visual_scores", take(z, slots), at, own.k, gates, visible)

        began = scores(frozen["p_head"])
        return _Asked(x, scores(params["p_head"]), began, visible, text, counts)

    return look


def _rewarding(config: LlavaConfig, twig: TwigConfig, chunk: int) -> Any:
    """A function of frozen parameters, batch, what is asked and slots kept int32 [B, A, g, R].

    It gives the mean log-probability of the answers' tokens under the base pruned so, float32
    [B, A, g]; zero where there is none. What is longer than an `_Asked`'s text is left out.
    """
    model = Llava(config)

    def reward(frozen: Params, batch: Batch, asked: _Asked, kept: jax.Array) -> jax.Array:
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
        base = {"params": frozen}
        x, _ = model.apply(
            base, rows(asked.states), positions, mask, first=twig.K, last=twig.K_f, method="run"
        )
        # FinalWipe: the text comes first.
        upper = positions[:, :N], mask[:, :N, :N]
        x, _ = model.apply(base, x[:, :N], *upper, first=twig.K_f, method="run")

        def score(x: jax.Array, targets: jax.Array) -> tuple[jax.Array, ...]:
            logits = model.apply(base, x, method="logits")
            own = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
            return (own - jax.nn.logsumexp(logits, axis=-1),)

        targets = jnp.where(at < S, rows(batch["targets"]), -1)[:, :N]
        (logs,) = in_chunks(score, (x, targets), chunk)
        valid = targets >= 0
        mean = (logs * valid).sum(-1) / jnp.maximum(valid.sum(-1), 1)
        return jax.lax.stop_gradient(mean.reshape(B, A, g))

    return reward
