"""Answers questions about images.

python -m launch.generate --image page.png --prompt "What digit is in row B, column 3?"
python -m launch.generate --checkpoint llava-hf/llava-1.5-7b-hf --twig models/twig \\
    --image photo.jpg --prompt "What is the cat doing?" --avg_retained 64
python -m launch.generate --batch_file questions.jsonl --json answers.jsonl

question: --image --prompt, or --raw_prompt; --batch_file --image_folder for many
model:    --checkpoint --twig --dtype --int8 --conventions --template --allow_base_mismatch
decoding: --mode --avg_retained --max_new_tokens --min_new_tokens --stop --batch
drafting: --gamma --theta --adaptive --children --expanded --nodes, or --fit_tree
sampling: --temperature --top_k --top_p --min_p --repetition_penalty --seed
output:   --json
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from absl import app, flags

from launch import run
from twig_jax.config import DTYPES, INT8, MODES

# The question.
_IMAGE = flags.DEFINE_multi_string("image", [], "image file; repeatable, in the prompt's order")
_PROMPT = flags.DEFINE_string("prompt", None, "question; <image> marks an image's place")
_RAW_PROMPT = flags.DEFINE_string("raw_prompt", None, "prompt used as it is, without a template")
_BATCH_FILE = flags.DEFINE_string(
    "batch_file",
    None,
    "JSON lines of question_id, image (one, several or none) and text; - is stdin",
)
_IMAGE_FOLDER = flags.DEFINE_string("image_folder", None, "where its images are; else beside it")

# The model.
_CHECKPOINT = flags.DEFINE_string("checkpoint", "digits", "folder or hub id of a base, or digits")
_TWIG = flags.DEFINE_string("twig", None, "folder or hub id of its twig")
_DTYPE = flags.DEFINE_enum("dtype", None, DTYPES, "default float32 on CPUs, bfloat16 elsewhere")
_INT8 = flags.DEFINE_enum(
    "int8", None, INT8, "twig: draft in int8, answers stay; all: the base too, which is lossy"
)
_CONVENTIONS = flags.DEFINE_enum(
    "conventions", None, ["llava"], "read text and images as LLaVA does, whatever the folder says"
)
_TEMPLATE = flags.DEFINE_string("template", None, "conversation template other than the base's own")
_MISMATCH = flags.DEFINE_bool("allow_base_mismatch", False, "use a twig grown on another base")

# Decoding: fields of Settings; what is not given is the model's default.
_MODE = flags.DEFINE_enum("mode", None, MODES, "default ttp_ssd with a twig, else plain")
_RETAINED = flags.DEFINE_float("avg_retained", None, "visual tokens a layer sees, on average")
_MAX_NEW = flags.DEFINE_integer("max_new_tokens", None, "most tokens of an answer (128)")
_MIN_NEW = flags.DEFINE_integer("min_new_tokens", None, "fewest tokens of an answer (0)")
_GAMMA = flags.DEFINE_integer("gamma", None, "tokens ahead that are drafted at most (5)")
_THETA = flags.DEFINE_float("theta", None, "drafting stops after a token less probable (0.6)")
_CHILDREN = flags.DEFINE_integer("children", None, "drafts tried after each (1, a chain)")
_EXPANDED = flags.DEFINE_integer("expanded", None, "drafts of a level that have children (1)")
_NODES = flags.DEFINE_integer("nodes", None, "most drafts an iteration (0, all of the tree)")
_FIT_TREE = flags.DEFINE_bool(
    "fit_tree",
    False,
    "gamma, children, expanded and nodes that are fastest here; measures at first",
)
_ADAPTIVE = flags.DEFINE_bool("adaptive", None, "stop drafting while drafts are in vain")
_TEMPERATURE = flags.DEFINE_float("temperature", None, "0, the default, takes the likeliest token")
_TOP_K = flags.DEFINE_integer("top_k", None, "draw from so many likeliest tokens")
_TOP_P = flags.DEFINE_float("top_p", None, "draw from the likeliest that reach this probability")
_MIN_P = flags.DEFINE_float("min_p", None, "none less probable than this share of the likeliest")
_PENALTY = flags.DEFINE_float("repetition_penalty", None, "above 1: less of what was there")
_SEED = flags.DEFINE_integer("seed", None, "of the draws")
_STOP = flags.DEFINE_multi_string("stop", [], "text that ends an answer; repeatable")
_DECODING = {
    flag.name: flag
    for flag in (
        _MODE, _RETAINED, _MAX_NEW, _MIN_NEW, _GAMMA, _THETA, _CHILDREN, _EXPANDED, _NODES,
        _ADAPTIVE, _TEMPERATURE, _TOP_K, _TOP_P, _MIN_P, _PENALTY, _SEED,
    )
}  # fmt: skip

_BATCH = flags.DEFINE_integer("batch", 16, "questions of a file answered at once", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "write one JSON line a question here; - is stdout")


def main(argv: list[str]) -> None:
    given = [f for f in (_PROMPT, _RAW_PROMPT, _BATCH_FILE) if f.value is not None]
    if len(argv) > 1 or len(given) != 1:
        raise app.UsageError("give one of --prompt, --raw_prompt and --batch_file")
    if _BATCH_FILE.value is not None and _IMAGE.value:
        raise app.UsageError("--batch_file names its questions' images itself: leave --image out")
    try:
        generate()
    except (ImportError, MemoryError, OSError, ValueError) as error:
        sys.exit(f"generate: {error}")


def generate() -> None:
    """Loads the model, answers, prints."""
    from twig_jax.runtime import use_compilation_cache

    asked = questions()
    with lines_to(_JSON.value, many=_BATCH_FILE.value is not None) as out:
        use_compilation_cache()
        model, settings = ready(asked)
        failed = 0
        if _BATCH_FILE.value is None:
            answer_one(model, settings, asked[0], out)
        else:
            failed = answer_all(model, settings, asked, out)
    if failed:
        raise ValueError(f"{failed} of {len(asked)} questions could not be answered, see above")


def ready(asked: list[dict[str, Any]]) -> tuple[Any, Any]:
    """The model, and how it is to decode."""
    from twig_jax import api
    from twig_jax.runtime import cache_folder

    model = api.load(
        _CHECKPOINT.value,
        _TWIG.value,
        _DTYPE.value,
        allow_base_mismatch=_MISMATCH.value,
        conventions=_CONVENTIONS.value,
        template=_TEMPLATE.value,
        int8=_INT8.value,
        # Files often ask several questions about an image.
        remembered_images=0 if _BATCH_FILE.value is None else 4 * _BATCH.value,
    )
    changes: dict[str, Any] = {n: f.value for n, f in _DECODING.items() if f.value is not None}
    settings = replace(model.settings, stop=tuple(_STOP.value), **changes)
    check_used(settings)
    if _FIT_TREE.value:
        settings = with_fitted_tree(model, settings, asked[: _BATCH.value], cache_folder())
    return model, settings


def check_used(settings: Any) -> None:
    """Raises ValueError for flags that say nothing with the others."""
    for of, used, flags_of in (
        (f"--mode {settings.mode} prunes nothing", settings.prune, (_RETAINED,)),
        (
            f"--mode {settings.mode} drafts nothing",
            settings.draft or settings.gamma == 0,
            (_GAMMA, _THETA, _CHILDREN, _EXPANDED, _NODES, _ADAPTIVE),
        ),
        ("nothing is drawn at temperature 0", settings.temperature, (_TOP_K, _TOP_P, _MIN_P)),
    ):
        given = [f"--{flag.name}" for flag in flags_of if flag.value is not None]
        if given and not used:
            raise ValueError(f"{of}: leave {', '.join(given)} out, or change that")


def with_fitted_tree(model: Any, settings: Any, few: list[dict[str, Any]], folder: Path) -> Any:
    """The settings with the tree of drafts that answers questions like these fastest here.

    As they are where none of the questions can be asked, which is told when their turn comes.
    """
    from twig_jax.decoding.shape import fitted

    raw = _RAW_PROMPT.value is not None
    requests = []
    for q in few:
        with suppress(MemoryError, ValueError):
            request = model.request(q["text"], q["images"], raw=raw)
            model.generator.batches.prepare([request], settings)
            requests.append(request)
    if not requests:
        print("tree: not fitted, as no question to try it with can be asked", file=sys.stderr)
        return settings
    found = fitted(model.generator, requests, settings, folder / "costs.json")
    shape = {n: getattr(found, n) for n in ("gamma", "children", "expanded", "nodes")}
    print("tree:", " ".join(f"--{n} {value}" for n, value in shape.items()), file=sys.stderr)
    return found


def answer_one(model: Any, settings: Any, question: dict[str, Any], out: TextIO | None) -> None:
    """Prints the text as it comes; standard output stays clean where it carries JSON."""
    streams = _JSON.value != "-"
    result = model.generate(
        question["text"],
        question["images"],
        settings,
        raw=_RAW_PROMPT.value is not None,
        told=(lambda piece: print(piece, end="", flush=True)) if streams else None,
    )
    if streams:
        print()
    if out is not None:
        print(json.dumps(described(question, result)), file=out, flush=True)


def answer_all(model: Any, settings: Any, asked: list[dict[str, Any]], out: TextIO | None) -> int:
    """Answers a file of questions in batches of like lengths; lines come in the file's order.

    A line is written as soon as all before it are. A question that cannot be answered is one with
    its error; gives how many there were.
    """
    from tqdm import tqdm

    from twig_jax.decoding.asking import ask_many

    lines: dict[int, dict[str, Any]] = {}
    written = failed = 0

    def ask(i: int) -> Any:
        request = model.request(asked[i]["text"], asked[i]["images"])
        model.generator.batches.prepare([request], settings)
        return request

    with tqdm(total=len(asked), unit="question", disable=None) as bar:

        def add(i: int, line: dict[str, Any]) -> None:
            nonlocal written
            lines[i] = line
            while written in lines:
                bar.write(json.dumps(lines.pop(written)), file=out)
                written += 1
            if out is not None:
                out.flush()
            bar.update()

        def fail(i: int, error: Exception) -> None:
            nonlocal failed
            failed += 1
            name = asked[i]["question_id"]
            bar.write(f"question {name}: {error}", file=sys.stderr)
            add(i, {"question_id": name, "error": str(error)})

        ask_many(
            len(asked),
            ask,
            lambda requests, told: model.generator.generate_many(
                requests, settings, _BATCH.value, told
            ),
            _BATCH.value,
            told=lambda i, _, result: add(i, described(asked[i], result)),
            failed=fail,
        )
    return failed


def questions() -> list[dict[str, Any]]:
    """What is asked: {question_id, text, images} each. Raises ValueError naming a bad line."""
    if _BATCH_FILE.value is None:
        text = _PROMPT.value if _RAW_PROMPT.value is None else _RAW_PROMPT.value
        return [{"question_id": 0, "text": text, "images": _IMAGE.value}]
    path = Path(_BATCH_FILE.value)
    folder = path.parent if _IMAGE_FOLDER.value is None else Path(_IMAGE_FOLDER.value)
    if _JSON.value not in (None, "-") and Path(_JSON.value).absolute() == path.absolute():
        raise ValueError(f"--json {path} would be written over the questions: name another file")
    try:
        content = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}") from None
    asked = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            images = row.get("image") or []
            images = [images] if isinstance(images, str) else images
            paths = isinstance(images, list) and all(isinstance(x, str) for x in images)
            if not paths or not isinstance(row.get("text"), str):
                raise TypeError(f"it is {line.strip()[:80]}")
            asked.append(
                {
                    "question_id": row.get("question_id", number),
                    "text": row["text"],
                    "images": [folder / image for image in images],
                }
            )
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}, line {number}: needs a JSON object with text, and image where there is "
                f"one ({error})"
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
    """Where JSON lines go: a file, standard output, or nowhere for one question without --json.

    Until all are written they are in FILE.part, and a file that was there stays.
    """
    if path is None or path == "-":
        yield sys.stdout if path == "-" or many else None
        return
    if Path(path).is_dir():
        raise IsADirectoryError(f"--json {path} is a folder")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.part", "w") as file:
        yield file
    os.replace(f"{path}.part", path)


if __name__ == "__main__":
    run(main)
