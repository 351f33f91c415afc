"""Conversation templates: how questions, answers and images become one text."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

IMAGE = "<image>"


@dataclass(frozen=True)
class Template:
    """The fixed text around a conversation's turns.

    opening: before the first question. user_start: before every later one.
    user_end: after a question; the text after it is the model's.
    answer_start, answer_end: around a known answer.
    image_end: between an image marker and what follows it.
    open_end: in place of user_end where the answer is not known, None where that is the same.
    """

    opening: str
    user_start: str
    user_end: str
    answer_start: str
    answer_end: str
    image_end: str = "\n"
    open_end: str | None = None


# Named and worded as in `conv_templates` of LLaVA's llava/conversation.py, but for llava_hf.
TEMPLATES = {
    # LLaVA-1.5 as trained.
    "vicuna_v1": Template(
        opening="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: ",
        user_start="USER: ",
        user_end=" ASSISTANT:",
        answer_start=" ",
        answer_end="</s>",
    ),
    # The form of the llava-hf model cards: the same turns without the system prompt.
    "llava_hf": Template(
        opening="USER: ",
        user_start="USER: ",
        user_end=" ASSISTANT:",
        answer_start=" ",
        answer_end="</s>",
    ),
    # The system prompt stands inside the first question; later ones bring a BOS of their own.
    "llava_llama_2": Template(
        opening="[INST] <<SYS>>\n"
        "You are a helpful language and vision assistant. "
        "You are able to understand the visual content that the user provides, "
        "and assist the user with a variety of tasks using natural language."
        "\n<</SYS>>\n\n",
        user_start="<s>[INST] ",
        user_end=" [/INST]",
        answer_start=" ",
        answer_end=" </s>",
    ),
    "mistral_instruct": Template(
        opening="[INST] ",
        user_start="[INST] ",
        user_end=" [/INST]",
        answer_start=" ",
        answer_end=" </s>",
    ),
    # Nothing around the text: image, then caption, as LLaVA aligns its projector. Where it asks
    # with this template, a newline ends the question.
    "plain": Template(
        opening="",
        user_start="",
        user_end="",
        answer_start="",
        answer_end="\n",
        image_end="",
        open_end="\n",
    ),
}


def template(name: str) -> Template:
    """The template of that name. Raises ValueError that lists the known names and the nearest."""
    if name not in TEMPLATES:
        near = difflib.get_close_matches(name, TEMPLATES, 1)
        raise ValueError(
            f"unknown conversation template {name!r}, expected one of {', '.join(TEMPLATES)}"
            + (f" (nearest: {near[0]})" if near else "")
        )
    return TEMPLATES[name]


def head(name: str, images: int = 0) -> str:
    """The text before the first question: system prompt, start of the turn, markers of images."""
    chosen = template(name)
    return chosen.opening + (IMAGE + chosen.image_end) * images


def turn(name: str, question: str, answer: str | None = None) -> str:
    """One turn from its question on, up to where the model answers or with a known answer."""
    chosen = template(name)
    if answer is not None:
        return question + chosen.user_end + chosen.answer_start + answer + chosen.answer_end
    return question + (chosen.user_end if chosen.open_end is None else chosen.open_end)


def following(name: str, question: str, images: int = 0) -> str:
    """A later question, from the end of the answer before it up to where the model answers.

    images: how many come with it; where the question has no marker, all are put before it.
    """
    chosen = template(name)
    markers = "" if IMAGE in question else (IMAGE + chosen.image_end) * images
    return chosen.answer_end + chosen.user_start + markers + turn(name, question)


def prompt(name: str, turns: Sequence[tuple[str, str | None]], images: int = 0) -> str:
    """The text of a conversation of (question, answer) turns; the last answer may be None.

    images: how many images come with it. Where no question has a marker, all are put before the
    first question.
    Raises ValueError for no turns, an unanswered turn before the last, or an unknown template.
    """
    if not turns:
        raise ValueError("a conversation needs at least one turn")
    for index, (_, answer) in enumerate(turns[:-1]):
        if answer is None:
            raise ValueError(
                f"turn {index + 1} of {len(turns)} has no answer; only the last may be open"
            )
    marked = any(IMAGE in question for question, _ in turns)
    text = head(name, 0 if marked else images) + turn(name, *turns[0])
    start = template(name).user_start
    return text + "".join(start + turn(name, *later) for later in turns[1:])


def answers(
    name: str, turns: Sequence[tuple[str, str]], images: int = 0
) -> tuple[str, list[tuple[int, int]]]:
    """The `prompt` of a conversation with all answers known, and where they lie in it.

    An answer begins at answer_start and ends behind answer_end, which the model is to learn too.
    Returns (text, [(begin, end)] in characters). Raises ValueError as `prompt` does.
    """
    text = prompt(name, turns, images)
    chosen, spans, begin, end = template(name), list[tuple[int, int]](), 0, len(text)
    # From the end backwards, as markers may stand before the first question alone.
    for question, answer in reversed(turns):
        begin = end - len(chosen.answer_start + answer + chosen.answer_end)
        spans.append((begin, end))
        end = begin - len(chosen.user_start + question + chosen.user_end)
    return text, spans[::-1]
