"""Programs in processes of their own, as a user starts them."""

import os
import subprocess
import sys
from pathlib import Path

from tests import QUICK_COMPILING

ROOT = Path(__file__).resolve().parents[2]


def environment(**variables):
    """This one, with a single device: what one program has compiled, others load."""
    return os.environ | {"XLA_FLAGS": QUICK_COMPILING, "HF_HUB_OFFLINE": "1"} | variables


def python(*arguments, **variables):
    """Python from the repository's folder, to its end."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=900,
    )


def launch(name, *arguments):
    """A launcher."""
    return python("-m", f"launch.{name}", *arguments)
