"""Rivals of the twig: what each selects, on examples small enough to work out by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoding.models import CALL, CONFIG, TWIG, M, generator, request, tokens
from tests.parity.test_hf import channels_first, inputs, theirs, tiny, torch, weights
from twig_jax.checkpoints.llava import write_llava
from twig_jax.config import TwigConfig
from twig_jax.decoding.generate import Generator
from twig_jax.decoding.session import Session
from twig_jax.evaluation.pruners import PRUNERS
from twig_jax.evaluation.pruners.answering import Rival
from twig_jax.evaluation.pruners.attention import deeper, fastv_all_text
from twig_jax.evaluation.pruners.baselines import farthest_first
from twig_jax.evaluation.pruners.diversity import dart, least_duplicated, max_min
from twig_jax.evaluation.pruners.probe import Probe, as_the_twig
from twig_jax.evaluation.pruners.pyramiddrop import last_token, pyramid
from twig_jax.evaluation.pruners.sparsevlm import raters, recycled, sparse
from twig_jax.evaluation.pruners.visionzip import merged
from twig_jax.models.llava import Llava
from twig_jax.presets import preset
from twig_jax.pruning.schedule import Schedule, View, by_twig

STAGED = ("pyramiddrop", "sparsevlm")
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


def test_sparsevlm_asks_the_words_that_are_about_the_image():
    """Two visual tokens, a word before them and three after, of products 4, 1, 0 and 2, 1, 0."""
    x = jnp.asarray([[9.0, 9], [2, 0], [0, 1], [2, 2], [0.5, 1], [0, 0]])
    is_visual, asks = jnp.asarray([0, 1, 1, 0, 0, 0], bool), jnp.asarray([0, 0, 0, 1, 1, 1], bool)
    # Mean shares are 0.80, 0.14 and 0.05: one is above a third.
    assert raters(x, is_visual, asks).tolist() == [False] * 3 + [True, False, False]
    alike = x.at[3:].set(1.0)
    assert raters(alike, is_visual, asks).tolist() == asks.tolist()


def test_sparsevlm_recycles_what_goes():
    scores = jnp.asarray([0.1, 0.9, 0.8, 0.5, 0.4, 0.3, 0.35])
    x = jnp.asarray([0.0, 7, 8, 0, 1, 1.25, 5])[:, None]
    visual = jnp.arange(7) > 0
    # Three of six go, so one of the three kept is merged; a centre alone counts itself alone, so
    # that all are as dense, and the first is it.
    found, states = recycled(scores, x, visual, jnp.int32(3))
    assert found.tolist() == [0, 2, 2, 1, 0, 0, 0]
    assert states[:, 0].tolist() == [0, 7, 8, (0 + 1 + 1.25 + 5) / 4, 1, 1.25, 5]
    found, states = recycled(scores, x, visual, jnp.int32(6))
    assert found.tolist() == [0] + [2] * 6 and (states == x).all()
    # 35 of 40 go: two are merged, of twenty on two heaps; the others, far away, are too bad.
    heaps = np.r_[1e3, 2e3, 3e3, np.tile([0, 100], 10) + np.arange(20) / 8, np.full(17, 1e4)]
    scores, visual = jnp.linspace(1, 0, 40), jnp.ones(40, bool)
    found, states = recycled(scores, jnp.asarray(heaps[:, None], jnp.float32), visual, jnp.int32(5))
    (left,), (right,) = (np.flatnonzero(found[i:23:2] == 1) * 2 + i for i in (3, 4))
    assert (found[:3] == 2).all() and (found > 0).sum() == 5
    assert states[left, 0] == heaps[3:23:2].mean() and states[right, 0] == heaps[4:23:2].mean()


@pytest.mark.parametrize("name", PRUNERS)
def test_every_pruner_has_the_budgets_that_results_are_of(name):
    """Of the embedded model, docs/results.md."""
    base, twig = preset("digits")
    layers, tokens = base.text.num_layers, base.vision.num_tokens
    schedule = PRUNERS[name].schedule(layers, twig)
    for average in (48, 32, 16):
        assert 0 < schedule.budget(average, layers, tokens, 1)[0] < tokens


@pytest.mark.parametrize("name", STAGED)
def test_stages_add_up_to_the_budget(name):
    """Never below it, and by less than one token above; the last see the least."""
    for L, whole in ((32, 576), (40, 576), (16, 144), (5, 9)):
        schedule = PRUNERS[name].schedule(L, TWIG)
        layers = np.diff([0, *schedule.layers, L])
        for average in (whole, 2 * whole / 3, whole / 3, whole / 4):
            for images in (1, 3):
                R = schedule.budget(average, L, whole, images)
                seen = layers @ [images * whole, *R] / L / images
                assert average <= round(seen, 6) < average + 1
                assert list(R) == sorted(R, reverse=True) and R[-1] > 0
        assert not any(schedule.budget(whole / 3, L, whole, 0))


def test_stages_of_the_papers_models():
    """SparseVLM's own numbers; and a budget at which PyramidDrop's λ is a half, as the paper's."""
    assert sparse(32, TWIG).layers == (3, 7, 16)
    assert sparse(40, TWIG).layers == (4, 9, 20)
    assert sparse(16, TWIG).layers == (1, 3, 8)  # where two layers of 144 tokens are above 16
    assert sparse(32, TWIG).budget(6488 / 32, 32, 576, 1) == (300, 200, 110)
    assert pyramid(32, TWIG).layers == (2, 12, 22)
    assert pyramid(32, TWIG).budget(192, 32, 576, 1) == (286, 143, 71)


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
    # As deep as a twig of one layer on one: the second.
    last = [decoder[1].mean(1)[b, -1].numpy()[np.asarray(probe.is_visual[b])] for b in (0, 1)]
    np.testing.assert_allclose(deeper(probe, 3).scores, last, atol=1e-5)


