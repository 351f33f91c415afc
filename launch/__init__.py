"""Launchers: thin command lines over the package."""

import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags, logging


def run(main: Callable[[list[str]], None]) -> None:
    """Runs a launcher's main. Libraries' progress notes show only with --verbosity 0 or more."""

    def quiet(argv: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        name = Path(sys.argv[0]).stem
        _expand_home()
        try:
            main(argv)
        except app.UsageError as error:
            sys.exit(f"{name}: {error} (--help lists the flags)")
        except KeyboardInterrupt:
            print(f"\n{name}: interrupted", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)

    app.run(quiet)


def _expand_home() -> None:
    """Home folders in flags, which shells leave alone behind an equals sign."""
    for name in flags.FLAGS:
        flag = flags.FLAGS[name]
        if name in ("prompt", "raw_prompt", "stop"):
            continue
        if isinstance(flag.value, str):
            flag.value = os.path.expanduser(flag.value)
        elif isinstance(flag.value, list):
            flag.value = [os.path.expanduser(x) if isinstance(x, str) else x for x in flag.value]


def stop_at_sigterm() -> None:
    """Ends the process at the signal, with the status of what is to be started again."""
    # Threads that download would hold sys.exit up.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(os.EX_TEMPFAIL))


def numbers(flag: str, values: Sequence[str], below: float = math.inf) -> list[float]:
    """The numbers of a list flag; UsageError unless all are above 0 and below that."""
    try:
        found = [float(value) for value in values]
    except ValueError:
        found = []
    if not found or not all(0 < number < below for number in found):
        most = "" if below == math.inf else f" and below {below:g}"
        raise app.UsageError(f"--{flag} takes numbers above 0{most}, not {','.join(values)!r}")
    return found


def whole(flag: str, values: Sequence[str]) -> list[int]:
    """The numbers of a list flag; UsageError unless all are whole and above 0."""
    try:
        numbers = [int(value) for value in values]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise app.UsageError(f"--{flag} takes whole numbers above 0, not {','.join(values)!r}")
    return numbers
