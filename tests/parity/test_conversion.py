"""An original LLaVA folder, converted, is the same model to transformers: ids, pixels, logits."""

import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.checkpoints.original import original
from tests.llama import PIECES, SIZE
from tests.parity.test_hf import TOLERANCE, error, our_logits, their_logits, theirs, tiny, weights
from twig_jax import api
from twig_jax.checkpoints.llava import open_llava, write_llava
from twig_jax.data import conversation
from twig_jax.data.images import preprocess
from twig_jax.data.tokens import Conventions, conventions, load_tokenizer, prompt_ids

ROOT = Path(__file__).resolve().parents[2]
TURNS = [("What is in the picture, the cat?", "12 in a picture"), ("What on earth?", None)]
SLOTS = 9


@pytest.fixture(scope="module")
def folders(tmp_path_factory, draw, llama):
    """(original folder, its CLIP folder, what launch.convert makes of both), float32."""
    folder = tmp_path_factory.mktemp("conversion")
    source, tower, out = (folder / name for name in ("original", "clip", "out"))
    config = tiny(vocab=SIZE)
    write_llava(folder / "hf", weights(config, draw), config, "float32")
    shutil.copytree(llama, source)
    original(source, folder / "hf", tower=tower)
    command = [sys.executable, "-m", "launch.convert", "--to", "hf", "--verify"]
    command += ["--source", source, "--vision_source", tower, "--out", out]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    return source, tower, out


@pytest.fixture(scope="module")
def model(folders):
    """transformers' of the converted folder."""
    return theirs(folders[2])


@pytest.fixture(scope="module")
def tokenizers(folders):
    """(ours of the original folder, transformers' of the converted one)."""
    return load_tokenizer(folders[0]), transformers.AutoTokenizer.from_pretrained(folders[2])


def test_logits(folders, tokenizers, model):
    """Two turns with an image; the vocabulary got room for the image and padding tokens."""
    with open_llava(*folders[:2]) as (config, source):
        params = jax.tree.map(np.array, source.tree())
    assert (config.text.vocab_size, config.image_token_id) == (SIZE, SIZE)
    text = conversation.prompt(conventions(folders[0]).template, TURNS, images=1)
    ids, _ = prompt_ids(tokenizers[0], text, config.image_token_id, SLOTS)
    pixels = np.random.default_rng(0).standard_normal((1, 1, 24, 24, 3), np.float32)
    assert model.config.text_config.vocab_size == 384
    expected = their_logits(model, ids[None].astype(np.int64), pixels)
    found = our_logits(config, params, ids[None], pixels)
    assert error(found, expected[..., :SIZE]) <= TOLERANCE
    assert (expected.argmax(-1) < SIZE).all()


texts = st.lists(st.sampled_from([*PIECES, "</s>", " ", "  ", "\n", "é", "▁"]), max_size=9)


@settings(max_examples=100, deadline=None)
@given(text=texts.map("".join))
@example(text=" the cat")
@example(text="the cat</s>USER: in")
@example(text="the cat</s> in")
def test_the_tokenizer_s_ids(tokenizers, text):
    ours, converted = tokenizers
    assert converted(text).input_ids == ours(text).input_ids


def test_the_tokenizer_s_special_tokens(tokenizers, model):
    _, converted = tokenizers
    assert (converted.bos_token_id, converted.eos_token_id) == (1, 2)
    assert converted.pad_token_id == model.generation_config.pad_token_id == SIZE + 1
    assert converted.convert_tokens_to_ids("<image>") == model.config.image_token_id == SIZE
    assert converted.model_max_length == 2048


@pytest.fixture(scope="module")
def image():
    """Not square, so that padding and cropping differ."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8))


def test_a_question_is_read_as_from_the_original(folders, tokenizers, image):
    source, _, converted = folders
    assert conventions(converted) == conventions(source) == Conventions("llava", True, "vicuna_v1")
    found = api.load(converted).request("What is the cat?", [image])
    text = conversation.prompt("vicuna_v1", [("What is the cat?", None)], images=1)
    ids, visual = prompt_ids(tokenizers[0], text, SIZE, SLOTS)
    np.testing.assert_array_equal(found.ids, ids)
    np.testing.assert_array_equal(found.is_visual, visual)
    np.testing.assert_array_equal(found.pixels[0], preprocess(image, 24, pad=True))


def test_the_processor_s_ids_and_pixels(folders, tokenizers, image):
    """transformers' processor pads as LLaVA does; its ids lack the space after an image alone."""
    processor = transformers.AutoProcessor.from_pretrained(folders[2])
    text = conversation.prompt("vicuna_v1", TURNS, images=1)
    batch = processor(images=image, text=text, return_tensors="np")
    whole, _ = prompt_ids(tokenizers[1], text, SIZE, SLOTS, tokenize="hf")
    np.testing.assert_array_equal(batch["input_ids"][0], whole)
    ids, visual = prompt_ids(tokenizers[0], text, SIZE, SLOTS)
    space = int(np.flatnonzero(visual)[-1]) + 1
    assert tokenizers[0].convert_ids_to_tokens(int(ids[space])) == "▁"
    np.testing.assert_array_equal(whole, np.delete(ids, space))
    pixels = preprocess(image, 24, pad=True)
    np.testing.assert_allclose(batch["pixel_values"][0].transpose(1, 2, 0), pixels, atol=1e-5)
