"""The embedded tokenizer, and prompts as ids."""

import json
import pickle
import sys

import numpy as np
import pytest
import sentencepiece
import transformers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, normalizers

from tests.llama import PIECES
from twig_jax.assets.digits import make_assets
from twig_jax.data import conversation, wordings
from twig_jax.data.digits import ASSETS
from twig_jax.data.tokens import (
    answer_ids,
    load_tokenizer,
    prompt_ids,
)

IMAGE_ID = 3
TOKENIZER = load_tokenizer(ASSETS / "base")


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


def test_prompt_ids_refuses_half_a_character(tokenizer):
    with pytest.raises(ValueError, match="not Unicode"):
        prompt_ids(tokenizer, "What? \ud83d", IMAGE_ID, 5)


def test_prompt_ids_of_a_conversation_ends_answers(tokenizer):
    text = conversation.prompt("llava_hf", [("What?", "seven"), ("Where?", None)], images=1)
    ids, visual = prompt_ids(tokenizer, text, IMAGE_ID, 3, images=1)
    assert (ids == tokenizer.eos_token_id).sum() == 1
    assert tokenizer.decode(ids[~visual][1:]) == text.replace("<image>", "")


SLOTS = 9


@pytest.fixture(scope="session")
def pieces(llama):
    """What sentencepiece itself makes of a text."""
    return sentencepiece.SentencePieceProcessor(model_file=str(llama / "tokenizer.model")).encode


def write(folder, name, **content):
    (folder / f"{name}.json").write_text(json.dumps(content))


def with_marker(tokenizer):
    """The tokenizer with a token for the marker, and that token's id."""
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)])
    return tokenizer, tokenizer.convert_tokens_to_ids("<image>")


texts = st.lists(
    st.sampled_from([*PIECES, "<image>", "<image>", " ", "  ", "\n", "é", "漢", "🙂", "▁"]),
    max_size=9,
).map("".join)
anything = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@anything
@given(text=texts)
@example(text="")
@example(text="<image>")
@example(text="<image><image>\nWhat?<image>")
@example(text="in <image> and <image> the cat")
@example(text="What.  On       earth?   ")
def test_llava_s_ids_are_sentencepiece_s(llama_tokenizer, pieces, text):
    ids, visual = prompt_ids(llama_tokenizer, text, 777, SLOTS)
    first, *rest = map(pieces, text.split("<image>"))
    assert ids.tolist() == [1, *first] + [i for chunk in rest for i in [777] * SLOTS + chunk]
    assert (ids[visual] == 777).all() and visual.sum() == SLOTS * len(rest)


@pytest.fixture(scope="session")
def llama_tokenizer(llama):
    return load_tokenizer(llama)


def test_llava_s_tokenizer_survives_pickling(llama_tokenizer):
    """As it goes to processes that read data."""
    again = pickle.loads(pickle.dumps(llama_tokenizer))
    for text in (" <image> in", "USER: What</s>USER: on", "▁a  b"):
        assert again.encode(text) == llama_tokenizer.encode(text)


@pytest.fixture(scope="session", params=[True, False])
def stock_tokenizer(request, llama):
    """The same as transformers loads it, with and without BOS."""
    return transformers.LlamaTokenizer.from_pretrained(llama, add_bos_token=request.param)


@anything
@given(text=texts)
def test_llava_s_rule_holds_for_any_tokenizer(stock_tokenizer, text):
    chunks = [stock_tokenizer(chunk).input_ids for chunk in text.split("<image>")]
    lead = stock_tokenizer("").input_ids  # BOS, where there is one
    expected = chunks[0] + [i for c in chunks[1:] for i in [777] * SLOTS + c[len(lead) :]]
    assert prompt_ids(stock_tokenizer, text, 777, SLOTS)[0].tolist() == expected


