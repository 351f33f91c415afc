"""Compares accelerated answers with plain ones token for token, over many random models.

python -m tests.tools.equalities --tokens 200000 --seed 0

Batches are of unlike rows, greedy and sampled, with γ and θ of their own: answers of `ssd` are
compared with those of `plain`, of `ttp_ssd` with those of `ttp`, adaptive or not, and rows alone
with themselves in a batch. Two answers count as compared up to their first difference. That is a
tie where the two tokens' logits, noise included, are less than 1e-4 of the largest logit apart
in a one-pass computation; any other ends in exit status 1. The last line is JSON.
"""

import dataclasses
import json
import os
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from absl import app, flags, logging
from tqdm import tqdm

_TOKENS = flags.DEFINE_integer("tokens", 200_000, "how many to compare at least", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "of weights, prompts and settings")
_DEVICES = flags.DEFINE_integer("devices", 1, "fake devices; a batch is spread over all of them")
_ROWS = flags.DEFINE_integer("rows", 64, "of a batch", lower_bound=2)
_NEW = flags.DEFINE_integer("new", 64, "most new tokens of a row", lower_bound=8)

TIE = 1e-4
MODELS_OF_A_SHAPE = 6  # what is compiled for one shape serves so many draws of weights
ALONE = 4  # rows of a batch that are also run alone
MOST_KEPT = 7  # of the visual tokens of an image
TWIGS = ((1, 2, 4), (2, 1, 5), (1, 1, 3), (2, 2, 4))  # K, T, K_f


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)
    # Before jax is imported: its backend reads it once.
    count = f" --xla_force_host_platform_device_count={_DEVICES.value}"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + count
    import jax

    # For all threads.
    jax.config.update("jax_default_matmul_precision", "highest")
    report = compare_all()
    print(json.dumps(report))
    sys.exit(report["differences"] > 0)


