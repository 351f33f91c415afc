"""The P-Head's second stage: rewards, gradients and the curriculum, against their definitions."""

import dataclasses
import itertools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits_twigpp_stage2, llava15_7b_twigpp_stage2
from tests.pruned_pass import Prompt, forward
from tests.training.worker import config, lines, start
from twig_jax.checkpoints.twig import write_twig
from twig_jax.models.llava import Llava
from twig_jax.models.twig import fresh_p_head, twig_decoder
from twig_jax.presets import preset
from twig_jax.pruning.sampling import draw, log_probability
from twig_jax.sharding.mesh import make_mesh
from twig_jax.training import loop
from twig_jax.training.config import OptimConfig, ReinforceConfig, TrainConfig
from twig_jax.training.data import on_mesh
from twig_jax.training.flops import step_flops
from twig_jax.training.loop import fit, stage_loss
from twig_jax.training.losses import normalised
from twig_jax.training.optim import optimizer
from twig_jax.training.preemption import Preempted
from twig_jax.training.reinforce import Reinforcement, budget_at, policy_loss
from twig_jax.training.start import start_twig
from twig_jax.training.step import init_state, make_step

# Of 144 visual tokens, layer 1 of two sees 4 and 12.
REINFORCE = ReinforceConfig(actions=4, at_a_time=2, budgets=(74.0, 78.0), questions=3)


def run_of(**changes):
    changed = {"p_head": True, "reinforce": REINFORCE, **changes}
    return TrainConfig("twig", "", 10, preset="tiny", **changed)


@pytest.fixture(scope="module")
def frozen(base):
    return {**base, "p_head": fresh_p_head(preset("tiny")[0].text)}


@pytest.fixture(scope="module")
def drawing(batch):
    return {**batch, "draws": jnp.arange(8, dtype=jnp.uint32)}


@pytest.fixture(scope="module")
def found(ours, frozen, drawing):
    """(loss, metrics) and gradient of one step."""
    return jax.jit(jax.value_and_grad(stage_loss(run_of()), has_aux=True))(ours, frozen, drawing)


def test_rewards_are_those_of_the_pruned_model(ours, base, frozen, batch):
    """Each question of a packed row alone, as decoding prunes it, answer and EOS given."""
    config, twig = run_of().model()
    row = {name: x[:1] for name, x in batch.items()}
    best = Reinforcement(config, twig, REINFORCE, 74.0, 16).best
    value, metrics = jax.jit(best)(ours, frozen, row)
    visual = Llava(config).apply(
        {"params": base}, normalised(config, row["pixels"]), method="encode"
    )
    tokens, segments, targets = (np.asarray(row[n][0]) for n in ("tokens", "segments", "targets"))
    rewards = []
    for segment in range(1, 4):
        at = np.flatnonzero((segments == -1) | (segments == segment))
        predicting = np.flatnonzero((segments == segment) & (targets >= 0))
        prompt, answer = at[at <= predicting[0]], targets[predicting]
        forced = forward(
            config,
            twig,
            base,
            ours,
            Prompt(
                jnp.asarray(tokens[prompt])[None],
                row["is_visual"][:, prompt],
                jnp.array([len(prompt)]),
                visual,
            ),
            jnp.asarray(answer)[None],
            jnp.array([4]),
            64,
            4,
        )
        logs = jax.nn.log_softmax(forced.logits[0, : len(answer)])
        rewards.append(float(logs[np.arange(len(answer)), answer].mean()))
    assert metrics["weight"] == 3
    assert value == pytest.approx(-np.mean(rewards), rel=1e-4)


