"""Conversations with the base's own answers in them, to train a twig on what it will draft.

    python -m launch.own_answers --checkpoint CHECKPOINT --data mix665k.json --images images \\
        --conventions llava --out own.jsonl
    python -m launch.train --config configs/llava15_7b_twig.py --set data.source=own.jsonl \\
        --set data.images=images --export twig

Every question is asked again after the base's own answers to the ones before it, and answered
greedily; with --twig faster, by the same words. What is in the file already is not asked again.
Images that are no files are written beside it, to OUT's folder of images; paths are absolute.

An answer that --max_new_tokens cuts off would teach the twig to end where the base goes on: a
conversation ends before it, and before an empty one. Those without any answer are listed in
own.unanswered.jsonl; remove it to have them asked again.
"""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from absl import app, flags

from launch import run
from twig_jax.config import DTYPES

_CHECKPOINT = flags.DEFINE_string("checkpoint", "digits", "folder or hub id of a base, or digits")
_TWIG = flags.DEFINE_string("twig", None, "folder or hub id of a twig, to answer faster")
_DATA = flags.DEFINE_string("data", "digits", "conversations, as data.source of launch.train")
_IMAGES = flags.DEFINE_string("images", None, "folder of their images; the file's own if none")
_OUT = flags.DEFINE_string("out", None, "the .jsonl file to write")
_LIMIT = flags.DEFINE_integer("limit", None, "only the first so many", lower_bound=1)
_NEW = flags.DEFINE_integer("max_new_tokens", 256, "of an answer", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 32, "questions answered at once", lower_bound=1)
_CONVENTIONS = flags.DEFINE_enum(
    "conventions", None, ["llava"], "read text and images as LLaVA does, whatever the folder says"
)
_DTYPE = flags.DEFINE_enum("dtype", None, DTYPES, "default float32 on CPUs, bfloat16 elsewhere")

_BEGINNING = b'{"index": '  # of every row
_AT_ONCE = 8  # batches of conversations between two times that answers are written


def main(argv: list[str]) -> None:
    if len(argv) > 1 or not _OUT.value or Path(_OUT.value).suffix != ".jsonl":
        raise app.UsageError("give --out FILE.jsonl, and flags alone")
    try:
        answer(Path(_OUT.value))
    except (ImportError, MemoryError, OSError, ValueError) as error:
        sys.exit(f"own_answers: {error}")


def answer(out: Path) -> None:
    """Answers what the file does not have yet."""
    from tqdm import tqdm

    from twig_jax import api
    from twig_jax.data.sources import BadSample, open_source
    from twig_jax.evaluation.answers import digest, keep_settings
    from twig_jax.runtime import use_compilation_cache

    use_compilation_cache()
    if "://" in str(_OUT.value):
        raise ValueError(f"--out {_OUT.value} is no local file; write one and copy it there")
    source = open_source(_DATA.value, _IMAGES.value)
    unanswered = out.with_suffix(".unanswered.jsonl")
    answers, empty = known(out), set(known(unanswered))
    check(source, answers, out)
    there = answers.keys() | empty
    todo = [i for i in range(min(len(source), _LIMIT.value or len(source))) if i not in there]
    if not todo:
        but = f" but {len(empty)} without an answer, listed in {unanswered}" if empty else ""
        print(f"{out} has all {len(there)} conversations{but}")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.open("a").close()  # it fails now, or not after long work
    model = api.load(_CHECKPOINT.value, _TWIG.value, _DTYPE.value, conventions=_CONVENTIONS.value)
    asked = {
        "weights": digest(model.generator.weights.base),
        "template": model.conventions.template,
        "max_new_tokens": _NEW.value,
    }
    notes = out.with_suffix(".run.json")
    if not there:  # what it was made with has gone with it
        notes.unlink(missing_ok=True)
    keep_settings(notes, asked, of=out)
    size, answered, bad, cut = _AT_ONCE * _BATCH.value, 0, 0, 0
    empty = set()
    with tqdm(total=len(todo), unit="conversation", disable=None) as bar, out.open("a") as file:
        for first in range(0, len(todo), size):
            samples = []
            for index in todo[first : first + size]:
                try:
                    samples.append((index, source[index]))
                except BadSample as error:
                    bad += 1
                    bar.write(f"left out: {error}", file=sys.stderr)
            said, more = conversations(model, [sample for _, sample in samples])
            cut += more
            for (index, sample), turns in zip(samples, said, strict=True):
                if isinstance(turns, Exception):
                    bad += 1
                    bar.write(f"left out: {sample.id}: {turns}", file=sys.stderr)
                elif turns:
                    row = as_row(index, sample, turns, out.parent / "images")
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    answered += 1
                else:
                    empty.add(index)
                    with unanswered.open("a") as rest:
                        rest.write(json.dumps({"index": index, "id": sample.id}) + "\n")
            file.flush()
            bar.update(len(todo[first : first + size]))
    print(f"{answered} conversations answered, {bad} bad ones left out, in {out}")
    if cut:
        print(f"{cut} end before an answer of more than {_NEW.value} tokens (--max_new_tokens)")
    if empty:
        print(f"{len(empty)} without an answer, listed in {unanswered}; remove it to ask again")