def compare_all():
    """Counts of all comparisons until there are tokens enough."""
    import numpy as np

    began, counts, rng = time.perf_counter(), Counter(), np.random.default_rng(_SEED.value)
    with tqdm(total=_TOKENS.value, unit="token", smoothing=0, disable=None) as bar:
        while counts["tokens"] < _TOKENS.value:
            counts["models"] += 1
            shape = TWIGS[(counts["models"] - 1) // MODELS_OF_A_SHAPE % len(TWIGS)]
            compare_model(shape, rng, counts)
            bar.update(counts["tokens"] - bar.n)
            bar.set_postfix(differences=counts["differences"], ties=counts["ties"])
    names = ("tokens", "comparisons", "differences", "ties", "models")
    return {name: counts[name] for name in names} | {
        "devices": _DEVICES.value,
        "drafts_accepted": round(counts["accepted"] / max(counts["drafted"], 1), 3),
        "seconds": round(time.perf_counter() - began),
    }


def compare_model(shape, rng, counts) -> None:
    """All comparisons of one random model."""
    from tests.decoding import models
    from twig_jax.config import TwigConfig
    from twig_jax.decoding.buckets import Bucket
    from twig_jax.sharding.mesh import make_mesh

    rows, new, seed = _ROWS.value, _NEW.value, int(rng.integers(2**30))
    buckets = [Bucket(1, 16, 2, new), Bucket(rows, 16, 2, new)]
    mesh = make_mesh() if _DEVICES.value > 1 else None
    made = {"buckets": buckets, "mesh": mesh, "draft_cost": 0.1}
    # Heads as wide as the kernels for GPUs need.
    text = dataclasses.replace(models.CONFIG.text, head_dim=16)
    model = models.generator(TwigConfig(*shape), seed, made, text=text)
    requests = [models.request(0, 2, 8, 8, **random_settings(shape, rng, gamma=6))]
    for _ in range(rows - 1):
        texts = rng.integers(1, 9, 2).tolist()
        prompt, images = int(rng.integers(2**30)), int(rng.integers(3))
        requests.append(models.request(prompt, images, *texts, **random_settings(shape, rng)))
    call = dataclasses.replace(models.CALL, avg_retained=average(shape, MOST_KEPT))

    alone = rng.choice(rows, ALONE, replace=False).tolist()

    def together(mode, adaptive=False):
        return models.run(requests, call, model, mode=mode, adaptive=adaptive)

    def by_themselves(mode):
        each = ([models.change(requests[i], gamma=6)] for i in alone)
        return [(one, models.run(one, call, model, mode=mode)) for one in each]

    # Compiling takes most of the time, so that programs are compiled beside each other. Those of
    # several devices must come to all of them in one order.
    with ThreadPoolExecutor(1 if mesh else None) as pool:
        running = [
            (
                pool.submit(together, slow),
                [pool.submit(together, fast, adaptive) for adaptive in (False, True)],
                pool.submit(by_themselves, fast),
            )
            for fast, slow in (("ssd", "plain"), ("ttp_ssd", "ttp"))
        ]
    # For the gap at a difference: plain decoding is pruning that keeps all.
    for last, (slow, fast, single) in zip((5, shape[2]), running, strict=True):
        reference = models.generator(TwigConfig(*shape[:2], last), seed, text=text)
        known = slow.result()
        for found in (answers.result() for answers in fast):
            counts["drafted"] += sum(len(d) for r in found for d in r.drafts)
            counts["accepted"] += sum(int(r.matched.sum()) for r in found)
            compare(reference, requests, found, known, counts)
        for i, (one, found) in zip(alone, single.result(), strict=True):
            compare(reference, one, found, known[i : i + 1], counts)


def average(shape, kept: int) -> float:
    """R̄ that keeps so many tokens of one image (Eq. 6)."""
    from tests.decoding.models import CONFIG, M

    K, _, K_f = shape
    return (K * M + kept * (K_f - K)) / CONFIG.text.num_layers


def random_settings(shape, rng, **fixed) -> dict:
    """Settings of a row; half of them are greedy."""
    new = _NEW.value
    drawn = {
        "max_new_tokens": new if fixed else int(rng.integers(new // 2, new + 1)),
        "min_new_tokens": int(rng.choice([0, new])),
        "avg_retained": average(shape, int(rng.integers(2, MOST_KEPT + 1))),
        "gamma": int(rng.integers(1, 7)),
        "theta": float(rng.choice([0, 0.1, 0.5])),
        "temperature": float(rng.choice([0, 0, 0, 0.5, 1, 1.5])),
        "top_k": int(rng.choice([0, 0, 8])),
        "top_p": float(rng.choice([1, 1, 0.9])),
        "repetition_penalty": float(rng.choice([1, 1, 1.2])),
        "seed": int(rng.integers(2**32)),
    }
    return drawn | fixed


def compare(reference, requests, found, known, counts) -> None:
    """Counts how far answers agree, and what their first differences are."""
    import numpy as np

    eos = reference.config.eos_token_id
    for one, a, b in zip(requests, found, known, strict=True):
        mine, theirs = (np.append(r.tokens, [eos] * (r.stopped_by == "eos")) for r in (a, b))
        size = min(len(mine), len(theirs))
        differs = np.flatnonzero(mine[:size] != theirs[:size])
        counts["comparisons"] += 1
        counts["tokens"] += int(differs[0]) + 1 if len(differs) else size
        if len(differs):
            at = int(differs[0])
            width = gap(reference, one, theirs[:at], len(b.kept), int(mine[at]), int(theirs[at]))
            counts["ties" if width < TIE else "differences"] += 1
            tqdm.write(f"token {at}: {mine[at]}, not {theirs[at]}; relative gap {width:.1e}")
        elif len(mine) != len(theirs):
            counts["differences"] += 1
            tqdm.write(f"{len(mine)} tokens, not {len(theirs)}")


def gap(reference, one, answer, kept: int, mine: int, theirs: int) -> float:
    """How far apart two next tokens are after an answer, noise included, beside the largest."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from tests.decoding import models
    from twig_jax.decoding.sampling import scores
    from twig_jax.decoding.settings import controls

    answer = np.asarray(answer, np.int32)
    logits = models.forced(reference, one, answer, kept).logits[:, -1:]
    own = jax.tree.map(jnp.asarray, controls([one.settings], reference.config.eos_token_id))
    seen = np.zeros((1, logits.shape[-1]), bool)
    seen[0, one.ids[~one.is_visual]] = seen[0, answer] = True
    n = jnp.full((1, 1), len(answer))
    nothing = np.zeros((1, 1, 0), np.int32)
    found = scores(own, logits, n, len(one.ids) + n, lambda: seen, nothing)
    x = np.asarray(found[0, 0])
    return float(abs(x[mine] - x[theirs]) / abs(x[np.isfinite(x)]).max())


if __name__ == "__main__":
    app.run(main)