# On the engine.


def stepwise(engine, one, answer, schedule, R):
    """(logits [A + 1, V] of an answer, kept at each stage), layer by layer, without padding."""

    def apply(*args, **kwargs):
        return Llava(CONFIG).apply({"params": engine.weights.base}, *args, **kwargs)

    run = jax.jit(functools.partial(apply, method="run"), static_argnums=(3, 4))

    def attention(layer, x, at, k, of):
        """`View.attention` in a layer that read x at positions `at` [S]."""
        rows = x[:, of[0]], at[None, of[0]], k, (at <= at[of[0], None])[None]
        return apply(layer, *rows, method="attention_rows").mean(1)

    visual = apply(jnp.asarray(one.pixels)[None], method="encode")
    ids = np.append(one.ids, answer)
    is_visual = np.append(one.is_visual, np.zeros(len(answer), bool))
    x = apply(ids[None], is_visual[None], visual, method="merge")
    P, at, kept = len(one.ids), np.arange(len(ids)), []
    embeddings = x[:, :P]
    spans = zip((0, *schedule.layers), (*schedule.layers, 5), (*R, 0), strict=True)
    for first, last, keep in spans:
        for layer in range(first, last):
            read, mask = x, np.tril(np.ones((1, len(at), len(at)), bool))
            x, (kv,) = run(x, at[None], mask, layer, layer + 1)
        if keep:
            n = int((at < P).sum())  # of the prompt
            now, image = at[:n], is_visual[at]
            view = View(
                x[:, :n],
                jnp.asarray(now)[None],
                jnp.asarray(is_visual)[None, :P],
                embeddings,
                jnp.asarray([keep]),
                jnp.asarray(np.flatnonzero(~image[:n]))[None],
                functools.partial(attention, last - 1, read, now, kv.k[:, :, :n]),
            )
            scores, replaced = schedule.rank(view)
            x = x if replaced is None else jnp.concatenate([replaced, x[:, n:]], axis=1)
            best = np.argsort(-np.where(image[:n], scores[0], -1), kind="stable")[:keep]
            stays = np.sort(np.append(best, np.flatnonzero(~image)))
            at, x = at[stays], x[:, stays]
            kept.append(at[is_visual[at]].tolist())
    return apply(x[:, at >= P - 1], method="logits")[0], kept


@pytest.mark.parametrize("name", STAGED)
def test_stages_equal_a_slow_pass(engine, name):
    """In every token, where each stage keeps less than the one before."""
    one = request(1, 1, 2, 5)
    rival = Rival(engine, name)
    R = rival.schedule.budget(5, 5, M, 1)
    assert R[0] > R[1] > R[2]
    result = rival.answer([one], TTP)[0]
    logits, kept = stepwise(engine, one, result.tokens, rival.schedule, R)
    assert result.kept.tolist() == kept[0]
    assert logits.argmax(-1)[: len(result.tokens)].tolist() == result.tokens.tolist()
    settings = dataclasses.replace(TTP, selector=rival.pruner.selector)
    prepared = rival.generator.batches.prepare([one], settings)
    _, signals = rival.generator.prefill(prepared, [one])
    np.testing.assert_allclose(signals.logits[0], logits[0], atol=1e-4)


def test_later_stages_that_keep_all_do_nothing(engine):
    """And the first is FastV's: the last token's attention in the layer before."""
    few = [request(1, 1, 2, 5), LARGEST]

    def by(*layers, rank=None):
        schedule = Schedule(layers, lambda *of: (4 * of[-1],) * len(layers), rank)
        return Generator(CONFIG, engine.weights.base, schedule=schedule)

    once = by(1).generate(few, dataclasses.replace(TTP, selector="fastv"))
    thrice = by(1, 2, 4, rank=last_token).generate(few, TTP)
    assert tokens(once) == tokens(thrice)
    assert [r.kept.tolist() for r in once] == [r.kept.tolist() for r in thrice]


