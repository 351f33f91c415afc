"""The P-Head's scores: what they start as, what they depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twig_jax.config import GATES, TextConfig, TwigConfig
from twig_jax.models.twig import Twig, fresh_p_head, twig_decoder

TEXT = TextConfig(
    vocab_size=20,
    hidden_size=12,
    intermediate_size=16,
    num_layers=5,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
)
B, S, VISUAL = 2, 9, slice(2, 7)
MASK = np.zeros((B, 1, S), bool)
MASK[:, :, VISUAL] = True


@pytest.fixture(scope="module")
def decoder():
    return twig_decoder(TEXT, TwigConfig(K=1, T=2, K_f=4, p_head=True))


@pytest.fixture(scope="module")
def params(decoder, draw):
    """Drawn, but for a fresh P-Head."""
    shapes = jax.eval_shape(decoder.init, jax.random.key(0), jnp.zeros((1, 1, 12)))["params"]
    return {**draw(shapes), "p_head": fresh_p_head(TEXT)}


def scores(decoder, params, x, mask=MASK):
    """(s of the last token [B, 1, S], attention of the last token [B, H, 1, S])."""
    run = {"params": params}
    at = jnp.broadcast_to(jnp.arange(S), (B, S))
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((S, S), bool)), (B, S, S))
    y, _ = decoder.apply(run, x, at, causal, 0, 1, method="run")
    _, (kv,) = decoder.apply(run, y, at, causal, 1, 2, method="run")
    last = (y[:, -1:], at[:, -1:])
    gates = decoder.apply(run, y, method="key_gates")
    s = decoder.apply(run, *last, kv.k, gates, mask, method="visual_scores")
    return s, decoder.apply(run, 1, *last, kv.k, jnp.ones((B, 1, S), bool), method="attention_rows")


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (B, S, 12))


def test_it_starts_as_attention_among_visual_tokens(decoder, params, x):
    s, attention = scores(decoder, params, x)
    own = attention[:, :, :, VISUAL]
    expected = (own / own.sum(-1, keepdims=True)).mean(1)
    np.testing.assert_allclose(s[:, :, VISUAL], expected, atol=1e-6)
    assert not s[:, :, : VISUAL.start].any() and not s[:, :, VISUAL.stop :].any()


@pytest.mark.parametrize("form", GATES)
def test_trained_gates_follow_the_formula(params, draw, x, form):
    """Against the paper's equation, head by head."""
    decoder = twig_decoder(TEXT, TwigConfig(K=1, T=2, K_f=4, p_head=True, gate=form))
    shapes = jax.eval_shape(decoder.init, jax.random.key(0), jnp.zeros((1, 1, 12)))["params"]
    head = draw(shapes["p_head"], seed=3)
    params = {**params, "p_head": head}
    s, _ = scores(decoder, params, x)
    np.testing.assert_allclose(s.sum(-1), 1, atol=1e-6)
    run = {"params": params}
    at = jnp.broadcast_to(jnp.arange(S), (B, S))
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((S, S), bool)), (B, S, S))
    y, _ = decoder.apply(run, x, at, causal, 0, 1, method="run")
    _, (kv,) = decoder.apply(run, y, at, causal, 1, 2, method="run")
    normed = np.asarray(
        y
        * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + TEXT.rms_norm_eps)
        * params["layers_1"]["input_layernorm"]["scale"]
    )
    q = np.asarray(
        decoder.apply(run, y, at, method=lambda m, y, at: m.layers[1].queries(y, m.rope(at)))
    )[:, -1]

    def gate(name, x):
        z = x @ np.asarray(head[name]["kernel"])
        if form == "relu * sigmoid":
            return np.maximum(z, 0) / (1 + np.exp(-z))
        return 2 / (1 + np.exp(-z - np.asarray(head[name]["bias"])))

    expected = np.zeros((B, S))
    for b, h in np.ndindex(B, TEXT.num_heads):
        group, D = h // 2, TEXT.head_dim
        g_q = gate("q_gate", normed[b, -1])[h * D : (h + 1) * D]
        g_k = gate("k_gate", normed[b])[:, group * D : (group + 1) * D]
        logits = (g_k * np.asarray(kv.k)[b, group]) @ (g_q * q[b, h]) / np.sqrt(D)
        weights = np.where(MASK[b, 0], np.exp(logits - logits.max()), 0)
        expected[b] += weights / weights.sum() / TEXT.num_heads
    np.testing.assert_allclose(s[:, 0], expected, atol=1e-5)


def test_without_visual_tokens_there_is_no_score(decoder, params, x):
    s, _ = scores(decoder, params, x, np.zeros_like(MASK))
    np.testing.assert_array_equal(s, 0)


def test_drafting_does_not_depend_on_it(decoder, params, x):
    plain = Twig(TEXT, 2)
    at, mask = jnp.broadcast_to(jnp.arange(S), (B, S)), jnp.ones((B, S, S), bool)
    ours, _ = decoder.apply({"params": params}, x, at, mask, method="run")
    rest = {k: v for k, v in params.items() if k != "p_head"}
    theirs, _ = plain.apply({"params": rest}, x, at, mask, method="run")
    np.testing.assert_array_equal(ours, theirs)
