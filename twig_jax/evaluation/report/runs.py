"""What launch.evaluate wrote, read for a report: figures, answers, and how they came about."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twig_jax.evaluation.benchmarks.files import Key, need, read_json, read_lines
from twig_jax.evaluation.judge import Way

# What may differ between folders of one report: which questions are asked, and how long an answer
# may get, which benchmarks choose for themselves.
_FREE = {"seed", "limit", "max_new_tokens"}
# What a row of results.json tells at least.
_ROW = set("mode selector avg_retained pruned retained samples unanswered".split())
# What an answer's metadata tells of how it came about.
_TOLD = {"pieces", "accepted", "drafted", "matched", "retained"}


@dataclass
class Tally:
    """Counts over answers.

    iterations: by (drafts, their levels, accepted drafts). kinds: emitted tokens by (kind of piece,
    whether it was an accepted draft). kept: questions by the visual tokens they kept, where some
    were pruned. pictured: questions with images.
    """

    iterations: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    kinds: Counter[tuple[str, bool]] = field(default_factory=Counter)
    kept: Counter[int] = field(default_factory=Counter)
    pictured: int = 0

    def add(self, metadata: Mapping[str, Any]) -> None:
        """Counts one more answer by the metadata of its line."""
        self.pictured += metadata["retained"] > 0
        self.kept.update(metadata.get("kept", ()))
        # Answers that do not tell were drafted as chains, in which each draft is a level.
        levels = metadata.get("levels", metadata["drafted"])
        counts = metadata["drafted"], levels, metadata["matched"]
        self.iterations.update(zip(*counts, strict=True))
        accepted = map(bool, metadata["accepted"])
        self.kinds.update(zip(kinds(metadata["pieces"]), accepted, strict=True))

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.iterations + other.iterations,
            self.kinds + other.kinds,
            self.kept + other.kept,
            self.pictured + other.pictured,
        )


def kinds(pieces: Sequence[str]) -> list[str]:
    """What kind of text each token of an answer adds.

    "number" has a digit. Otherwise, "word" has letters and begins a word, "rest of a word" has
    letters and goes on with one; "punctuation" is anything else that can be seen, "space" what
    cannot: blanks, and bytes of a character that a later token completes.
    """
    found, before = [], ""
    for piece in pieces:
        if any(c.isdigit() for c in piece):
            kind = "number"
        elif any(c.isalpha() for c in piece):
            inside = before[-1:].isalnum() and not piece[0].isspace()
            kind = "rest of a word" if inside else "word"
        else:
            kind = "punctuation" if piece.strip() else "space"
        found.append(kind)
        before = piece or before
    return found


@dataclass(frozen=True)
class Answered:
    """One way's answers in one folder.

    row: its figures in results.json. asked: whether each question was answered. points: what each
    question that counts adds, None where only a judge can tell. groups: of the questions with
    points, see `Question`. file: the answers.
    """

    row: Mapping[str, Any]
    asked: Mapping[Key, bool]
    points: Mapping[Key, float] | None
    groups: Mapping[Key, str]
    tally: Tally
    file: Path

    def lines(self) -> Iterator[tuple[Key, dict[str, Any]]]:
        """The lines of the answers' file, read anew: they may be too many to keep."""
        return _lines(self.file)


@dataclass(frozen=True)
class Evaluation:
    """One benchmark's folder of one run of launch.evaluate."""

    folder: Path
    task: str
    device: str
    versions: Mapping[str, str]
    settings: Mapping[str, Any]
    ways: Mapping[Way, Answered]


def read(folders: Sequence[Path]) -> list[Evaluation]:
    """All benchmarks in folders that launch.evaluate was given as --out.

    Raises FileNotFoundError for a folder without results and for missing answers; ValueError for
    files that are broken or do not fit each other, for a folder given twice, and for runs whose
    answers or speeds do not belong in one table: of other checkpoints or settings, timed on other
    devices.
    """
    found = []
    for folder, times in Counter(folder.resolve() for folder in folders).items():
        if times > 1:
            raise ValueError(f"{folder} is given {times} times")
    for folder in folders:
        results = sorted(folder.glob("*/results.json"))
        if not results:
            raise FileNotFoundError(
                f"{folder} has no results.json of a benchmark in it, which launch.evaluate writes "
                "last: name what was its --out"
            )
        found += [_evaluation(path) for path in results]
    for one in found[1:]:
        _same(found[0], one)
    return found


def _evaluation(path: Path) -> Evaluation:
    content = read_json(path, "the figures of launch.evaluate")
    missing = [k for k in ("device", "versions", "settings", "results") if k not in content]
    missing += sorted({k for row in content.get("results", ()) for k in _ROW - row.keys()})
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}; launch.evaluate writes them")
    ways = {}
    for row in content["results"]:
        way = Way(row["mode"], row["selector"], row["avg_retained"])
        ways[way] = _answered(path.parent / way.name, row)
    return Evaluation(
        path.parent,
        path.parent.name,
        content["device"],
        content["versions"],
        content["settings"],
        ways,
    )


def _answered(folder: Path, row: Mapping[str, Any]) -> Answered:
    file = need(folder / "answers.jsonl", f"the answers that {folder.parent}/results.json is of")
    tally, asked = Tally(), {}
    for key, line in _lines(file):
        asked[key] = "error" not in line["metadata"]
        if asked[key]:
            missing = _TOLD - line["metadata"].keys()
            if missing:
                raise ValueError(f"{file}: no {', '.join(sorted(missing))} of question {key.id}")
            tally.add(line["metadata"])
    points, groups = None, {}
    if "exact" in row:
        path = folder / "points.json"
        found = read_json(path, "what each question adds to the score")
        if len(found) != len(asked):
            raise ValueError(f"{path} is of {len(found)} questions, {file} of {len(asked)}")
        if not all(isinstance(one, list) for one in found):
            raise ValueError(
                f"{path} does not say which questions have the same image; launch.evaluate with "
                "the same flags keeps the answers and writes it anew"
            )
        told = zip(asked, found, strict=True)
        points = {key: value for key, (value, _) in told if value is not None}
        groups = {key: group for key, (_, group) in zip(asked, found, strict=True)}
    if len(asked) != row["samples"]:
        raise ValueError(
            f"{file} is of {len(asked)} questions, results.json of {row['samples']}; "
            "launch.evaluate with the same flags brings them together"
        )
    return Answered(row, asked, points, groups, tally, file)


def _lines(file: Path) -> Iterator[tuple[Key, dict[str, Any]]]:
    fields = ("question_id", "prompt", "text", "metadata")
    for line in read_lines(file, "answers", fields):
        yield Key(str(line["question_id"]), line["prompt"]), line


def _same(one: Evaluation, other: Evaluation) -> None:
    free = _FREE if one.task != other.task else _FREE - {"max_new_tokens"}
    different = [
        f"{name} {one.settings.get(name)!r} and {other.settings.get(name)!r}"
        for name in sorted({*one.settings, *other.settings} - free)
        if one.settings.get(name) != other.settings.get(name)
    ]
    if one.device != other.device and all(map(_timed, (one, other))):
        different.append(f"speeds on {one.device} and {other.device}")
    if different:
        raise ValueError(
            f"{one.folder} and {other.folder} do not belong in one report: {', '.join(different)}"
        )


def _timed(evaluation: Evaluation) -> bool:
    return any("timings" in found.row for found in evaluation.ways.values())
