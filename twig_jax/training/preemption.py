"""Notices that this machine is about to be taken away."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.experimental import multihost_utils


class Preempted(Exception):
    """A run ended early, saved, because it was told to. Started again, it goes on."""


@contextmanager
def preemption() -> Iterator[Callable[[int], bool]]:
    """Gives told(step): whether SIGTERM has come, so that the run is to stop after this step.

    In a single process Ctrl-C is one, too, the first time.

    Hosts call it with the same steps and get the same answer, even if one alone was told: it is
    yes at a step that none of them has passed. To be entered in the main thread.
    """
    if jax.process_count() > 1:
        # jax.distributed listens for the signal, and tells all hosts.
        yield multihost_utils.reached_preemption_sync_point
        return
    came = False
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}

    def note(received: int, _: Any) -> None:
        nonlocal came
        came = True
        if received == signal.SIGINT:
            signal.signal(signal.SIGINT, before[signal.SIGINT])

    for each in before:
        signal.signal(each, note)
    try:
        yield lambda step: came
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
