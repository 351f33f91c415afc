"""The decoder run in pieces equals the decoder run whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twig_jax.models.attention import KV, attend
from twig_jax.models.llama import Decoder
from twig_jax.models.llava import Llava

B, S = 2, 9


@pytest.fixture(scope="module")
def run(config, base):
    """`Decoder.run` of the base."""
    model = Llava(config)

    @functools.partial(jax.jit, static_argnames=("first", "last"))
    def run(*args, **kwargs):
        return model.apply({"params": base}, *args, method="run", **kwargs)

    return run


@pytest.fixture(scope="module")
def inputs(config):
    x = jax.random.normal(jax.random.key(1), (B, S, config.text.hidden_size))
    # Positions with gaps, as after pruning.
    return x, jnp.array([[0, 1, 2, 5, 6, 9, 10, 11, 12], [0, 2, 4, 5, 7, 8, 9, 10, 12]])


def causal(n):
    return jnp.broadcast_to(jnp.tril(jnp.ones((n, n), bool)), (B, n, n))


@pytest.fixture(scope="module")
def whole(run, inputs):
    return run(*inputs, causal(S))


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-5, 1e-4), a, b)


@pytest.mark.parametrize("cut", [1, 3])
def test_ranges_of_layers_compose(run, inputs, whole, cut):
    x, lower = run(*inputs, causal(S), last=cut)
    x, upper = run(x, inputs[1], causal(S), first=cut)
    close((x, lower + upper), whole)


@pytest.mark.parametrize("cut", [1, 5])
def test_cached_prefix(run, inputs, whole, cut):
    x, positions = inputs
    _, cache = run(x[:, :cut], positions[:, :cut], causal(cut))
    later, _ = run(
        x[:, cut:],
        positions[:, cut:],
        causal(S - cut),
        cached=cache,
        cached_mask=jnp.ones((B, S - cut, cut), bool),
    )
    close(later, whole[0][:, cut:])


def test_token_by_token_through_a_scratch_block(run, inputs, whole, config):
    x, positions = inputs
    width = S + 2  # two slots stay unused
    empty = jnp.full((B, config.text.num_kv_heads, width, config.text.head_dim), 7.0)
    scratch = (KV(empty, empty),) * config.text.num_layers
    for i in range(S):
        mask = jnp.broadcast_to(jnp.arange(width) <= i, (B, 1, width))
        out, scratch = run(x[:, i : i + 1], positions[:, i : i + 1], mask, scratch=scratch, index=i)
        close(out[:, 0], whole[0][:, i])
    close(tuple(KV(c.k[:, :, :S], c.v[:, :, :S]) for c in scratch), whole[1])


def test_masked_keys_do_not_matter(run, inputs):
    x, positions = inputs
    mask = causal(S) & (jnp.arange(S) != 3)[None, None, :] | jnp.eye(S, dtype=bool)[None]
    out, _ = run(x, positions, mask)
    other, _ = run(x.at[:, 3].set(100.0), positions, mask)
    keep = np.arange(S) != 3
    np.testing.assert_array_equal(out[:, keep], other[:, keep])


def test_attention_row_averages_to_the_values_attended(config, base, run, inputs):
    """Row times values, through the output projection, is what the layer adds."""
    x, positions = inputs
    model, layer = Llava(config), 2
    into, kvs = run(x, positions, causal(S), last=layer + 1)
    before, _ = run(x, positions, causal(S), last=layer)
    row = model.apply(
        {"params": base},
        layer,
        before[:, -1:],
        positions[:, -1:],
        kvs[layer].k,
        jnp.ones((B, 1, S), bool),
        method="attention_rows",
    )[:, :, 0]
    assert row.shape == (B, config.text.num_heads, S)
    group = config.text.num_heads // config.text.num_kv_heads
    values = jnp.repeat(kvs[layer].v, group, axis=1)
    heads = jnp.einsum("BHS,BHSD->BHD", row, values).reshape(B, -1)
    weights = base["text"][f"layers_{layer}"]
    y = before[:, -1] + heads @ weights["o_proj"]["kernel"]
    z = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + config.text.rms_norm_eps)
    z = z * weights["post_attention_layernorm"]["scale"]
    up = jax.nn.silu(z @ weights["gate_proj"]["kernel"]) * (z @ weights["up_proj"]["kernel"])
    close(y + up @ weights["down_proj"]["kernel"], into[:, -1])


def test_logits_are_float32_in_bfloat16_models(config, base):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base["text"])
    x = jnp.ones((1, 2, config.text.hidden_size), jnp.bfloat16)
    decoder = Decoder(config.text, config.text.num_layers)
    out, kvs = decoder.apply({"params": half}, x, jnp.arange(2)[None], causal(2)[:1], method="run")
    assert out.dtype == kvs[0].k.dtype == jnp.bfloat16
    assert decoder.apply({"params": half}, out, method="logits").dtype == jnp.float32


def test_layers_are_traced_once_and_can_still_be_looked_into(config, base, inputs, whole):
    """Tracing each of LLaVA's 24 and 32 layers would be most of a start from compiled programs."""
    traced = []

    def attention(q, context):
        traced.append(q.shape)
        return attend(q, context)

    model, layers = Llava(config), config.text.num_layers
    given = {"params": base}, *inputs, causal(S)
    jax.eval_shape(lambda *args: model.apply(*args, method="run", attention=attention), *given)
    pixels = jnp.zeros((1, 1, config.vision.image_size, config.vision.image_size, 3))
    jax.eval_shape(
        lambda *args: model.apply(*args, method="encode", attention=attention), given[0], pixels
    )
    assert len(traced) == 2 < layers
    out, kept = model.apply(*given, method="run", capture_intermediates=True, mutable=True)
    close(out, whole)
    states = [kept["intermediates"]["text"][f"layers_{i}"]["__call__"][0][0] for i in range(layers)]
    close(states[-1], whole[0])
