"""The equalities notice small mistakes: each is made on purpose here."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoding.models import CONFIG, change, forced, generator, request, run, tokens
from twig_jax.decoding import accept as accept_module
from twig_jax.decoding import draft as draft_module
from twig_jax.decoding import loop, network, prefill
from twig_jax.decoding.sampling import choose, scores
from twig_jax.decoding.settings import Result, Settings, controls

# Text alone, so that little is compiled anew; two greedy rows, two sampled ones.
CALL = Settings("ssd", max_new_tokens=14, gamma=3, theta=0.0)
ROWS = [
    change(request(i, 0, 5, 3), **dataclasses.asdict(CALL) | {"temperature": i % 2, "seed": i})
    for i in range(4)
]


@pytest.fixture(autouse=True)
def traced_anew():
    """Programs of before or after a mistake are no use."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture
def answers():
    """answers(mode): ROWS, as the engine answers them now; with changes of their settings."""
    return lambda mode, **changed: run(ROWS, CALL, mode=mode, **changed)


def failing(fast: list[Result], slow: list[Result]) -> set[str]:
    """Which equalities do not hold between answers with and without drafts."""
    wrong = set()
    if tokens(fast) != tokens(slow):
        wrong.add("plain")
    for one, result in zip(ROWS, fast, strict=True):
        if chosen(one, result.tokens) != result.tokens.tolist():
            wrong.add("teacher-forced")
    return wrong


def chosen(one, answer: np.ndarray) -> list[int]:
    """What a one-pass computation chooses after each token of a row's answer."""
    whole = np.resize(answer, CALL.max_new_tokens)  # one shape for all
    n = np.arange(len(whole) + 1)
    logits = forced(generator(), one, whole, 0).logits
    own = jax.tree.map(jnp.asarray, controls([one.settings], eos=CONFIG.eos_token_id))
    path = np.zeros((1, len(n), 0), np.int32)
    tokens = choose(own, logits, n[None], (len(one.ids) + n)[None], nobody_asks, path)
    return tokens[0].tolist()[: len(answer)]


def nobody_asks() -> np.ndarray:
    """Which tokens were there before, of rows without a repetition penalty."""
    return np.zeros((1, CONFIG.text.vocab_size), bool)


def share(results: list[Result]) -> float:
    """Accepted drafts of all."""
    return sum(r.matched.sum() for r in results) / sum(len(d) for r in results for d in r.drafts)


def test_without_mistakes_nothing_fails(answers) -> None:
    fast = answers("ssd")
    assert failing(fast, answers("plain")) == set()
    assert 0.2 < share(fast) < 0.9


def test_one_draft_too_many(answers, monkeypatch) -> None:
    def generous(program, state, drafts, deep, choice, cost):
        node = jnp.arange(program.width - 1)
        drafted = node < drafts.drafted[:, None]
        wrong = (drafts.tokens[:, 1:] != choice[:, :-1]) & drafted
        first = wrong & (jnp.cumsum(wrong, axis=1) == 1)
        forgiven = jnp.where(first, drafts.tokens[:, 1:], choice[:, :-1])
        choice = choice.at[:, :-1].set(forgiven)
        return accept_module.accept(program, state, drafts, deep, choice, cost)

    for module in (loop, prefill):
        monkeypatch.setattr(module, "accept", generous)
    assert failing(answers("ssd"), answers("plain")) == {"plain", "teacher-forced"}


def test_verification_one_position_off(answers, monkeypatch) -> None:
    layers = network.Program.layers

    def shifted(self, weights, first, last, x, positions, *args, **kwargs):
        if first >= self.K and kwargs.get("cached"):
            positions = positions + 1
        return layers(self, weights, first, last, x, positions, *args, **kwargs)

    monkeypatch.setattr(network.Program, "layers", shifted)
    assert "teacher-forced" in failing(answers("ssd"), answers("plain"))


def test_a_rejected_draft_that_is_seen(answers, monkeypatch) -> None:
    """All nodes' keys and values are kept, and one slot more than there are tokens is seen."""

    def everything(cache, block, slots):
        first = slots[:, -W:][:, :1]
        after = jnp.where(first < accept_module._NOWHERE, first + jnp.arange(W), slots[:, -W:])
        return commit(cache, block, jnp.concatenate([slots[:, :-W], after], axis=1))

    W, commit, sees = CALL.gamma + 1, accept_module.commit, loop.sees
    slow = answers("plain")
    monkeypatch.setattr(accept_module, "commit", everything)
    monkeypatch.setattr(loop, "sees", lambda prompt, n, *shape: sees(prompt, n + 1, *shape))
    assert failing(answers("ssd"), slow) == {"plain", "teacher-forced"}


def test_the_base_with_noise_of_another_position(answers, monkeypatch) -> None:
    def shifted(controls, logits, n, positions, *seen):
        return choose(controls, logits, n, positions + 1, *seen)

    monkeypatch.setattr(loop, "choose", shifted)
    assert failing(answers("ssd"), answers("plain")) == {"plain", "teacher-forced"}


def test_the_twig_with_noise_of_another_position(answers, monkeypatch) -> None:
    """No answer is wrong, but drafts agree by chance only."""

    def shifted(controls, logits, n, positions, *seen):
        return scores(controls, logits, n, positions + 1, *seen)

    right = answers("ssd", temperature=2.0)
    jax.clear_caches()
    monkeypatch.setattr(draft_module, "scores", shifted)
    fast = answers("ssd", temperature=2.0)
    assert tokens(fast) == tokens(right)
    assert share(fast) < share(right) / 2
