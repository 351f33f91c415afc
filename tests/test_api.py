"""The short way in."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from PIL import Image

from twig_jax import api
from twig_jax.checkpoints.twig import write_twig
from twig_jax.config import INT8
from twig_jax.data import conversation
from twig_jax.data.digits import ASSETS
from twig_jax.data.tokens import Conventions, load_tokenizer, prompt_ids
from twig_jax.models.int8 import quantised
from twig_jax.models.twig import fresh_p_head
from twig_jax.sharding.mesh import make_mesh


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint folder .*nowhere"):
        api.load(tmp_path / "nowhere")


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        api.load(tmp_path)


def test_a_missing_tokenizer_is_found_before_the_weights_are_read(tmp_path):
    shutil.copy(ASSETS / "base" / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        api.load(tmp_path)


@pytest.fixture(scope="module")
def model():
    return api.load()


@pytest.fixture(scope="module")
def digits(model):
    return model.generator


def equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize(
    "image", ["a.png", b"PNG", Path("a.png"), Image.new("RGB", (8, 8)), np.zeros((8, 8), "u1")]
)
def test_a_single_image_must_be_in_a_list(model, image, raw):
    """The characters of a path and the rows of an array are no images."""
    with pytest.raises(ValueError, match="images are a list"):
        model.request("What is it?", image, raw=raw)


def test_images_in_one_array(model):
    several = np.random.default_rng(0).integers(0, 255, (2, 8, 8, 3), np.uint8)
    one, other = (model.request("<image> and <image>?", x) for x in (several, [*several]))
    np.testing.assert_array_equal(one.pixels, other.pixels)


def without(tree, name):
    return {other: part for other, part in tree.items() if other != name}


@pytest.mark.parametrize("name", conversation.TEMPLATES)
def test_a_question_behind_an_answer_that_was_cut_off(model, llama, name):
    """Its tokens are those of the whole conversation's text."""

    def ids(text):
        return prompt_ids(tokenizer, text, 777, 0)[0].tolist()

    tokenizer = load_tokenizer(llama)
    read = Conventions("llava", False, name)
    model = dataclasses.replace(model, tokenizer=tokenizer, conventions=read)
    said = conversation.prompt(name, [("What", None)])
    said += conversation.template(name).answer_start + "the cat"
    session = SimpleNamespace(ids=ids(said), ask=lambda asked, *_, **__: asked.tolist())
    asked = api.Chat(model, session).ask("in a picture")
    assert ids(said) + asked == ids(said + conversation.following(name, "in a picture"))


@pytest.mark.parametrize("p_head", [False, True])
def test_loading_in_int8(tmp_path, digits, p_head):
    """Prompts are read by the exact twig, which needs no head; drafting needs no P-Head."""
    base, twig = digits.weights.base, without(digits.weights.twig, "p_head")
    if p_head:
        twig = {**twig, "p_head": fresh_p_head(digits.config.text)}
    grown = dataclasses.replace(digits.twig_config, p_head=p_head)
    write_twig(tmp_path, twig, grown, base, digits.config, "float32")
    found = {how: api.load("digits", tmp_path, int8=how).generator.weights for how in INT8}
    for weights in found.values():
        equal(weights.twig, without(twig, "lm_head"))
        equal(weights.int8, quantised(without(twig, "p_head")))
    equal(found["twig"].base, base)
    equal(found["all"].base, quantised(base))


def test_a_base_in_int8_needs_no_twig(digits):
    """And is put into its shardings as any other."""
    weights = api.load(ASSETS / "base", int8="all", mesh=make_mesh(2, 2, 2)).generator.weights
    equal(weights.base, quantised(digits.weights.base))
    values, scale = weights.base["text"]["lm_head"]["kernel"]
    assert values.sharding.spec == P("tensor", "fsdp") and scale.sharding.spec == P("tensor")
    assert weights.drafter is None


def test_int8_of_what_is_not_there():
    with pytest.raises(ValueError, match="no int8 'base'; there are: twig, all"):
        api.load(int8="base")
    with pytest.raises(ValueError, match="needs a twig"):
        api.load(ASSETS / "base", int8="twig")


@pytest.mark.parametrize("int8", [None, "all"])
def test_a_twig_of_another_base_is_refused(tmp_path, int8):
    """Whatever becomes of the base's weights."""
    shutil.copytree(ASSETS / "twig", tmp_path / "twig")
    notes = tmp_path / "twig" / "twig.json"
    notes.write_text(json.dumps(json.loads(notes.read_text()) | {"base_fingerprint": "other"}))
    with pytest.raises(ValueError, match="grew on another base"):
        api.load("digits", tmp_path / "twig", int8=int8)