def test_only_the_p_head_trains(found, ours, frozen, drawing):
    (loss, metrics), gradient = found
    moved = {
        name: max(map(float, map(abs, map(jnp.max, jax.tree.leaves(part)))))
        for name, part in gradient.items()
    }
    assert moved.pop("p_head") > 0 and not any(moved.values())
    tx = optimizer(OptimConfig(lr=1e-2, warmup=0.0), 10, run_of().trains_only)
    before = jax.tree.map(jnp.copy, ours)
    state = init_state(before, tx)
    assert len(jax.tree.leaves(state.opt_state)) < 3 * len(jax.tree.leaves(ours["p_head"]))
    step = make_step(stage_loss(run_of()), tx)
    state, _ = step(state, frozen, drawing)
    state, of_step = step(state, frozen, drawing)
    for name, part in state.params.items():
        same = jax.tree.map(lambda a, b: bool((a == b).all()), part, ours[name])
        assert all(jax.tree.leaves(same)) == (name != "p_head"), name
    # Three questions of every row, where there are so many.
    asked = int(jnp.minimum(drawing["segments"].max(1), 3).sum())
    for name in ("reward", "reward_spread", "useless_groups", "entropy", "churn"):
        assert metrics[name][1] == asked, name
    assert np.isfinite(loss) and -20 < metrics["reward"][0] / asked < 0
    assert 0 < metrics["entropy"][0] / asked < np.log(144)
    assert 0 < metrics["churn"][0] / asked < 1
    assert of_step["loss"] != loss  # of the same batch and draws, one update later


def test_a_published_p_head_goes_on_with_its_own_gates(tmp_path, base, ours, draw, drawing):
    shape, twig = preset("tiny")
    twig = dataclasses.replace(twig, p_head=True, gate="relu * sigmoid")
    decoder, x = twig_decoder(shape.text, twig), jnp.zeros((1, 1, shape.text.hidden_size))
    shapes = jax.eval_shape(decoder.init, jax.random.key(0), x)["params"]["p_head"]
    published = {**ours, "p_head": draw(shapes, seed=7)}
    write_twig(tmp_path / "twig", published, twig, base, shape, "float32")
    run = run_of(twig_init=str(tmp_path / "twig"))
    assert run.model()[1] == twig
    begun = start_twig(run, base, make_mesh())
    jax.tree.map(np.testing.assert_array_equal, begun, published)
    frozen = {**base, "p_head": begun["p_head"]}
    loss, metrics = jax.eval_shape(stage_loss(run), begun, frozen, drawing)
    assert loss.shape == () and metrics["reward"].shape == (2,)


def test_the_head_it_began_with_has_not_moved(frozen, ours, drawing):
    (_, metrics) = jax.jit(stage_loss(run_of()))(ours, frozen | {"p_head": ours["p_head"]}, drawing)
    assert metrics["churn"][0] == 0


@pytest.mark.parametrize(
    "changes", [{"at_a_time": 4}, {"at_a_time": 1}, {"text_tokens": 80}], ids=str
)
def test_what_saves_memory_changes_nothing(changes, found, ours, frozen, drawing):
    again = stage_loss(run_of(reinforce=dataclasses.replace(REINFORCE, **changes)))
    loss, metrics = jax.jit(again)(ours, frozen, drawing)
    for name in ("reward", "reward_spread"):
        np.testing.assert_allclose(metrics[name], found[0][1][name], rtol=2e-5)
    # Rewards are divided by their spread, here of about 0.01 nats: so are rounding errors.
    assert loss == pytest.approx(float(found[0][0]), abs=5e-3)


def test_which_questions_count(ours, frozen, batch):
    """A conversation's first; none without an answer, an image, or with too many images."""
    config, twig = run_of().model()
    best = jax.jit(Reinforcement(config, twig, REINFORCE, 74.0, 276).best)
    segments = batch["segments"]
    two = batch | {
        "targets": jnp.where(segments <= 2, batch["targets"], -1),
        "pixels": jnp.repeat(batch["pixels"], 2, axis=1),
    }

    def weight(**changes):
        value, metrics = best(ours, frozen, two | changes)
        assert jnp.isfinite(value)
        return metrics["weight"]

    assert weight() == 2 * 8
    assert weight(segments=jnp.where(segments == 2, 1, segments)) == 8
    assert weight(targets=jnp.full_like(segments, -1)) == 0
    assert weight(is_visual=two["is_visual"].at[0].set(False)) == 2 * 7
    assert not two["is_visual"][0, 0]
    assert weight(is_visual=two["is_visual"].at[0, 0].set(True)) == 2 * 7  # of a second image
    # In so little text there is no answer.
    short = dataclasses.replace(REINFORCE, text_tokens=4)
    _, metrics = jax.jit(Reinforcement(config, twig, short, 74.0, 276).best)(ours, frozen, two)
    assert metrics["weight"] == 0