@pytest.mark.parametrize("legacy", [True, False])
def test_text_after_an_answer_s_end_is_as_the_files_say(llama, tmp_path, pieces, legacy):
    (tmp_path / "tokenizer.model").write_bytes((llama / "tokenizer.model").read_bytes())
    write(tmp_path, "tokenizer_config", legacy=legacy)
    ids, _ = prompt_ids(load_tokenizer(tmp_path), "the cat</s>USER a", 777, SLOTS)
    # The space before a text is put before the second part too, or before the first alone.
    after = pieces("USER a") if legacy else pieces("1USER a")[len(pieces("1")) :]
    assert ids.tolist() == [1, *pieces("the cat"), 2, *after]
    assert (after == pieces("USER a")) == legacy


def test_a_model_file_without_settings_is_llama_s(llama, tmp_path, pieces):
    (tmp_path / "tokenizer.model").write_bytes((llama / "tokenizer.model").read_bytes())
    ids, _ = prompt_ids(load_tokenizer(tmp_path), "the cat</s>USER", 777, SLOTS)
    assert ids.tolist() == [1, *pieces("the cat"), 2, *pieces("USER")]


LAYOUTS = {
    "original": {"architectures": ["LlavaLlamaForCausalLM"]},
    "hf": {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tokenizer_s_file_is_read_as_it_is(llama, tmp_path, pieces, layout):
    """Whatever class is named beside it; the file puts a space before every part of a text."""
    whole = load_tokenizer(llama)
    whole.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    whole.backend_tokenizer.pre_tokenizer = None
    whole.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config", tokenizer_class="LlamaTokenizer", bos_token="<s>")
    write(tmp_path, "config", **LAYOUTS[layout])
    text = "USER: <image> and <image>\nthe cat"
    ids, _ = prompt_ids(load_tokenizer(tmp_path), text, 777, SLOTS)
    expected = [1]
    for chunk in text.split("<image>"):
        expected += [*([777] * SLOTS * (len(expected) > 1)), *pieces(chunk)]
    assert ids.tolist() == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda model: setattr(model.trainer_spec, "model_type", 1),
            "no tokenizer of Llama's kind",
        ),
        (
            lambda model: setattr(model.normalizer_spec, "add_dummy_prefix", False),
            "puts no space before a text",
        ),
    ],
)
def test_a_model_file_of_another_kind_is_refused(llama, tmp_path, change, message):
    model = ModelProto.FromString((llama / "tokenizer.model").read_bytes())
    change(model)
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_special_tokens_without_a_name_are_llama_s(llama, tmp_path, pieces):
    (tmp_path / "tokenizer.model").write_bytes((llama / "tokenizer.model").read_bytes())
    write(tmp_path, "tokenizer_config", bos_token="", eos_token="", unk_token="")
    assert load_tokenizer(tmp_path).encode("the cat</s>") == [1, *pieces("the cat"), 2]


def test_a_missing_sentencepiece_is_named(llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ImportError, match="pip install sentencepiece protobuf"):
        load_tokenizer(llama)


