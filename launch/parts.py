"""Commands one after the other, each within its share of the time, whatever befell the others."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_MERCY = 10.0  # seconds to end by itself


@dataclass(frozen=True)
class Part:
    """A command; share: its part of the time, beside the shares of the parts after it."""

    name: str
    command: Sequence[str]
    share: float
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of a part: "passed", "failed" or "out of time"."""

    name: str
    command: str
    outcome: str
    seconds: float
    limit: float
    log: Path


def run_parts(parts: Sequence[Part], seconds: float, folder: Path, cwd: Path) -> list[Outcome]:
    """Runs all parts within so many seconds; what they print goes to folder/NAME.log.

    Time that a part leaves goes to those after it. A part that is out of time is ended together
    with the processes that it started.
    """
    outcomes = []
    ends = time.monotonic() + seconds
    for i, part in enumerate(parts):
        left = max(ends - time.monotonic(), 0.0)
        limit = left * part.share / sum(later.share for later in parts[i:])
        log, began = folder / f"{part.name}.log", time.monotonic()
        status = _run(part, limit, log, cwd)
        outcome = {None: "out of time", 0: "passed"}.get(status, "failed")
        taken = time.monotonic() - began
        outcomes.append(Outcome(part.name, " ".join(part.command), outcome, taken, limit, log))
    return outcomes


def _run(part: Part, limit: float, log: Path, cwd: Path) -> int | None:
    """The exit status, None where time ran out."""
    with log.open("w") as told:
        process = subprocess.Popen(
            part.command,
            cwd=cwd,
            env={**os.environ, **part.variables},
            stdin=subprocess.DEVNULL,
            stdout=told,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            # Whatever ended the wait, a keyboard included.
            for how in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, how)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_MERCY)
