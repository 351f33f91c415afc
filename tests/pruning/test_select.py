"""The fixed-budget gather against an obvious selection with lists."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from twig_jax.pruning.select import select, take

P, N, R_MAX = 12, 8, 6


def obvious(scores, is_visual, length, retained):
    visual = [i for i in range(length) if is_visual[i]]
    best = sorted(visual, key=lambda i: (-scores[i], i))[:retained]
    text = [i for i in range(length) if not is_visual[i]]
    kept = sorted(text + best)
    return kept + [P] * (N + R_MAX - len(kept))


def test_there_may_be_fewer_slots_than_a_budget():
    """As in a later turn of few tokens."""
    one = jnp.ones((1, 3)), jnp.asarray([[False, True, False]]), jnp.asarray([3]), jnp.asarray([5])
    assert select(*one, 3, 5)[0].tolist() == [0, 1, 2, 3, 3, 3]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_equals_the_obvious_selection(data):
    length = data.draw(st.integers(1, P))
    visual = data.draw(st.lists(st.booleans(), min_size=P, max_size=P))
    visual[: max(0, length - N)] = [True] * max(0, length - N)  # no more text than slots
    retained = data.draw(st.integers(0, R_MAX))
    scores = data.draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=P, max_size=P))
    kept = select(
        jnp.asarray([scores], jnp.float32),
        jnp.asarray([visual]),
        jnp.asarray([length], jnp.int32),
        jnp.asarray([retained], jnp.int32),
        N,
        R_MAX,
    )
    if sum(not v for v in visual[:length]) <= N:
        assert kept[0].tolist() == obvious(scores, visual, length, retained)


def test_nan_scores_are_kept_last():
    visual = jnp.asarray([[False] + [True] * 4])
    scores = jnp.asarray([[0.0, jnp.nan, 0.1, jnp.nan, 0.2]], jnp.float32)
    kept = select(scores, visual, jnp.asarray([5]), jnp.asarray([2]), 1, 4)
    assert kept[0].tolist() == [0, 2, 4, 5, 5]


def test_take_gives_zeros_past_the_end():
    x = jnp.arange(6.0).reshape(1, 3, 2) + 1
    taken = take(x, jnp.asarray([[2, 3, 0]]))
    np.testing.assert_array_equal(taken, [[[5, 6], [0, 0], [1, 2]]])
