"""Many questions: read a window ahead, each answered or told why not."""

import threading
import time
from types import SimpleNamespace

import pytest

from twig_jax.decoding.asking import ask_many

WINDOW = 16


class Asker:
    """Reads question i as a request of that name; answers a window's last question first."""

    def __init__(self, bad=(), stop=None):
        self.read, self.answered, self.failed, self.sizes = [], {}, {}, []
        self.bad, self.stop = bad, stop

    def ask(self, i):
        assert threading.current_thread() is not threading.main_thread()
        self.read.append(i)
        if i in self.bad:
            raise (MemoryError, OSError, ValueError)[i % 3](f"no image {i}")
        if i == self.stop:
            raise KeyError(i)
        return SimpleNamespace(name=i)

    def decode(self, requests, told):
        self.sizes.append(len(requests))
        for n in reversed(range(len(requests))):
            told(n, f"answer {requests[n].name}")

    def told(self, i, request, result):
        assert threading.current_thread() is threading.main_thread()
        assert request.name == i and i not in self.answered
        self.answered[i] = result

    def run(self, count, decode=None):
        ask_many(count, self.ask, decode or self.decode, 1, self.told, self.failed.__setitem__)


@pytest.mark.parametrize("count", [0, 1, WINDOW, WINDOW + 1, 3 * WINDOW - 1])
def test_each_question_is_read_once_in_order_and_answered(count):
    asker = Asker()
    asker.run(count)
    assert asker.read == list(range(count))
    assert asker.answered == {i: f"answer {i}" for i in range(count)}
    assert not asker.failed
    whole, rest = divmod(count, WINDOW)
    assert asker.sizes == [WINDOW] * whole + [rest] * (rest > 0)


def test_bad_questions_are_told_and_the_others_answered():
    bad = (3, 4, 5, *range(WINDOW, 2 * WINDOW), 2 * WINDOW + 1)
    asker = Asker(bad)
    asker.run(3 * WINDOW)
    assert {i: str(error) for i, error in asker.failed.items()} == {i: f"no image {i}" for i in bad}
    assert sorted(asker.answered) == [i for i in range(3 * WINDOW) if i not in bad]
    assert asker.sizes == [WINDOW - 3, WINDOW - 1]  # nothing is decoded where all are bad


def test_one_window_is_read_while_another_is_answered():
    asker, seen = Asker(), []

    def decode(requests, told):
        last = min(requests[0].name + 2 * WINDOW, 3 * WINDOW)
        end = time.monotonic() + 30
        while len(asker.read) < last and time.monotonic() < end:
            time.sleep(0.001)
        seen.append(len(asker.read))
        asker.decode(requests, told)

    asker.run(3 * WINDOW, decode)
    assert seen == [2 * WINDOW, 3 * WINDOW, 3 * WINDOW]  # and no further: images take memory


def test_other_errors_end_it():
    asker = Asker(stop=WINDOW + 2)
    with pytest.raises(KeyError):
        asker.run(3 * WINDOW)
    assert sorted(asker.answered) == list(range(WINDOW))


def test_an_interruption_waits_for_no_more_than_the_question_that_is_read():
    asker = Asker()

    def decode(requests, told):
        raise KeyboardInterrupt

    def slow(i):
        if i >= WINDOW:
            time.sleep(0.05)
        return asker.ask(i)

    with pytest.raises(KeyboardInterrupt):
        ask_many(2 * WINDOW, slow, decode, 1, asker.told, asker.failed.__setitem__)
    assert len(asker.read) < WINDOW + 8
