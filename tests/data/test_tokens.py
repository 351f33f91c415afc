"""The embedded tokenizer, and prompts as ids."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twig_jax.assets.digits import make_assets
from twig_jax.data import conversation, wordings
from twig_jax.data.digits import ASSETS
from twig_jax.data.tokens import load_tokenizer, prompt_ids

IMAGE_ID = 3
TOKENIZER = load_tokenizer(ASSETS)


def encode(text):
    return TOKENIZER.encode(text, add_special_tokens=False)


def test_special_tokens_and_size(tokenizer):
    assert len(tokenizer) <= 640
    names = ["<pad>", "<s>", "</s>", "<image>"]
    assert tokenizer.convert_tokens_to_ids(names) == [0, 1, 2, IMAGE_ID]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


def test_bos_comes_only_when_asked_for(tokenizer):
    plain = tokenizer.encode("What?", add_special_tokens=False)
    assert 1 not in plain
    assert tokenizer.encode("What?") == [1, *plain]


@pytest.mark.parametrize("word", [*wordings.vocabulary(), "blank", "ASSISTANT:"])
def test_every_word_with_its_space_is_one_token(word):
    assert len(encode(f" {word}")) == 1
    # Punctuation does not change the word's token.
    assert encode(f" {word},")[0] == encode(f" {word}.")[0] == encode(f" {word}")[0]


@pytest.mark.parametrize("piece", [",", ".", "?", "\n", " ", "USER:"])
def test_punctuation_and_markers_are_one_token(piece):
    assert len(encode(piece)) == 1


@pytest.mark.parametrize("word", sorted({ask.split()[0] for ask in wordings.asks()}))
def test_the_first_word_of_a_question_is_one_token(word):
    assert len(encode(f"\n{word}")) == 2


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_round_trip(text):
    assert TOKENIZER.decode(encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("USERASSISTANT:  \n.,?B3sevenéß漢🙂\t\u0301")))
def test_text_close_to_the_data_survives_the_round_trip(text):
    assert TOKENIZER.decode(encode(text)) == text


def test_prompt_ids_puts_slots_between_chunks(tokenizer):
    text = "USER: <image>\nWhat? ASSISTANT:"
    ids, visual = prompt_ids(tokenizer, text, IMAGE_ID, 5, images=1)
    before, after = encode("USER: "), encode("\nWhat? ASSISTANT:")
    assert ids.tolist() == [1, *before, *[IMAGE_ID] * 5, *after]
    assert visual.tolist() == [False] * (1 + len(before)) + [True] * 5 + [False] * len(after)
    assert ids.dtype == np.int32
    assert visual.dtype == bool


@pytest.mark.parametrize("text", ["<image><image>", "<image> and\n<image>", "a <image>b<image>"])
def test_prompt_ids_with_two_images(tokenizer, text):
    ids, visual = prompt_ids(tokenizer, text, 77, 4)
    assert (ids[visual] == 77).all()
    assert visual.sum() == 8
    assert tokenizer.decode(ids[~visual][1:]) == text.replace("<image>", "")


def test_prompt_ids_of_text_alone(tokenizer):
    ids, visual = prompt_ids(tokenizer, "What?", IMAGE_ID, 5, images=0)
    assert ids.tolist() == [1, *encode("What?")]
    assert not visual.any()


def test_prompt_ids_of_nothing_is_bos(tokenizer):
    assert prompt_ids(tokenizer, "", IMAGE_ID, 5)[0].tolist() == [1]


@pytest.mark.parametrize(("text", "images"), [("no", 1), ("<image>", 0), ("<image><image>", 3)])
def test_prompt_ids_refuses_other_numbers_of_images(tokenizer, text, images):
    message = rf"{text.count('<image>')} <image> markers but {images} images"
    with pytest.raises(ValueError, match=message):
        prompt_ids(tokenizer, text, IMAGE_ID, 5, images=images)


def test_prompt_ids_of_a_conversation_ends_answers(tokenizer):
    text = conversation.prompt("llava_hf", [("What?", "seven"), ("Where?", None)], images=1)
    ids, visual = prompt_ids(tokenizer, text, IMAGE_ID, 3, images=1)
    assert (ids == tokenizer.eos_token_id).sum() == 1
    assert tokenizer.decode(ids[~visual][1:]) == text.replace("<image>", "")


def test_load_tokenizer_names_the_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")


def test_load_tokenizer_names_a_folder_without_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer.*tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_the_assets_can_be_recreated(tmp_path, monkeypatch):
    monkeypatch.setattr(make_assets, "FOLDER", tmp_path)
    make_assets.make_scans()
    make_assets.make_tokenizer()
    with np.load(ASSETS / "scans.npz") as stored, np.load(tmp_path / "scans.npz") as made:
        for name in ("images", "labels", "order"):
            np.testing.assert_array_equal(stored[name], made[name])
    assert load_tokenizer(tmp_path).get_vocab() == TOKENIZER.get_vocab()
