"""Conversation templates against the published forms."""

import pytest

from twig_jax.data import conversation


def test_llava_hf_is_the_model_card_form():
    text = conversation.prompt("llava_hf", [("What is this?", None)], images=1)
    assert text == "USER: <image>\nWhat is this? ASSISTANT:"


def test_llava_hf_with_several_turns():
    turns = [("One?", "Yes."), ("Two?", "No."), ("Three?", None)]
    assert conversation.prompt("llava_hf", turns, images=1) == (
        "USER: <image>\nOne? ASSISTANT: Yes.</s>USER: Two? ASSISTANT: No.</s>"
        "USER: Three? ASSISTANT:"
    )


# As the chat template of the llava-hf checkpoints renders: images first, then text.
CHAT = (
    "{% for turn in messages %}{{ turn.role | upper }}: "
    "{% for part in turn.content if part.type == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in turn.content if part.type == 'text' %}{{ part.text }} {% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("answers", [["Yes."], ["Yes.", "No."], [None], ["Yes.", "No.", None]])
def test_llava_hf_and_the_chat_template(tokenizer, answers, images):
    """They differ in what ends an answer: a space there, what LLaVA was trained with here."""
    turns = [(f"Question {i}?", answer) for i, answer in enumerate(answers)]
    messages = []
    for question, answer in turns:
        shown = [] if messages else [{"type": "image"}] * images
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": question}]})
        if answer is not None:
            content = [{"type": "text", "text": answer}]
            messages.append({"role": "assistant", "content": content})
    rendered = tokenizer.apply_chat_template(
        messages,
        chat_template=CHAT,
        tokenize=False,
        add_generation_prompt=answers[-1] is None,
    )
    assert conversation.prompt("llava_hf", turns, images).replace("</s>", " ") == rendered


def test_vicuna_v1_is_llava_s():
    assert conversation.prompt("vicuna_v1", [("Hi?", "Hello."), ("And?", None)], images=1) == (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
        "USER: <image>\nHi? ASSISTANT: Hello.</s>USER: And? ASSISTANT:"
    )


def test_llava_llama_2_is_llava_s():
    turns = [("Hi?", "Hello."), ("And?", "So."), ("Then?", None)]
    assert conversation.prompt("llava_llama_2", turns, images=1) == (
        "[INST] <<SYS>>\nYou are a helpful language and vision assistant. You are able to "
        "understand the visual content that the user provides, and assist the user with a variety "
        "of tasks using natural language.\n<</SYS>>\n\n<image>\nHi? [/INST] Hello. </s>"
        "<s>[INST] And? [/INST] So. </s><s>[INST] Then? [/INST]"
    )


def test_mistral_instruct_is_llava_s():
    turns = [("Hi?", "Hello."), ("And <image>?", "So."), ("Then?", None)]
    assert conversation.prompt("mistral_instruct", turns, images=1) == (
        "[INST] Hi? [/INST] Hello. </s>[INST] And <image>? [/INST] So. </s>[INST] Then? [/INST]"
    )


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("vicuna_v1", " ASSISTANT: Hello.</s>"),
        ("llava_hf", " ASSISTANT: Hello.</s>"),
        ("llava_llama_2", " [/INST] Hello. </s>"),
        ("mistral_instruct", " [/INST] Hello. </s>"),
        ("plain", "Hello.\n"),
    ],
)
def test_a_known_last_answer_is_ended(name, end):
    assert conversation.prompt(name, [("Hi?", "Hello.")]).endswith(f"Hi?{end}")


def test_plain_is_the_text_alone():
    assert conversation.prompt("plain", [("", "a cat")], images=1) == "<image>a cat\n"
    assert conversation.prompt("plain", [("<image>\nWhat?", None)]) == "<image>\nWhat?\n"


def test_a_marker_in_the_text_is_kept():
    text = conversation.prompt("llava_hf", [("Look: <image> What?", None)], images=1)
    assert text == "USER: Look: <image> What? ASSISTANT:"


def test_a_marker_in_a_later_turn_is_kept():
    turns = [("Hi?", "Hello."), ("<image>\nWhat?", None)]
    text = conversation.prompt("llava_hf", turns, images=1)
    assert text == "USER: Hi? ASSISTANT: Hello.</s>USER: <image>\nWhat? ASSISTANT:"


def test_two_images_lead_the_first_turn():
    text = conversation.prompt("llava_hf", [("Compare.", None)], images=2)
    assert text == "USER: <image>\n<image>\nCompare. ASSISTANT:"


@pytest.mark.parametrize("name", conversation.TEMPLATES)
def test_a_prompt_is_a_head_and_turns(name):
    parts = conversation.head(name, 1) + conversation.turn(name, "A?", "b")
    assert conversation.prompt(name, [("A?", "b")], images=1) == parts


@pytest.mark.parametrize(
    ("name", "turns", "message"),
    [
        (
            "vicuna",
            [("A?", None)],
            "unknown conversation template 'vicuna', expected one of vicuna_v1",
        ),
        ("vicuna", [("A?", None)], r"llava_llama_2.* \(nearest: vicuna_v1\)$"),
        ("???", [("A?", None)], "mistral_instruct, plain$"),
        ("plain", [], "at least one turn"),
        ("plain", [("A?", None), ("B?", None)], "turn 1 of 2 has no answer"),
    ],
)
def test_bad_conversations_are_refused(name, turns, message):
    with pytest.raises(ValueError, match=message):
        conversation.prompt(name, turns)


@pytest.mark.parametrize("name", conversation.TEMPLATES)
@pytest.mark.parametrize("images", [0, 2])
def test_answers_lie_where_they_are_said_to(name, images):
    turns = [("Who?", "me"), ("Who?", ""), ("And me?", "me ASSISTANT: me</s>")]
    text, spans = conversation.answers(name, turns, images)
    assert text == conversation.prompt(name, turns, images)
    form = conversation.template(name)
    expected = [form.answer_start + answer + form.answer_end for _, answer in turns]
    assert [text[begin:end] for begin, end in spans] == expected
    assert all(text[:begin].endswith(form.user_end) for begin, _ in spans)
    assert spans[-1][1] == len(text)
