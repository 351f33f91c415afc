"""The compiled loop updates its caches in place: read off the program, nothing is timed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from tests.decoding.models import CALL, CONFIG, TWIG, M
from tests.tools.memory import measure
from twig_jax.decoding import accept
from twig_jax.decoding.buckets import Bucket, program_for
from twig_jax.sharding.mesh import AXES

BUCKET = Bucket(rows=2, text=64, images=8, new=64)


def measured(**changes) -> dict:
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3)
    settings = dataclasses.replace(CALL, **changes)
    program = program_for(BUCKET, settings, CONFIG, TWIG)
    return measure(program, BUCKET.rows, jnp.dtype("float32"), mesh)


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "plain"},
        {"mode": "ttp"},
        {"mode": "ssd"},
        {"adaptive": True},
        {"children": 3, "expanded": 2, "nodes": 5},
    ],
)
def test_no_cache_is_copied_in_the_loop(changes) -> None:
    found = measured(**changes)
    assert found["cache_copies"] == 0
    assert found["reused_mb"] >= found["caches_mb"]


def test_the_check_sees_copies(monkeypatch) -> None:
    """Without its dependence on the chosen tokens, the compiler copies every cache."""
    jax.clear_caches()
    real = accept.commit

    def early(cache, block, slots):
        return real(cache, block, jnp.broadcast_to(jnp.arange(slots.shape[1]), slots.shape))

    monkeypatch.setattr(accept, "commit", early)
    assert measured(mode="plain")["cache_copies"] > 0
    jax.clear_caches()


def test_pruned_layers_hold_no_slots_for_pruned_tokens() -> None:
    """Layers before K_f hold text and R tokens, those after text alone, as the sizes show."""
    text = CONFIG.text
    of = 2 * 4 * text.num_kv_heads * text.head_dim * BUCKET.rows / 1e6  # MB a slot and layer
    N, G, P = BUCKET.text, BUCKET.new + 1, BUCKET.text + BUCKET.images * M
    program = program_for(BUCKET, dataclasses.replace(CALL, mode="ttp"), CONFIG, TWIG)
    Q = N + program.segments[0].slots
    K, K_f, L = TWIG.K, TWIG.K_f, text.num_layers
    slots = K * (P + G) + (K_f - K) * (Q + G) + (L - K_f) * (N + G)
    assert Q < P
    assert measured(mode="ttp")["caches_mb"] == pytest.approx(of * slots)
    assert measured(mode="plain")["caches_mb"] == pytest.approx(of * L * (P + G))
