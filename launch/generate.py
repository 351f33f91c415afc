"""Answers questions about images.

python -m launch.generate --image page.png --prompt "What digit is in row B, column 3?"
python -m launch.generate --checkpoint llava-hf/llava-1.5-7b-hf --twig models/twig \\
    --image photo.jpg --prompt "What is the cat doing?" --avg_retained 64
python -m launch.generate --batch_file questions.jsonl --json answers.jsonl

question: --image --prompt, or --raw_prompt; --batch_file --image_folder for many
model:    --checkpoint --twig --dtype --template --allow_base_mismatch
decoding: --mode --avg_retained --max_new_tokens --gamma --theta
output:   --json
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from absl import app, flags

from launch import run
from twig_jax.config import MODES

# The question.
_IMAGE = flags.DEFINE_multi_string("image", [], "image file; repeatable, in the prompt's order")
_PROMPT = flags.DEFINE_string("prompt", None, "question; <image> marks an image's place")
_RAW_PROMPT = flags.DEFINE_string("raw_prompt", None, "prompt used as it is, without a template")
_BATCH_FILE = flags.DEFINE_string(
    "batch_file", None, "JSON lines with question_id, image (one, several or none) and text"
)
_IMAGE_FOLDER = flags.DEFINE_string("image_folder", None, "where its images are; else beside it")

# The model.
_CHECKPOINT = flags.DEFINE_string("checkpoint", "digits", "folder or hub id of a base, or digits")
_TWIG = flags.DEFINE_string("twig", None, "folder or hub id of its twig")
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16", "float16"], "default float32 on CPUs, bfloat16 elsewhere"
)
_TEMPLATE = flags.DEFINE_string("template", None, "conversation template other than the base's own")
_MISMATCH = flags.DEFINE_bool("allow_base_mismatch", False, "use a twig grown on another base")

# Decoding.
_MODE = flags.DEFINE_enum("mode", None, MODES, "default ttp_ssd with a twig, else plain")
_RETAINED = flags.DEFINE_float("avg_retained", None, "visual tokens a layer sees, on average")
_MAX_NEW = flags.DEFINE_integer("max_new_tokens", 128, "most tokens of an answer", lower_bound=1)
_GAMMA = flags.DEFINE_integer("gamma", 5, "most drafts an iteration", lower_bound=0)
_THETA = flags.DEFINE_float("theta", 0.6, "drafting stops after a token less probable than this")

_JSON = flags.DEFINE_string("json", None, "write one JSON line a question here; - is stdout")


def main(argv: list[str]) -> None:
    given = [f for f in (_PROMPT, _RAW_PROMPT, _BATCH_FILE) if f.value is not None]
    if len(argv) > 1 or len(given) != 1:
        raise app.UsageError("give one of --prompt, --raw_prompt and --batch_file")
    try:
        generate()
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"generate: {error}")


def generate() -> None:
    """Loads the model, answers, prints."""
    from twig_jax import api
    from twig_jax.runtime import use_compilation_cache

    asked = questions()
    use_compilation_cache()
    model = api.load(
        _CHECKPOINT.value,
        _TWIG.value,
        _DTYPE.value,
        allow_base_mismatch=_MISMATCH.value,
        template=_TEMPLATE.value,
    )
    changes: dict[str, Any] = {
        "max_new_tokens": _MAX_NEW.value,
        "gamma": _GAMMA.value,
        "theta": _THETA.value,
    }
    for name, flag in (("mode", _MODE), ("avg_retained", _RETAINED)):
        if flag.value is not None:
            changes[name] = flag.value
    # The answer itself goes to standard output, unless JSON or a whole file of answers does.
    streams = _BATCH_FILE.value is None and _JSON.value != "-"
    failed = 0
    with lines_to(_JSON.value, many=_BATCH_FILE.value is not None) as out:
        for question in asked:
            told = (lambda piece: print(piece, end="", flush=True)) if streams else None
            try:
                result = model.generate(
                    question["text"],
                    question["images"],
                    raw=_RAW_PROMPT.value is not None,
                    told=told,
                    **changes,
                )
            except ValueError as error:
                if _BATCH_FILE.value is None:
                    raise
                failed += 1
                line = {"question_id": question["question_id"], "error": str(error)}
                print(f"question {question['question_id']}: {error}", file=sys.stderr)
            else:
                line = described(question, result)
            if streams:
                print()
            if out is not None:
                print(json.dumps(line), file=out, flush=True)
    if failed:
        raise ValueError(f"{failed} of {len(asked)} questions could not be answered, see above")


def questions() -> list[dict[str, Any]]:
    """What is asked: {question_id, text, images} each. Raises ValueError naming a bad line."""
    if _BATCH_FILE.value is None:
        text = _PROMPT.value if _RAW_PROMPT.value is None else _RAW_PROMPT.value
        return [{"question_id": 0, "text": text, "images": _IMAGE.value}]
    path = Path(_BATCH_FILE.value)
    folder = path.parent if _IMAGE_FOLDER.value is None else Path(_IMAGE_FOLDER.value)
    asked = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            images = row.get("image") or []
            images = [images] if isinstance(images, str) else images
            asked.append(
                {
                    "question_id": row.get("question_id", number),
                    "text": row["text"],
                    "images": [folder / image for image in images],
                }
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}, line {number}: needs a JSON object with text, and image where there is "
                f"one ({error!r})"
            ) from error
    if not asked:
        raise ValueError(f"{path} has no questions")
    return asked


def described(question: dict[str, Any], result: Any) -> dict[str, Any]:
    """One line of results."""
    return {
        "question_id": question["question_id"],
        "prompt": question["text"],
        "text": result.text,
        "ids": result.tokens.tolist(),
        "stopped_by": result.stopped_by,
        "drafted": sum(len(drafts) for drafts in result.drafts),
        "accepted": int(result.matched.sum()),
        "retained": result.kept.tolist(),
        "prefill_s": round(result.prefill_s, 4),
        "decode_s": round(result.decode_s, 4),
    }


@contextmanager
def lines_to(path: str | None, many: bool) -> Iterator[TextIO | None]:
    """Where JSON lines go: a file, standard output, or nowhere for one question without --json."""
    if path is None or path == "-":
        yield sys.stdout if path == "-" or many else None
    else:
        with open(path, "w") as file:
            yield file


if __name__ == "__main__":
    run(main)
