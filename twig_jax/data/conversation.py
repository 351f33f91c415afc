"""Conversation templates: how questions, answers and images become one text."""

from collections.abc import Sequence
from dataclasses import dataclass

IMAGE = "<image>"


@dataclass(frozen=True)
class Template:
    """The fixed text around a conversation's turns.

    system: text before everything.
    user_start, user_end: around a question; the text after user_end is the model's.
    answer_start, answer_end: around a known answer.
    image_end: between an image marker and what follows it.
    """

    system: str
    user_start: str
    user_end: str
    answer_start: str
    answer_end: str
    image_end: str = "\n"


TEMPLATES = {
    # LLaVA-1.5 as trained (LLaVA's `conv_vicuna_v1`).
    "vicuna_v1": Template(
        system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. ",
        user_start="USER: ",
        user_end=" ASSISTANT:",
        answer_start=" ",
        answer_end="</s>",
    ),
    # The form of the llava-hf model cards: the same turns without the system prompt.
    "llava_hf": Template(
        system="",
        user_start="USER: ",
        user_end=" ASSISTANT:",
        answer_start=" ",
        answer_end="</s>",
    ),
    # Nothing around the text: image, then caption, as LLaVA aligns its projector.
    "plain": Template(
        system="", user_start="", user_end="", answer_start="", answer_end="\n", image_end=""
    ),
}


def template(name: str) -> Template:
    """The template of that name. Raises ValueError that lists the known names."""
    if name not in TEMPLATES:
        raise ValueError(
            f"unknown conversation template {name!r}, expected one of {', '.join(TEMPLATES)}"
        )
    return TEMPLATES[name]


def head(name: str, images: int = 0) -> str:
    """The text before the first question: system prompt, start of the turn, markers of images."""
    chosen = template(name)
    return chosen.system + chosen.user_start + (IMAGE + chosen.image_end) * images


def turn(name: str, question: str, answer: str | None = None) -> str:
    """One turn from its question on, up to where the model answers or with a known answer."""
    chosen = template(name)
    opened = question + chosen.user_end
    return opened if answer is None else opened + chosen.answer_start + answer + chosen.answer_end


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