def test_groups_without_spread_teach_nothing(ours, frozen, drawing):
    flat = stage_loss(run_of(reinforce=dataclasses.replace(REINFORCE, least_spread=1e9)))
    (loss, metrics), gradient = jax.jit(jax.value_and_grad(flat, has_aux=True))(
        ours, frozen, drawing
    )
    assert loss == 0 and metrics["useless_groups"][0] == metrics["useless_groups"][1] > 0
    assert all(float(abs(g).max()) == 0 for g in jax.tree.leaves(gradient))


def test_the_gradient_is_that_of_the_expected_reward():
    """Two of five tokens: all twenty draws, J(θ) = Σ π(a) r(a), and its finite differences.

    An advantage is (r - mean) / std, so the gradient is that of J over the rewards' std.
    """
    theta = np.array([0.3, -0.4, 0.9, 0.0, -1.1])
    orders = np.array(list(itertools.permutations(range(5), 2)))
    table = np.zeros((5, 5))
    table[tuple(orders.T)] = np.random.default_rng(0).normal(size=len(orders))

    def pi(theta):
        s = np.exp(theta) / np.exp(theta).sum()
        return np.array([s[a] * s[b] / (1 - s[a]) for a, b in orders])

    def expected(theta):
        return pi(theta) @ table[tuple(orders.T)]

    steps = 1e-5 * np.eye(5)
    differences = np.array([(expected(theta + e) - expected(theta - e)) / 2e-5 for e in steps])
    r, p = table[tuple(orders.T)], pi(theta)
    std = np.sqrt(p @ r**2 - (p @ r) ** 2)

    n, visible = 200_000, jnp.ones((1, 5), bool)
    logs = jax.nn.log_softmax(jnp.asarray(theta, jnp.float32))
    drawn = draw(jax.random.key(3), jnp.broadcast_to(logs, (n, 5)), visible, 2)
    rewards = jnp.asarray(table, jnp.float32)[drawn[:, 0], drawn[:, 1]]

    def loss(theta):
        logs = jax.nn.log_softmax(theta)
        log_pi = log_probability(logs, visible[0], drawn, jnp.full(n, 2))
        return policy_loss(log_pi[:, None], rewards[:, None], 1e-4)[0].sum()

    estimate = -np.asarray(jax.grad(loss)(jnp.asarray(theta, jnp.float32))) * std
    # One draw's part has a standard deviation of about 1, so the mean of n has 1 / sqrt(n).
    np.testing.assert_allclose(estimate, differences, atol=5 / np.sqrt(n))
    assert abs(differences).max() > 20 / np.sqrt(n)


def test_budgets_fall_with_time():
    curriculum = ReinforceConfig(budgets=(16.0, 32.0, 48.0), beta=8.0)
    early = [budget_at(curriculum, seed, 1, 1000) for seed in range(600)]
    late = [budget_at(curriculum, seed, 1000, 1000) for seed in range(600)]
    assert min(map(early.count, (16.0, 32.0, 48.0))) > 150
    assert late.count(16.0) == 600  # e^-8 leaves 0.03 % for all others
    # Halfway β is 2: e^-2 to e^-4 of the lowest's share.
    middle = [budget_at(curriculum, seed, 500, 1000) for seed in range(600)]
    assert 0.8 < middle.count(16.0) / 600 < 0.92
    assert budget_at(curriculum, 7, 42, 100) == budget_at(curriculum, 7, 42, 100)
    assert budget_at(ReinforceConfig(budgets=(20.0,)), 0, 3, 9) == 20.0


