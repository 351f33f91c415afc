"""Rivals of the twig: what each selects, on examples small enough to work out by hand."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoding.models import CALL, CONFIG, TWIG, M, generator, request, tokens
from tests.parity.test_hf import channels_first, inputs, theirs, tiny, torch, weights
from twig_jax.checkpoints.llava import write_llava
from twig_jax.config import TwigConfig
from twig_jax.decoding.generate import Generator
from twig_jax.evaluation.pruners import PRUNERS
from twig_jax.evaluation.pruners.answering import Rival
from twig_jax.evaluation.pruners.attention import fastv_all_text
from twig_jax.evaluation.pruners.baselines import farthest_first
from twig_jax.evaluation.pruners.diversity import least_duplicated, max_min
from twig_jax.evaluation.pruners.probe import Probe, as_the_twig
from twig_jax.evaluation.pruners.visionzip import merged
from twig_jax.pruning.schedule import by_twig

TTP = dataclasses.replace(CALL, mode="ttp", avg_retained=5)


@pytest.fixture(scope="module")
def engine():
    return generator()


LARGEST = request(99, 2, 8, 8)


def asked():
    """One image, two images, and none."""
    return [request(1, 1, 2, 5), LARGEST, request(2, 0, 3, 4)]


# By hand.


def test_a_grid_is_filled_evenly():
    """From the middle of 3 x 3 to its corners, then its sides; on 12 x 12 no quarter is ahead."""
    order = farthest_first(3).tolist()
    assert order[0] == 4 and {*order[1:5]} == {0, 2, 6, 8} and {*order[5:]} == {1, 3, 5, 7}
    order = farthest_first(12)
    assert sorted(order) == list(range(144))
    for kept in (16, 32, 57, 100):
        y, x = np.divmod(order[:kept], 12)
        quarters = np.bincount((y >= 6) * 2 + (x >= 6), minlength=4)
        assert abs(quarters - kept / 4).max() <= 0.15 * kept, (kept, quarters)


def test_divprune_takes_what_is_farthest():
    """Unit vectors at 0, 10, 90, 100 and 200 degrees."""
    angles = np.radians([0, 10, 90, 100, 200])
    x = jnp.asarray(np.stack([np.cos(angles), np.sin(angles)], axis=1) * [[1], [2], [3], [4], [5]])
    # 200 is farthest from its nearest. Then 10 is 170 away; then 90 and 100 are 80 and 90 from
    # their nearest chosen, by cosine.
    assert max_min(x, 3).tolist() == [0, 2, 0, 1, 3]
    assert (max_min(x, 1) > 0).tolist() == [False] * 4 + [True]
    # Copies are as near as can be, and taken last.
    same = jnp.ones((4, 2)).at[3].set(jnp.asarray([1.0, -1.0]))
    assert max_min(same, 2)[3] > 0
    assert (max_min(same, 4) > 0).all()


def test_dart_takes_what_pivots_do_not_duplicate():
    """Six tokens on three axes: pivots by size, then for each the least similar."""
    axes = jnp.eye(3)
    x = jnp.concatenate([axes, axes + 0.1])
    size = jnp.asarray([9.0, 8, 1, 7, 6, 2])
    texts = axes[:1]
    # Four pivots: 0, 1, 3, 4. Of the two others 2 is less similar to the first pivot than 5.
    assert least_duplicated(x, size, texts, 4).tolist() == [1, 1, 0, 1, 1, 0]
    assert least_duplicated(x, size, texts, 5).tolist() == [1, 1, 1, 1, 1, 0]
    assert least_duplicated(x, size, texts, 6).tolist() == [1] * 6
    # With a budget below the number of pivots, the largest of them.
    assert least_duplicated(x, size, texts, 2).tolist() == [1, 1, 0, 0, 0, 0]


def test_visionzip_merges_what_is_alike():
    """Two dominant ones of six; the others, 1 2 4 5, are merged into 1 and 4."""
    attention = jnp.asarray([0.3, 0.1, 0.1, 0.4, 0.05, 0.05])
    keys = jnp.asarray([[9.0, 9], [1, 0], [0, 1], [9, 9], [0, 1], [1, 0]])
    features = jnp.arange(6.0)[:, None] * 10
    scores, x = merged(attention, keys, features, 2, 2)
    assert scores.tolist() == [2, 1, 0, 2, 1, 0]
    # 5 is like 1, and 2 like 4.
    assert x[:, 0].tolist() == [0, (10 + 50) / 2, 20, 30, (20 + 40) / 2, 50]
    # Without merged ones, and where nothing is left to merge, features stay.
    scores, x = merged(attention, keys, features, 2, 0)
    assert scores.tolist() == [2, 0, 0, 2, 0, 0] and (x == features).all()
    scores, x = merged(attention, keys, features, 5, 1)
    assert (scores > 0).all() and (x == features).all()


# What they look at.


@pytest.fixture(scope="module")
def seen(tmp_path_factory, draw):
    """(probe of a model, transformers' attentions of the same: the tower's and the decoder's)."""
    config = tiny(feature=-2)
    params = weights(config, draw)
    folder = tmp_path_factory.mktemp("pair")
    write_llava(folder, params, config, "float32")
    ids, pixels = inputs(config, 2)
    model = theirs(folder)
    with torch.no_grad():
        tower = model.model.vision_tower(channels_first(pixels), output_attentions=True).attentions
        decoder = model(
            input_ids=torch.from_numpy(ids),
            pixel_values=channels_first(pixels),
            output_attentions=True,
        ).attentions
    is_visual = jnp.asarray(ids == config.image_token_id)
    lengths = jnp.full(2, ids.shape[1])
    seeds = jnp.arange(2, dtype=jnp.uint32)
    arrays = (jnp.asarray(ids), is_visual, lengths, jnp.asarray(pixels), seeds)
    return Probe(config, 1, TwigConfig(1, 1, 2), params, *arrays), tower, decoder


def test_attention_is_that_of_transformers(seen):
    """To 1e-5: attention weights are at most 1."""
    probe, tower, decoder = seen
    V = 2 * probe.config.vision.num_tokens
    used = probe.config.vision.layers_used - 1
    expected = tower[used].mean(1)[:, 0, 1:].reshape(2, V).numpy()
    np.testing.assert_allclose(probe.class_attention, expected, atol=1e-5)
    for layer in (0, 1):
        found = probe.attention(layer)
        np.testing.assert_allclose(found, decoder[layer].mean(1).numpy(), atol=1e-5)
    text = [np.asarray(decoder[0].mean(1)[b])[~np.asarray(probe.is_visual[b])] for b in (0, 1)]
    expected = [rows.mean(0)[np.asarray(probe.is_visual[b])] for b, rows in enumerate(text)]
    np.testing.assert_allclose(fastv_all_text(probe, 3).scores, expected, atol=1e-5)


# On the engine.


@pytest.mark.parametrize("name", [n for n, p in PRUNERS.items() if p.rank is not None])
def test_a_row_is_ranked_by_itself(engine, name):
    rival = Rival(engine, name)
    together = rival.ranked(asked(), TTP, batch=2)
    alone = rival.ranked(asked()[:1], TTP, batch=1)[0]
    # To 1e-6: attention in a batch of another size may round differently.
    np.testing.assert_allclose(together[0].scores, alone.scores, atol=1e-6)
    for before, after in zip(asked(), together, strict=True):
        assert (after.scores[~before.is_visual] == 0).all()
        assert len(set(after.scores[before.is_visual])) > 1 or not before.is_visual.any()


@pytest.mark.parametrize("name", ["random", "visionzip", "dart"])
def test_budgets(engine, name):
    """Each keeps what its own schedule and R̄ demand, and the best by its scores."""
    rival = Rival(engine, name)
    ranked = rival.ranked(asked(), TTP)
    for one, result in zip(ranked, rival.answer(asked(), TTP), strict=True):
        images = int(one.is_visual.sum()) // M
        R = rival.schedule.budget(5, CONFIG.text.num_layers, M, images)[0]
        best = np.argsort(-np.where(one.is_visual, one.scores, -1), kind="stable")[:R]
        assert result.kept.tolist() == sorted(best)


@pytest.mark.parametrize("name", [n for n, p in PRUNERS.items() if p.schedule is not as_the_twig])
def test_keeping_all_changes_nothing(engine, name):
    everything = dataclasses.replace(TTP, avg_retained=M)
    plain = engine.generate_many(asked(), dataclasses.replace(CALL, mode="plain"))
    assert tokens(Rival(engine, name).answer(asked(), everything)) == tokens(plain)


def test_selectors_of_the_engine_and_the_probe_agree(engine):
    """FastV's last-token attention, computed beside decoding and by looking at all of it."""
    one = request(1, 1, 2, 5)
    found = Rival(engine, "base_K").answer([one], TTP)[0]
    params = engine.weights.base
    lengths, seeds = jnp.asarray([len(one.ids)]), jnp.zeros(1, jnp.uint32)
    arrays = (one.ids[None], one.is_visual[None], lengths, one.pixels[None], seeds)
    probe = Probe(CONFIG, 1, TWIG, params, *(jnp.asarray(x) for x in arrays))
    row = probe.last(probe.attention(0))[0]
    np.testing.assert_allclose(found.scores, row, atol=1e-5)


def test_settings_of_a_request_are_kept(engine):
    own = request(1, 1, 2, 5, mode="ttp", avg_retained=8, max_new_tokens=3)
    result = Rival(engine, "divprune").answer([own, request(3, 1, 5, 1)], TTP)[0]
    assert len(result.kept) == 8 and len(result.tokens) <= 3


def test_speculation_with_a_rival_s_tokens(engine):
    """Where the schedule is the twig's, it can draft; the answers stay the same."""
    rival = Rival(engine, "uniform")
    drafted = rival.answer([LARGEST], dataclasses.replace(TTP, mode="ttp_ssd"))
    assert tokens(drafted) == tokens(rival.answer([LARGEST], TTP))
    assert any(len(d) for d in drafted[0].drafts)
    with pytest.raises(ValueError, match="fastv prunes at other layers than the twig"):
        Rival(engine, "fastv").answer([LARGEST], CALL)


def test_a_schedule_needs_no_twig(engine):
    """A generator without a twig prunes by other scores, as one with a twig does by the same."""
    schedule = Generator(CONFIG, engine.weights.base, TWIG)
    by_attention = dataclasses.replace(TTP, selector="fastv")
    assert tokens(schedule.generate([LARGEST], by_attention)) == tokens(
        engine.generate([LARGEST], by_attention)
    )
    assert tokens(schedule.generate([LARGEST], dataclasses.replace(CALL, mode="plain"))) == tokens(
        engine.generate([LARGEST], dataclasses.replace(CALL, mode="plain"))
    )
    for settings in (TTP, dataclasses.replace(by_attention, mode="ttp_ssd")):
        with pytest.raises(ValueError, match="needs a twig; this is a schedule without one"):
            schedule.generate([LARGEST], settings)


def test_bad_input(engine):
    with pytest.raises(ValueError, match="no selector 'best'; there are: twig, random"):
        Rival(engine, "best")
    with pytest.raises(ValueError, match="need a twig, or its schedule"):
        Rival(Generator(CONFIG, engine.weights.base), "random")
    with pytest.raises(ValueError, match="by its own schedule: give one of the two"):
        Generator(CONFIG, engine.weights.base, TWIG, schedule=by_twig(TWIG))
    one = request(1, 1, 2, 5)
    given = dataclasses.replace(one, pixels=None, visual=np.zeros((M, 32), np.float32))
    with pytest.raises(ValueError, match="request 0: pruners look at pixels"):
        Rival(engine, "random").answer([given], TTP)
    with pytest.raises(ValueError, match="needs avg_retained"):
        Rival(engine, "random").answer([one], dataclasses.replace(TTP, avg_retained=None))
    with pytest.raises(ValueError, match=r"no number of kept tokens gives 0\.5"):
        Rival(engine, "fastv").answer([one], dataclasses.replace(TTP, avg_retained=0.5))


def test_random_draws_depend_on_the_question_alone(engine):
    rival = Rival(engine, "random")
    kept = [tuple(r.kept) for r in rival.answer([request(i, 1, 2, 5) for i in range(8)], TTP)]
    assert len(set(kept)) > 4
    again = rival.answer([request(7, 1, 2, 5)], TTP)[0]
    assert tuple(again.kept) == kept[7]


def test_every_pruner_names_its_source():
    for pruner in PRUNERS.values():
        assert "arXiv" in pruner.source or pruner.source == "a baseline"
