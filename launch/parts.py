"""Commands in turn or side by side, each within its share of the time, whatever befell others."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_MERCY = 10.0  # seconds to end by itself
_LOOK = 0.05  # seconds between two looks


@dataclass(frozen=True)
class Part:
    """A command; share: its part of the time, beside the shares of the parts after it.

    beside: it runs while the part before it does, within the larger share of the two.
    """

    name: str
    command: Sequence[str]
    share: float
    variables: Mapping[str, str] = field(default_factory=dict)
    beside: bool = False


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
    groups: list[list[Part]] = []
    for part in parts:
        if part.beside and groups:
            groups[-1].append(part)
        else:
            groups.append([part])
    shares = [max(part.share for part in group) for group in groups]
    outcomes = []
    ends = time.monotonic() + seconds
    for i, group in enumerate(groups):
        left = max(ends - time.monotonic(), 0.0)
        limit = left * shares[i] / sum(shares[i:])
        logs = [folder / f"{part.name}.log" for part in group]
        for part, log, (status, taken) in zip(
            group, logs, _run(group, limit, logs, cwd), strict=True
        ):
            outcome = {None: "out of time", 0: "passed"}.get(status, "failed")
            outcomes.append(Outcome(part.name, " ".join(part.command), outcome, taken, limit, log))
    return outcomes


def _run(
    group: Sequence[Part], limit: float, logs: Sequence[Path], cwd: Path
) -> list[tuple[int | None, float]]:
    """Each part's exit status, None where time ran out, and the seconds that it took."""
    began = time.monotonic()
    taken = [limit] * len(group)
    processes: list[subprocess.Popen] = []
    try:
        for part, log in zip(group, logs, strict=True):
            with log.open("w") as told:
                processes.append(
                    subprocess.Popen(
                        part.command,
                        cwd=cwd,
                        env={**os.environ, **part.variables},
                        stdin=subprocess.DEVNULL,
                        stdout=told,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        running = set(range(len(group)))
        while running and time.monotonic() - began < limit:
            time.sleep(_LOOK)
            for i in [i for i in running if processes[i].poll() is not None]:
                running.remove(i)
                taken[i] = time.monotonic() - began
        return [(process.poll(), t) for process, t in zip(processes, taken, strict=True)]
    finally:
        # Whatever ended the wait, a keyboard included.
        for process in processes:
            _end(process)


def _end(process: subprocess.Popen) -> None:
    """Ends what is left of a part, with all that it started."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_MERCY)
