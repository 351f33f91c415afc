"""What a twig learns from its base, against the formulas taken apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twig_jax.data.packing import SHARED
from twig_jax.models.llava import Llava
from twig_jax.models.twig import init_twig, twig_decoder
from twig_jax.presets import preset
from twig_jax.training.config import DistillConfig, TrainConfig
from twig_jax.training.distill import divergence, queries
from twig_jax.training.loop import stage_loss
from twig_jax.training.losses import normalised, seen

BOTH = DistillConfig(prediction=0.1, attention=1.0, layer=1)


def run_of(**changes):
    return TrainConfig("twig", "", 1, preset="tiny", p_head=True, **changes)


@pytest.fixture(scope="module")
def row(batch):
    return {name: x[:1] for name, x in batch.items()}


@pytest.fixture(scope="module")
def both():
    """A function that gives (loss, metrics) with both terms, and the gradient."""
    return jax.jit(jax.value_and_grad(stage_loss(run_of(distill=BOTH)), has_aux=True))


@pytest.fixture(scope="module")
def found(both, ours, base, row):
    return both(ours, base, row)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return (
        x
        - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - x.max(-1, keepdims=True)
    )


def test_the_terms_add_up(found):
    (loss, m), _ = found
    mean = {k: float(v[0] / v[1]) for k, v in m.items() if np.ndim(v) == 1}
    whole = mean["cross_entropy"] + 0.1 * mean["prediction_kl"] + mean["attention_kl"]
    assert loss == pytest.approx(whole, rel=1e-6)
    assert mean["prediction_kl"] > 0 and mean["attention_kl"] > 0


def test_against_the_formulas(found, ours, base, row):
    """Whole logits, whole attention matrices, one query after the other."""
    (_, metrics), _ = found
    config, twig = preset("tiny")
    model, run = Llava(config), {"params": base}
    decoder = twig_decoder(config.text, dataclasses.replace(twig, p_head=True))
    visual = model.apply(run, normalised(config, row["pixels"]), method="encode")
    x = model.apply(run, row["tokens"], row["is_visual"], visual, method="merge")
    where = row["positions"], seen(row["segments"])
    x, _ = model.apply(run, x, *where, 0, 1, method="run")
    y, (kv,) = model.apply(run, x, *where, 1, 2, method="run")
    z, (own,) = decoder.apply({"params": ours}, x, *where, method="run")
    p = log_softmax(model.apply(run, y, method="logits"))[0]
    q = log_softmax(decoder.apply({"params": ours}, z, method="logits"))[0]
    valid = np.asarray(row["targets"][0] >= 0)
    kl = (np.exp(p) * (p - q)).sum(-1)[valid]
    np.testing.assert_allclose(metrics["prediction_kl"], [kl.sum(), valid.sum()], rtol=1e-4)

    first = np.flatnonzero(valid & ~np.concatenate([[False], valid[:-1]]))
    mask, is_visual = np.asarray(where[1][0]), np.asarray(row["is_visual"][0])
    total = 0.0
    for slot in first:
        at = row["positions"][:, slot : slot + 1]
        one = (x[:, slot : slot + 1], at)
        attention = model.apply(
            run, 1, *one, kv.k, where[1][:, slot : slot + 1], method="attention_rows"
        )
        seen_visual = is_visual & mask[slot]
        heads = np.asarray(attention, np.float64)[0, :, 0][:, seen_visual]
        a = (heads / heads.sum(-1, keepdims=True)).mean(0)
        gates = decoder.apply({"params": ours}, x, method="key_gates")
        s = decoder.apply(
            {"params": ours},
            *one,
            own.k,
            gates,
            jnp.asarray(seen_visual)[None, None],
            method="visual_scores",
        )
        s = np.asarray(s, np.float64)[0, 0][seen_visual]
        total += (a * np.log(a / s)).sum()
    np.testing.assert_allclose(metrics["attention_kl"], [total, len(first)], rtol=1e-4)


def test_gradients_reach_what_they_should(found):
    _, grads = found
    assert all(jnp.isfinite(g).all() and g.any() for g in jax.tree.leaves(grads["p_head"]))
    assert grads["lm_head"]["kernel"].any()


def test_a_row_without_answers_teaches_nothing(both, ours, base, row):
    (loss, _), grads = both(ours, base, row | {"targets": jnp.full_like(row["targets"], -1)})
    assert loss == 0 and not any(g.any() for g in jax.tree.leaves(grads))


def test_a_twig_that_is_its_base_has_nothing_to_learn_of_it(base, row):
    """All layers above the trunk, a fresh P-Head, and the attention of its own last layer."""
    config, twig = preset("tiny")
    same = init_twig(base, config.text, dataclasses.replace(twig, p_head=True))
    _, metrics = jax.jit(stage_loss(run_of(distill=BOTH)))(same, base, row)
    assert metrics["prediction_kl"][0] == pytest.approx(0, abs=1e-4)
    assert metrics["attention_kl"][0] == pytest.approx(0, abs=1e-4)


def test_chunks_and_recomputation_change_nothing(found, ours, base, row):
    (expected, _), grads = found
    loss = stage_loss(run_of(distill=BOTH, head_chunk=37, remat=True))
    (value, _), other = jax.jit(jax.value_and_grad(loss, has_aux=True))(ours, base, row)
    assert value == pytest.approx(float(expected), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), grads, other)


def test_without_either_it_is_the_twig_s_loss(ours, base, row):
    plain = jax.jit(stage_loss(run_of()))(ours, base, row)[0]
    only = stage_loss(run_of(distill=DistillConfig(prediction=1e-30)))
    assert plain == pytest.approx(float(jax.jit(only)(ours, base, row)[0]), rel=1e-6)


def test_queries():
    batch = {
        "targets": jnp.array([[-1, -1, -1, 7, 2, -1, -1, 9, -1, -1]]),
        "is_visual": jnp.array([[0, 1, 1, 0, 0, 0, 0, 0, 0, 0]], bool),
        "segments": jnp.array([[1, 1, 1, 1, 1, 1, 2, 2, 2, 0]]),
    }
    assert queries(batch, "answer", 4).tolist() == [[3, 7, 10, 10]]
    assert queries(batch, "answer", 1).tolist() == [[3]]
    assert queries(batch, "text", 6).tolist() == [[0, 5, 6, 8, 10, 10]]
    shared = {**batch, "segments": batch["segments"].at[0, 0].set(SHARED)}
    assert queries(shared, "text", 6).tolist() == [[5, 6, 8, 10, 10, 10]]
    with pytest.raises(ValueError, match="there are: answer, text"):
        queries(batch, "all", 4)


def test_divergence_by_hand():
    target = jnp.array([[[0.75, 0.25, 0.0], [0.0, 0.0, 0.0]]])
    s = jnp.array([[[0.5, 0.25, 0.25], [0.0, 0.0, 0.0]]])
    found = divergence(target, s, jnp.array([[True, False]]))
    by_hand = 0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.25)
    np.testing.assert_allclose(found, [by_hand, 1], rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill": BOTH, "p_head": False}, r"set p_head, or distill\.attention=0"),
        ({"distill": dataclasses.replace(BOTH, layer=0)}, r"distill\.layer is from 1 to 1"),
        ({"distill": BOTH, "whole_base": False}, "needs the whole base"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        stage_loss(dataclasses.replace(run_of(), **changes))
