"""How often drafts are accepted under shared noise, beside rejection sampling, on the digits model.

python -m tests.tools.acceptance --samples 64

Answers are sampled by the base. At each of their tokens, twig and base give probabilities q and p.
Rejection sampling accepts a draft from q with probability sum_i min(p_i, q_i). Shared Gumbel noise
makes both choose the same token with probability sum_i 1 / sum_j max(p_j / p_i, q_j / q_i). The
last column is what `ssd` accepted of the drafts that the base looked at.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from twig_jax import api
from twig_jax.decoding.settings import Settings
from twig_jax.evaluation import tasks
from twig_jax.models.llava import Llava
from twig_jax.models.twig import twig_decoder

_SAMPLES = flags.DEFINE_integer("samples", 64, "pages with a question each", lower_bound=1)
_NEW = flags.DEFINE_integer("max_new_tokens", 48, "most tokens of an answer", lower_bound=1)
_TEMPERATURES = flags.DEFINE_list("temperatures", ["0.3", "0.7", "1.0", "1.5"], "of the draws")


@partial(jax.jit, static_argnums=(0, 1))
def both(config, twig_config, weights, tokens, is_visual, pixels):
    """Logits [B, S, V] of base and twig after every token of whole conversations [B, S]."""
    llava, base = Llava(config), {"params": weights.base}
    visual = llava.apply(base, pixels, method="encode")
    x = llava.apply(base, tokens, is_visual, visual, method="merge")
    B, S = tokens.shape
    at = jnp.broadcast_to(jnp.arange(S), (B, S)), jnp.tril(jnp.ones((B, S, S), bool))
    x, _ = llava.apply(base, x, *at, 0, twig_config.K, method="run")
    y, _ = llava.apply(base, x, *at, twig_config.K, config.text.num_layers, method="run")
    decoder, twig = twig_decoder(config.text, twig_config), {"params": weights.twig}
    x, _ = decoder.apply(twig, x, *at, method="run")
    return llava.apply(base, y, method="logits"), decoder.apply(twig, x, method="logits")


@jax.jit
def rates(p, q, temperature):
    """Acceptance [N] by rejection sampling and by shared noise, for logits [N, V]."""
    p, q = (jax.nn.log_softmax(x / temperature) for x in (p, q))
    rejection = jnp.exp(jnp.minimum(p, q)).sum(-1)

    def agreement(p, q):
        ratios = jnp.maximum(p - p[:, None], q - q[:, None])  # [i, j]: log of the larger of two
        return jnp.exp(-jax.nn.logsumexp(ratios, axis=-1)).sum()

    return rejection, jax.lax.map(lambda pq: agreement(*pq), (p, q))


def measure(model, samples, temperature: float) -> tuple[int, float, float, float]:
    """(tokens, rejection, shared noise, accepted by `ssd`) of sampled answers."""
    g = model.generator
    call = Settings("ssd", max_new_tokens=_NEW.value, gamma=6, theta=0.0, temperature=temperature)
    requests = [
        dataclasses.replace(s.request, settings=dataclasses.replace(call, seed=i))
        for i, s in enumerate(samples)
    ]
    results = g.generate_many(requests, call)
    accepted = sum(int(r.matched.sum()) for r in results)
    # The base looks at a draft until it disagrees with one.
    looked_at = accepted + sum(int((r.matched < [len(d) for d in r.drafts]).sum()) for r in results)
    S = max(len(r.ids) for r in requests) + _NEW.value
    found = []
    for one, result in zip(requests, results, strict=True):
        whole = np.concatenate([one.ids, result.tokens])
        tokens, is_visual = (np.pad(x, (0, S - len(x))) for x in (whole, one.is_visual))
        p, q = both(
            g.config, g.twig_config, g.weights, tokens[None], is_visual[None], one.pixels[None]
        )
        ends = result.stopped_by == "eos"
        predicting = slice(len(one.ids) - 1, len(whole) - 1 + ends)
        found.append(np.stack([np.asarray(p[0, predicting]), np.asarray(q[0, predicting])]))
    p, q = np.concatenate(found, axis=1)
    rejection, shared = rates(p, q, temperature)
    return len(p), float(rejection.mean()), float(shared.mean()), accepted / max(looked_at, 1)


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    model = api.load()
    samples = tasks.load_samples(model.tokenizer, model.config, _SAMPLES.value)
    print("| temperature | tokens | rejection sampling | shared noise | accepted by ssd |")
    print("|---|---|---|---|---|")
    for temperature in map(float, _TEMPERATURES.value):
        tokens, *shares = measure(model, samples, temperature)
        print(f"| {temperature:g} | {tokens} |", " | ".join(f"{x:.1%}" for x in shares), "|")


if __name__ == "__main__":
    app.run(main)
