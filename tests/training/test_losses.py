"""What the losses see, and what they must not see."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twig_jax.data import images
from twig_jax.data.packing import SHARED
from twig_jax.models.llava import Llava
from twig_jax.models.twig import init_twig
from twig_jax.presets import preset
from twig_jax.training.config import TrainConfig
from twig_jax.training.loop import stage_loss
from twig_jax.training.losses import normalised

STAGES = ("base", "twig")


def test_pixels_are_those_of_inference() -> None:
    """To the rounding of float32: there a table has them, from float64."""
    config, _ = preset("tiny")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 9, 9, 3), np.uint8)
    known = images.normalize(pixels, config.vision.image_mean, config.vision.image_std)
    np.testing.assert_allclose(normalised(config, pixels), known, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def losses():
    """{stage: jitted loss(trained, frozen, batch)}, made at the first use."""
    return {}


@pytest.fixture
def loss_of(losses, base, twig):
    """loss_of(stage, batch) -> (loss, metrics) of the tiny models."""

    def loss_of(stage, batch):
        if stage not in losses:
            losses[stage] = jax.jit(stage_loss(TrainConfig(stage, "", 1, preset="tiny")))
        trained, frozen = (twig, base) if stage == "twig" else (base, {})
        return losses[stage](trained, frozen, batch)

    return loss_of


def rows(batch, keep):
    return {name: x[keep] for name, x in batch.items()}


def turns_alone(batch):
    """Every turn of a one-row batch as a batch of its own, right behind the page."""
    segments = np.asarray(batch["segments"])[0]
    (page,) = np.nonzero(segments == SHARED)
    for segment in range(1, segments.max() + 1):
        (slots,) = np.nonzero(segments == segment)
        keep = np.concatenate([page, slots])
        padding = {"targets": -1, "kinds": -1}
        alone = dict(batch)
        for name in ("tokens", "is_visual", "positions", "segments", "targets", "kinds", "content"):
            empty = np.full_like(batch[name], padding.get(name, 0))
            empty[0, : len(keep)] = np.asarray(batch[name])[0, keep]
            alone[name] = jnp.asarray(empty)
        yield alone


@pytest.mark.parametrize("stage", STAGES)
def test_a_packed_row_is_the_mean_over_its_questions(loss_of, batch, stage):
    row = rows(batch, slice(0, 1))
    packed, _ = loss_of(stage, row)
    alone = list(turns_alone(row))
    assert len(alone) >= 4
    counts = [int((turn["targets"] >= 0).sum()) for turn in alone]
    assert sum(counts) == int((row["targets"] >= 0).sum())
    mean = np.average([loss_of(stage, turn)[0] for turn in alone], weights=counts)
    assert packed == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_questions_of_a_row_do_not_see_each_other(loss_of, batch, stage):
    row = rows(batch, slice(0, 1))
    first = row["segments"] == 1
    asked = row | {"targets": jnp.where(first, row["targets"], -1)}
    later = row["segments"] > 1
    assert first.any() and later.any()
    changed = asked | {"tokens": jnp.where(later, (row["tokens"] + 7) % 400, row["tokens"])}
    assert loss_of(stage, asked)[0] == loss_of(stage, changed)[0]


@pytest.mark.parametrize("stage", STAGES)
def test_padding_is_ignored(loss_of, batch, stage):
    row = rows(batch, slice(0, 1))
    padding = row["segments"] == 0
    assert padding.any()
    spoiled = row | {
        "tokens": jnp.where(padding, 99, row["tokens"]),
        "positions": jnp.where(padding, 5, row["positions"]),
    }
    (loss, metrics), (same, same_metrics) = loss_of(stage, row), loss_of(stage, spoiled)
    assert loss == same
    jax.tree.map(np.testing.assert_array_equal, metrics, same_metrics)


@pytest.mark.parametrize("stage", STAGES)
def test_the_page_and_the_question_matter(loss_of, batch, stage):
    row = rows(batch, slice(0, 1))
    loss, _ = loss_of(stage, row)
    assert loss != loss_of(stage, row | {"pixels": row["pixels"][:, :, ::-1]})[0]
    asked = (row["segments"] > 0) & (row["targets"] < 0)
    assert asked.any()
    assert loss != loss_of(stage, row | {"tokens": jnp.where(asked, 9, row["tokens"])})[0]


def test_a_twig_of_all_layers_above_the_trunk_is_the_base(loss_of, losses, base, batch):
    row = rows(batch, slice(0, 1))
    loss_of("twig", row)
    config, twig = preset("tiny")
    loss, metrics = losses["twig"](init_twig(base, config.text, twig), base, row)
    expected, base_metrics = loss_of("base", row)
    assert loss == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_array_equal(metrics["accuracy"], base_metrics["accuracy"])


@pytest.mark.parametrize("stage", STAGES)
def test_metrics_are_sums_and_counts(loss_of, batch, stage):
    row = rows(batch, slice(0, 1))
    _, metrics = loss_of(stage, row)
    right, count = metrics["accuracy"]
    assert count == (row["targets"] >= 0).sum() and 0 <= right <= count
    assert metrics["content_accuracy"][1] == row["content"].sum()
    turns = sum(value[1] for name, value in metrics.items() if name.startswith("first/"))
    assert turns == row["segments"].max()


def test_content_weight_weighs_content(loss_of, base, batch):
    row = rows(batch, slice(0, 1))
    parts = [
        loss_of("base", row | {"targets": jnp.where(row["content"] == kind, row["targets"], -1)})[0]
        for kind in (True, False)
    ]
    content, wording = row["content"].sum(), ((row["targets"] >= 0) & ~row["content"]).sum()
    heavy = stage_loss(TrainConfig("base", "", 1, preset="tiny", content_weight=3.0))
    loss, _ = jax.jit(heavy)(base, {}, row)
    expected = (3 * content * parts[0] + wording * parts[1]) / (3 * content + wording)
    assert loss == pytest.approx(float(expected), rel=1e-5)


def test_what_patches_show_against_the_formula(base, batch):
    """Each name beside the words that do not name its patch; ink and digits count four times."""
    row, (config, _) = rows(batch, slice(0, 1)), preset("tiny")
    loss, metrics = jax.jit(stage_loss(TrainConfig("vision", "", 1, preset="tiny")))(base, {}, row)
    pixels = normalised(config, row["pixels"])
    visual = Llava(config).apply({"params": base}, pixels, method="encode")[0]
    words = np.asarray(base["text"]["embed_tokens"]["embedding"], np.float64)
    logits = np.asarray(visual, np.float64) @ words.T * 10 / np.square(words).sum(-1).mean()
    names = np.asarray(row["patch_words"][0])
    inked, total = names[:, 3] >= 0, 0.0
    assert 0 < inked.sum() < 144
    for g, name in enumerate(("digit", "row", "column", "shade", "size")):
        (patches,) = np.nonzero(names[:, g] >= 0)
        own = logits[patches, names[patches, g]]
        others = [np.delete(logits[p], names[p][names[p] >= 0]) for p in patches]
        ce = [np.logaddexp.reduce([*x, o]) - o for o, x in zip(own, others, strict=True)]
        mean = np.average(ce, weights=np.where(inked[patches], 4, 1))
        total += mean * (4 if name == "digit" else 1)
        best = own > [x.max() for x in others]
        assert metrics[f"ink/{name}"].tolist() == [(best & inked[patches]).sum(), inked.sum()]
    assert loss == pytest.approx(total, rel=1e-5)


def gradient(stage, trained, frozen, batch, **settings):
    """(loss, gradient) of a stage under settings of the run."""
    loss = stage_loss(TrainConfig(stage, "", 1, preset="tiny", **settings))
    (value, _), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(trained, frozen, batch)
    return value, grads


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("change", [{"head_chunk": 64}, {"head_chunk": 100}, {"remat": True}])
def test_saving_memory_changes_nothing(base, twig, batch, stage, change):
    """The sums are the same ones in another order, so float32 rounding is all that may differ."""
    models = (twig, base) if stage == "twig" else (base, {})
    whole, expected = gradient(stage, *models, batch, head_chunk=1000)
    loss, grads = gradient(stage, *models, batch, **change)
    np.testing.assert_allclose(loss, whole, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, expected)


def test_logits_of_a_whole_batch_never_exist(base, twig, batch):
    config, _ = preset("tiny")
    V = config.text.vocab_size

    def largest(chunk):
        """The most numbers that an array over the vocabulary holds."""
        loss = stage_loss(TrainConfig("twig", "", 1, preset="tiny", head_chunk=chunk))
        program = jax.jit(jax.grad(loss, has_aux=True)).lower(twig, base, batch).as_text()
        found = [
            [int(n) for n in dims.split("x")]
            for dims in re.findall(r"tensor<([\dx]+)xf32>", program)
        ]
        return max(math.prod(shape) for shape in found if V in shape)

    B, S = batch["tokens"].shape
    assert largest(1000) == B * S * V
    assert largest(16) <= max(B * 16, config.text.hidden_size) * V


def test_a_base_in_bfloat16_trains_a_float32_twig(base, twig, batch):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    loss, grads = gradient("twig", twig, half, batch, head_chunk=64)
    expected, exact = gradient("twig", twig, base, batch)
    assert loss == pytest.approx(float(expected), rel=1e-2)  # eight bits of mantissa
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    flat, exact = (jnp.concatenate([g.ravel() for g in jax.tree.leaves(t)]) for t in (grads, exact))
    cosine = flat @ exact / jnp.linalg.norm(flat) / jnp.linalg.norm(exact)
    assert cosine > 0.99


def test_unknown_stage():
    with pytest.raises(ValueError, match="vision, base, twig"):
        stage_loss(TrainConfig("bark", "", 1, preset="tiny"))
