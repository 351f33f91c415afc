"""The shipped base is a LLaVA that transformers loads, with the same logits on real pages."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from twig_jax import api
from twig_jax.data.digits import ASSETS
from twig_jax.decoding.settings import Settings
from twig_jax.evaluation import tasks
from twig_jax.models.llava import Llava
from twig_jax.presets import preset

CONFIG, _ = preset("digits")


@jax.jit
def next_tokens(params, tokens, is_visual, pixels):
    """The likeliest next token at every position of one row."""
    llava = Llava(CONFIG)
    visual = llava.apply(params, pixels, method="encode")
    x = llava.apply(params, tokens, is_visual, visual, method="merge")
    S = tokens.shape[1]
    causal = jnp.tril(jnp.ones((S, S), bool))[None]
    x, _ = llava.apply(params, x, jnp.arange(S)[None], causal, method="run")
    return llava.apply(params, x, method="logits").argmax(-1)


def test_bfloat16_agrees_on_most_next_tokens(capsys):
    """Half precision is never called lossless: what it changes is counted."""
    bases = {dtype: api.load(dtype=dtype) for dtype in ("float32", "bfloat16")}
    same = []
    for sample in tasks.load_samples(bases["float32"].tokenizer, CONFIG, 8, seed=3, task="long"):
        r = sample.request
        answer = bases["float32"].tokenizer.encode(f" {sample.question.answer}")
        ids = np.concatenate([r.ids, answer])[None]
        visual = np.pad(r.is_visual, (0, len(answer)))[None]
        found = [
            np.asarray(
                next_tokens(
                    {"params": model.generator.weights.base},
                    ids,
                    visual,
                    jnp.asarray(r.pixels[None], dtype),
                )
            )
            for dtype, model in bases.items()
        ]
        same += (found[0] == found[1])[0, len(r.ids) - 1 :].tolist()
    with capsys.disabled():
        print(f" {np.mean(same):.2%} of {len(same)}", end="")
    assert np.mean(same) > 0.97


def test_logits_and_answers_equal_transformers():
    """float32; 1e-4 relative is two orders above what the order of summation does."""
    model = api.load()
    theirs = LlavaForConditionalGeneration.from_pretrained(
        ASSETS / "base", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "base")
    samples = tasks.load_samples(tokenizer, model.config, 4, seed=3)
    llava, params = Llava(model.config), {"params": model.generator.weights.base}

    @jax.jit
    def logits(tokens, is_visual, pixels):
        visual = llava.apply(params, pixels, method="encode")
        x = llava.apply(params, tokens, is_visual, visual, method="merge")
        S = tokens.shape[1]
        causal = jnp.tril(jnp.ones((S, S), bool))[None]
        x, _ = llava.apply(params, x, jnp.arange(S)[None], causal, method="run")
        return llava.apply(params, x, method="logits")

    with jax.default_matmul_precision("highest"):
        results = tasks.answer(model.generator, samples, Settings("plain", max_new_tokens=50))
        for sample, result in zip(samples, results, strict=True):
            r = sample.request
            ours = np.asarray(logits(r.ids[None], r.is_visual[None], r.pixels[None]))
            ids = torch.tensor(r.ids[None].astype(np.int64))
            pixels = torch.tensor(r.pixels.transpose(0, 3, 1, 2))
            with torch.no_grad():
                expected = theirs(input_ids=ids, pixel_values=pixels).logits.numpy()
                answer = theirs.generate(
                    input_ids=ids,
                    pixel_values=pixels,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=50,
                    do_sample=False,
                )[0, len(r.ids) :].tolist()
            assert np.abs(ours - expected).max() <= 1e-4 * np.abs(expected).max()
            told = result.tokens.tolist()
            assert answer == told + ([2] if result.stopped_by == "eos" else [])