@pytest.fixture(scope="session")
def processor(llama):
    """transformers' own, with a marker token."""
    tokenizer, _ = with_marker(transformers.LlamaTokenizer.from_pretrained(llama))
    kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    return transformers.LlavaProcessor(
        kind(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


@anything
@given(text=texts)
@example(text="USER: <image>\nWhat? ASSISTANT:")
@example(text="<image><image> the cat")
def test_hf_ids_are_the_processor_s(processor, text):
    images = [np.zeros((30, 40, 3), np.uint8)] * text.count("<image>")
    expected = processor(text=text, images=images or None)["input_ids"][0]
    ids, visual = prompt_ids(
        processor.tokenizer, text, processor.image_token_id, SLOTS, len(images), tokenize="hf"
    )
    assert ids.tolist() == list(expected)
    assert visual.tolist() == [token == processor.image_token_id for token in expected]
    assert visual.sum() == SLOTS * len(images)


def test_the_two_ways_differ_for_llama(llama_tokenizer):
    tokenizer, marker = with_marker(load_tokenizer(llama_tokenizer.name_or_path))
    text = "USER: <image>the cat"
    llava, hf = (prompt_ids(tokenizer, text, marker, 4, tokenize=way)[0] for way in ("llava", "hf"))
    assert llava.tolist() != hf.tolist()


@pytest.mark.parametrize("name", conversation.TEMPLATES)
def test_the_two_ways_agree_for_the_embedded_tokenizer(tokenizer, name):
    for question in ("What digit is in row B, column 3?", "<image>\n<image> and <image>?"):
        text = conversation.prompt(name, [("Where?", " B 3"), (question, None)], images=1)
        llava = prompt_ids(tokenizer, text, IMAGE_ID, 4)
        hf = prompt_ids(tokenizer, text, IMAGE_ID, 4, tokenize="hf")
        np.testing.assert_array_equal(llava, hf)


def test_hf_needs_the_model_s_marker(llama_tokenizer, tokenizer):
    with pytest.raises(ValueError, match="image token is 777, but the tokenizer has no <image>"):
        prompt_ids(llama_tokenizer, "<image>", 777, 4, tokenize="hf")
    with pytest.raises(ValueError, match="image token is 777, but the tokenizer has 3 for <image>"):
        prompt_ids(tokenizer, "<image>", 777, 4, tokenize="hf")


@pytest.fixture(scope="session")
def marked(llama):
    """LLaVA's tokenizer with a token for the marker, and that token's id."""
    return with_marker(load_tokenizer(llama))


words = st.lists(st.sampled_from([*PIECES, "é", "漢", "🙂", "\n", "12"]), min_size=1, max_size=4)


@anything
@given(
    turns=st.lists(
        st.tuples(
            st.lists(st.sampled_from(["<image>", *PIECES]), max_size=4).map(" ".join),
            words.map(" ".join),
        ),
        min_size=1,
        max_size=3,
    ),
    name=st.sampled_from(["vicuna_v1", "llava_hf", "llava_llama_2"]),
    tokenize=st.sampled_from(["llava", "hf"]),
)
def test_tokens_of_answers_are_the_answers(marked, turns, name, tokenize):
    """What each run of answer tokens says is the answer with its end, and no more."""
    tokenizer, image_id = marked
    text, spans = conversation.answers(name, turns)
    ids, visual, inside = answer_ids(tokenizer, text, spans, image_id, SLOTS, tokenize=tokenize)
    expected, slots = prompt_ids(tokenizer, text, image_id, SLOTS, tokenize=tokenize)
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(visual, slots)
    assert not (inside & visual).any()
    edges = np.flatnonzero(np.diff(np.pad(inside.astype(int), 1)))
    said = [tokenizer.decode(ids[a:b]).strip() for a, b in edges.reshape(-1, 2)]
    end = conversation.template(name).answer_end
    assert said == [(answer + end).strip() for _, answer in turns]


def test_a_tokenizer_without_places_is_refused(tokenizer):
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow does not say where"):
        answer_ids(Slow(), "a", [(0, 1)], IMAGE_ID, SLOTS)


def test_another_way_to_tokenize_is_refused(tokenizer):
    with pytest.raises(ValueError, match="tokenize is 'HF', expected llava or hf"):
        prompt_ids(tokenizer, "What?", IMAGE_ID, 4, tokenize="HF")


def test_load_tokenizer_names_the_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")


def test_load_tokenizer_names_a_folder_without_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer.*tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_the_assets_can_be_recreated(tmp_path, monkeypatch):
    monkeypatch.setattr(make_assets, "FOLDER", tmp_path)
    (tmp_path / "base").mkdir()
    make_assets.make_scans()
    make_assets.make_tokenizer()
    with np.load(ASSETS / "scans.npz") as stored, np.load(tmp_path / "scans.npz") as made:
        for name in ("images", "labels", "order"):
            np.testing.assert_array_equal(stored[name], made[name])
    assert load_tokenizer(tmp_path / "base").get_vocab() == TOKENIZER.get_vocab()