@pytest.mark.parametrize("name", STAGED)
def test_stages_row_by_row(engine, name):
    """A row's answer does not depend on the batch, and a stage's cache has no more slots than it
    keeps; a row without images is not pruned."""
    rival = Rival(engine, name)
    together = rival.answer(asked(), TTP)
    assert tokens(rival.answer(asked()[:1], TTP)) == tokens(together[:1])
    plain = engine.generate(asked()[2:], dataclasses.replace(CALL, mode="plain"))
    assert tokens(together[2:]) == tokens(plain)
    for one, result in zip(asked(), together, strict=True):
        images = int(one.is_visual.sum()) // M
        assert len(result.kept) == rival.schedule.budget(5, 5, M, images)[0]
    running = rival.generator.start(asked(), TTP)
    slots = [cache[0].k.shape[2] for cache in running.state.caches.deep]
    without = running.program.text_slots + running.program.generated_slots
    assert slots == [without + R for R in rival.schedule.budget(5, 5, M, 2)]
    with pytest.raises(ValueError, match="cannot be asked again"):
        Session(rival.generator, TTP)
    with pytest.raises(ValueError, match=f"{name} prunes at other layers than the twig"):
        rival.answer(asked(), CALL)


@pytest.mark.parametrize("name", [n for n, p in PRUNERS.items() if p.rank is not None])
def test_a_row_is_ranked_by_itself(engine, name):
    rival = Rival(engine, name)
    few = [*asked(), request(4, 1, 8, 20)]  # so much longer than the first that it is padded more
    together = rival.ranked(few, TTP, batch=2)
    alone = rival.ranked(asked()[:1], TTP, batch=1)[0]
    # To 1e-6: attention in a batch of another size may round differently.
    np.testing.assert_allclose(together[0].scores, alone.scores, atol=1e-6)
    for before, after in zip(few, together, strict=True):
        assert (after.scores[~before.is_visual] == 0).all()
        assert len(set(after.scores[before.is_visual])) > 1 or not before.is_visual.any()


@pytest.fixture(scope="module")
def classed():
    """(an engine whose visual tokens are led by the class token's, a request of two images)."""
    one, rng = request(99, 2, 8, 8), np.random.default_rng(0)
    is_visual = np.repeat([False, True, False], [8, 2 * (M + 1), 8])
    ids = rng.integers(3, CONFIG.text.vocab_size, len(is_visual)).astype(np.int32)
    vision = dataclasses.replace(CONFIG.vision, class_token=True)
    return generator(vision=vision), dataclasses.replace(one, ids=ids, is_visual=is_visual)


@pytest.mark.parametrize("name", ["uniform", "fastervlm", "visionzip"])
def test_a_class_token_is_a_visual_token_like_others(classed, name):
    """A grid, which knows no place for it, keeps it last."""
    engine, one = classed
    (ranked,) = Rival(engine, name).ranked([one], TTP, batch=1)
    scores = ranked.scores[one.is_visual].reshape(2, M + 1)
    assert np.isfinite(scores).all()
    if name == "uniform":
        order = np.argsort(-scores[0])
        assert order.tolist() == [*(farthest_first(3) + 1).tolist(), 0]
    elif name == "fastervlm":
        np.testing.assert_allclose(scores.sum(1), 1, rtol=1e-5)  # a softmax over all of them


def test_a_tower_without_layers_has_no_class_attention():
    engine = generator(vision=dataclasses.replace(CONFIG.vision, feature_layer=0))
    one = request(1, 1, 2, 5)
    (ranked,) = Rival(engine, "random").ranked([one], TTP, batch=1)
    assert len(set(ranked.scores[one.is_visual])) == M
    with pytest.raises(ValueError, match="below the vision tower's first layer"):
        Rival(engine, "fastervlm").ranked([one], TTP, batch=1)


def test_dart_s_words_follow_the_image(seen):
    """Where one alone does, it is asked four times."""
    probe = seen[0]
    words = [int(np.flatnonzero(row)[-1]) + 1 for row in probe.is_visual]
    cut = dataclasses.replace(probe, lengths=jnp.asarray(words) + 1)
    x, kv = cut.run(1)
    sizes = cut.of_visual(jnp.abs(kv.k).sum((1, 3)))
    expected = [
        least_duplicated(own, size, jnp.tile(states[word], (4, 1)), 7)
        for own, size, states, word in zip(cut.of_visual(x), sizes, x, words, strict=True)
    ]
    np.testing.assert_array_equal(dart(cut, 7).scores, expected)


@pytest.mark.parametrize(("name", "layers"), [("pyramiddrop", 3), ("sparsevlm", 2)])
def test_no_stage_is_without_layers(name, layers):
    schedule = PRUNERS[name].schedule(layers, TWIG)
    with pytest.raises(ValueError, match=f"a decoder of {layers} layers is too shallow"):
        schedule.budget(M, layers, M, 1)


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
