"""Any number of questions: read while others are answered, and some of them bad."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from twig_jax.decoding.settings import Request, Result

# Questions whose images are in memory, and sorted by length, together: so many batches.
_WINDOW = 16


def ask_many(
    count: int,
    ask: Callable[[int], Request],
    decode: Callable[[Sequence[Request], Callable[[int, Result], Any]], Any],
    batch: int,
    told: Callable[[int, Request, Result], Any],
    failed: Callable[[int, Exception], Any],
) -> None:
    """Answers questions 0 .. count - 1, a window of batches at a time.

    ask: makes the request of a question, in order, in a thread of its own and a window ahead.
    decode: answers requests, telling each (index, result), as `Generator.generate_many` does.
    told: is given (question, request, result) of each as it is there. failed: is given (question,
    error) where `ask` raises MemoryError, OSError or ValueError; other errors end it all.
    """
    size = _WINDOW * batch
    pool = ThreadPoolExecutor(1)

    def read(first: int) -> list[Future[Request]]:
        return [pool.submit(ask, i) for i in range(first, min(first + size, count))]

    try:
        coming = read(0)
        for first in range(0, count, size):
            reading, coming = coming, read(first + size)
            asked: list[tuple[int, Request]] = []
            for i, made in enumerate(reading, first):
                try:
                    asked.append((i, made.result()))
                except (MemoryError, OSError, ValueError) as error:
                    failed(i, error)
            if asked:
                decode([request for _, request in asked], partial(_tell, told, asked))
    finally:
        pool.shutdown(cancel_futures=True)


def _tell(told: Callable, asked: Sequence[tuple[int, Request]], at: int, result: Result) -> None:
    told(*asked[at], result)
