"""Answering a benchmark: resumable, in shares, with every question accounted for."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np

from twig_jax.decoding.asking import ask_many
from twig_jax.decoding.settings import Request, Result
from twig_jax.decoding.transcript import Detokenize, characters
from twig_jax.evaluation.benchmarks.files import (
    Key,
    Question,
    answer_line,
    read_answers,
    write_answers,
)
from twig_jax.models.cpu import restored
from twig_jax.sharding.placement import gather
from twig_jax.sharding.rules import path_string


def answer_share(
    folder: Path,
    questions: Sequence[Question],
    share: tuple[int, int],
    ask: Callable[[Question], Request],
    decode: Callable[[Sequence[Request], Callable[[int, Result], Any]], Any],
    *,
    batch: int,
    model_id: str,
    settings: dict[str, Any],
    detokenize: Detokenize | None = None,
    told: Callable[[int], Any] = lambda _: None,
) -> dict[Key, str]:
    """Answers one share of the questions that `folder` has no answers to yet.

    share: (i, n) for the i-th of n processes, each of which appends to a file of its own there.
    ask, decode, batch: as in `ask_many`. told: is given how many more questions are done with.

    settings: what the answers depend on, kept in run.json and in each line's metadata. Raises
    ValueError where the folder has answers by other settings, and where a question is there twice.
    detokenize: tokens -> text, for `pieces`, the text that each token adds.

    A question that cannot be asked has a line with an empty text and the error in its metadata, and
    is tried again by the next run. Returns the lines of all shares so far; once there is one for
    every question, answers.jsonl has them in the questions' order.
    """
    twice = [key.id for key, n in Counter(q.key for q in questions).items() if n > 1]
    if twice:
        raise ValueError(f"several questions have id {twice[0]!r} and the same prompt")
    folder.mkdir(parents=True, exist_ok=True)
    keep_settings(folder / "run.json", {"model_id": model_id, **settings})
    i, n = share
    own = folder / f"answers.{i}-of-{n}.jsonl"
    there = {k: line for k, line in answered(folder, questions).items() if failure(line) is None}
    # What a kill left of a line goes, and what failed.
    written = read_answers(own, questions) if own.exists() else {}
    write_answers(own, questions, {k: v for k, v in written.items() if k in there})
    waiting = [q for q in questions[i::n] if q.key not in there]
    told(len(questions[i::n]) - len(waiting))
    with open(own, "a") as file:

        def write(at: int, text: str, more: dict[str, Any]) -> None:
            line = answer_line(waiting[at], text, model_id, {**settings, **more})
            file.write(line + "\n")
            file.flush()
            told(1)

        ask_many(
            len(waiting),
            lambda at: ask(waiting[at]),
            decode,
            batch,
            told=lambda at, request, result: write(
                at, result.text or "", _described(request, result, detokenize)
            ),
            failed=lambda at, error: write(at, "", {"error": str(error)}),
        )
        os.fsync(file.fileno())
    lines = answered(folder, questions)
    if len(lines) == len(questions):
        write_answers(folder / "answers.jsonl", questions, lines)
    return lines


def keep_settings(path: Path, settings: dict[str, Any], of: Path | None = None) -> None:
    """Keeps settings, as JSON, in a file; ValueError, naming both, where other ones are there.

    of: what was made with them, None for the file's folder.
    """
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        part = path.with_name(f"{path.name}.{os.getpid()}")
        part.write_text(json.dumps(settings, indent=1) + "\n")
        os.replace(part, path)
    try:
        there = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    other = {k for k in {*there, *settings} if there.get(k) != settings.get(k)}
    if other:
        said = ", ".join(f"{k} {there.get(k)!r}, not {settings.get(k)!r}" for k in sorted(other))
        raise ValueError(f"{of or path.parent} was made with {said}; remove it or name another")


def digest(weights: Any) -> str:
    """A name for parameters, alike on all devices: hexadecimal, of samples at fixed places."""
    samples = jax.tree.map(
        lambda x: x[tuple(slice(None, None, 1 + n // 64) for n in x.shape)], weights
    )
    found = hashlib.sha256()
    for path, x in jax.tree_util.tree_leaves_with_path(restored(samples)):
        found.update(path_string(path).encode() + gather(x).tobytes())
    return found.hexdigest()[:16]


def failure(line: str) -> str | None:
    """Why the question could not be asked that a line stands for; None where it has an answer."""
    return json.loads(line)["metadata"].get("error")


def answered(folder: Path, questions: Sequence[Question]) -> dict[Key, str]:
    """The lines of all shares in a folder so far."""
    found: dict[Key, str] = {}
    for path in sorted(folder.glob("answers.*-of-*.jsonl")):
        for key, line in read_answers(path, questions).items():
            if key not in found or failure(found[key]):
                found[key] = line
    return found


def _described(request: Request, result: Result, detokenize: Detokenize | None) -> dict[str, Any]:
    """How the answer came about: nothing that would differ in another run.

    `kept`, where not all of them are, counts the prompt's visual tokens from 0, image after image.
    """
    pruned = len(result.kept) < request.is_visual.sum()
    order = np.cumsum(request.is_visual) - 1
    tokens = result.tokens.tolist()
    # A character's bytes add nothing until it is complete.
    texts = [
        "" if detokenize is None else characters(detokenize, tokens[:n])
        for n in range(len(tokens) + 1)
    ]
    return {
        "pieces": [after[len(before) :] for before, after in pairwise(texts)],
        "stopped_by": result.stopped_by,
        "drafted": [len(drafts) for drafts in result.drafts],
        "levels": result.levels,
        "matched": result.matched.tolist(),
        "accepted": [int(a) for a in result.accepted],
        "retained": len(result.kept),
        **({"kept": order[result.kept].tolist()} if pruned else {}),
    }