SETTINGS = (
    "p_head=True",
    "reinforce.actions=4",
    "reinforce.budgets=(74.0, 78.0)",
    "reinforce.at_a_time=4",
    "reinforce.questions=2",
    "steps=6",
    "save_every=3",
    "twig_init=next",
)


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """Budgets, draws and moments included."""
    drawn = []

    def noting(batch, mesh):
        drawn.append(batch.get("draws"))
        return on_mesh(batch, mesh)

    monkeypatch.setattr(loop, "on_mesh", noting)
    twig, base = start()
    rng = np.random.default_rng(0)
    gates = jax.tree.map(
        lambda x: x + rng.normal(0, 0.1, x.shape).astype(x.dtype),
        fresh_p_head(preset("tiny")[0].text),
    )
    twig = {**twig, "p_head": gates}
    whole = config(tmp_path / "whole", *SETTINGS)
    halves = config(tmp_path / "halves", *SETTINGS)

    def told_to_stop(step, params):
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    results = {"whole": fit(whole, twig, base, progress=False)}
    every = np.concatenate(drawn)
    assert len(np.unique(every)) == len(every) == 6 * whole.data.batch_size
    with pytest.raises(Preempted, match="saved at step 4 of 6"):
        fit(halves, twig, base, callback=told_to_stop, progress=False)
    results["halves"] = fit(halves, twig, base, progress=False)
    jax.tree.map(np.testing.assert_array_equal, results["whole"], results["halves"])
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), results["whole"], twig)
    assert max(jax.tree.leaves(moved["p_head"])) > 0
    steps = [line for line in lines(tmp_path / "whole") if "loss" in line]
    first = {line["budget"]: line for line in reversed(steps)}
    assert first.keys() == {74.0, 78.0}
    assert all("step_time" not in line for line in first.values())  # it is the compiler's
    assert "step_time" in steps[-1]
    assert {"reward", "reward_spread", "useless_groups", "entropy", "churn"} <= steps[-1].keys()
    assert steps[0]["churn"] == 0  # what has not learned yet ranks as it did


def test_what_is_held_out_is_pruned_to_the_lowest_budget(tmp_path):
    """So that, where nothing is learned, its loss is that of a run at this budget alone."""
    twig, base = start()
    twig = {**twig, "p_head": fresh_p_head(preset("tiny")[0].text)}
    still, noted = ("steps=1", "save_every=1", "optim.lr=0.0"), []
    for name, budgets in (("both", "(74.0, 78.0)"), ("lowest", "(74.0,)")):
        run = config(tmp_path / name, *SETTINGS, *still, f"reinforce.budgets={budgets}")
        fit(run, twig, base, progress=False)
        noted += [x["validation/loss"] for x in lines(tmp_path / name) if "validation/loss" in x]
    assert len(noted) == 2 and noted[0] == noted[1]


@pytest.mark.parametrize("module", [digits_twigpp_stage2, llava15_7b_twigpp_stage2])
def test_every_budget_of_the_configurations_has_a_step(module):
    run = dataclasses.replace(module.get_config(), base=None)
    for budget in run.reinforce.budgets:
        stage_loss(run, budget)
    assert step_flops(run) > 10 * step_flops(dataclasses.replace(run, reinforce=ReinforceConfig()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"p_head": False}, "set p_head"),
        ({"whole_base": False}, "needs whole_base=True"),
        ({"reinforce": dataclasses.replace(REINFORCE, budgets=())}, "and average budgets"),
        ({"reinforce": dataclasses.replace(REINFORCE, at_a_time=3)}, "do not split into several"),
        ({"reinforce": dataclasses.replace(REINFORCE, budgets=(60.0,))}, "it can be more than 72"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        stage_loss(run_of(**changes))