def known(out: Path) -> dict[int, str]:
    """The ids of conversations that the file has, by number; a line that was cut off is taken away.

    Raises ValueError for a file of other rows, which stays as it is.
    """
    if not out.is_file():
        return {}
    text = out.read_bytes()
    if not text.startswith(_BEGINNING[: len(text)]):
        raise ValueError(f"{out} has not been written by this program: give another --out")
    whole = text[: text.rfind(b"\n") + 1]
    os.truncate(out, len(whole))
    rows = map(json.loads, whole.splitlines())
    return {row["index"]: row["id"] for row in rows}


def check(source: Any, there: dict[int, str], out: Path) -> None:
    """Raises ValueError where the first or last conversation that the file has is not the data's.

    The others are not read for it, as there may be very many.
    """
    from twig_jax.data.sources import BadSample

    for index in {min(there), max(there)} if there else ():
        with contextlib.suppress(BadSample):  # which may have been whole then
            own = source[index].id if index < len(source) else None
            if own != there[index]:
                raise ValueError(
                    f"{out} has the answers to other data: its conversation {index} is "
                    f"{there[index]!r}, of {_DATA.value} {own!r}; give another --out"
                )


Turns = list[tuple[str, str]]


def conversations(model: Any, samples: list[Any]) -> tuple[list[Turns | Exception], int]:
    """Turns of (question, own answer) of each, or why it cannot be asked; how many were cut off.

    After an answer that is empty or cut off, which is left out, nothing more is asked.
    """
    from twig_jax.data import conversation
    from twig_jax.decoding.settings import Settings

    settings = Settings(
        mode="plain" if model.generator.twig_config is None else "ssd", max_new_tokens=_NEW.value
    )
    said: list[Turns] = [[] for _ in samples]
    bad: dict[int, Exception] = {}
    cut, asks = 0, list(range(len(samples)))
    while asks:
        requests = {}
        for i in asks:
            turns = [*said[i], (samples[i].turns[len(said[i])][0], None)]
            markers = sum(question.count(conversation.IMAGE) for question, _ in turns)
            text = conversation.prompt(model.conventions.template, turns)
            try:
                request = model.request(text, samples[i].images[:markers], raw=True)
                model.generator.batches.prepare([request], settings)
                requests[i] = request
            except (MemoryError, OSError, ValueError) as error:
                if not said[i]:  # else it ends before this question
                    bad[i] = error
        results = model.generator.generate_many(list(requests.values()), settings, _BATCH.value)
        going = []
        for i, result in zip(requests, results, strict=True):
            cut += result.stopped_by == "length"
            if result.stopped_by == "eos" and result.text.strip():
                said[i].append((samples[i].turns[len(said[i])][0], result.text))
                if len(said[i]) < len(samples[i].turns):
                    going.append(i)
        asks = going
    return [bad.get(i, turns) for i, turns in enumerate(said)], cut


def as_row(index: int, sample: Any, turns: list[tuple[str, str]], folder: Path) -> dict[str, Any]:
    """A conversation in LLaVA's format; images that are no files are written to the folder."""
    from twig_jax.data import conversation
    from twig_jax.data.images import load_image

    markers = sum(question.count(conversation.IMAGE) for question, _ in turns)
    paths = []
    for number, image in enumerate(sample.images[:markers]):
        if not isinstance(image, str | Path):
            path = folder / f"{index}-{number}.png"
            path.parent.mkdir(exist_ok=True)
            load_image(image).save(path)
            image = path
        paths.append(str(Path(image).absolute()))
    said = [
        part
        for question, text in turns
        for part in ({"from": "human", "value": question}, {"from": "gpt", "value": text})
    ]
    row: dict[str, Any] = {"index": index, "id": sample.id, "conversations": said}
    return {**row, "image": paths} if paths else row


if __name__ == "__main__":
    run(main)
