"""How much faster a twig trains than in the straightforward way, and what caching would save.

    python -m tests.tools.training --repeats 21

Three ways to make the same step of configs/digits_twig.py, in changing order:

packed     as launch.train does: all questions about a page share a row, and so its visual tokens
alone      each question in a row of its own with its page, padded to the longest, logits at once
from trunk packed, without vision tower and trunk: what is left where their outputs are cached
           (the loss is another one)
"""

import dataclasses
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from configs import digits_twig, llava15_7b_twig
from twig_jax.data.digits import ASSETS
from twig_jax.data.packing import SHARED
from twig_jax.runtime import environment
from twig_jax.sharding.mesh import make_mesh
from twig_jax.training.data import open_batches
from twig_jax.training.flops import step_flops
from twig_jax.training.losses import twig_loss
from twig_jax.training.optim import optimizer
from twig_jax.training.start import start_base, start_twig
from twig_jax.training.step import init_state, make_step

_REPEATS = flags.DEFINE_integer("repeats", 5, "timings of each", lower_bound=1)


def alone(batch, pad_id):
    """The same turns, each in a row of its own behind its page's prefix, padded to the longest."""
    rows = []
    for row, segments in enumerate(batch["segments"]):
        for segment in range(1, segments.max() + 1):
            places = np.flatnonzero((segments == SHARED) | (segments == segment))
            rows.append((row, places))
    longest = max(len(places) for _, places in rows)
    size = (len(rows), longest)
    out = {
        "pixels": batch["pixels"][[row for row, _ in rows]],
        "tokens": np.full(size, pad_id, np.int32),
        "is_visual": np.zeros(size, bool),
        "positions": np.zeros(size, np.int32),
        "segments": np.zeros(size, np.int32),
        "targets": np.full(size, -1, np.int32),
    }
    for i, (row, places) in enumerate(rows):
        for name in ("tokens", "is_visual", "positions", "targets"):
            out[name][i, : len(places)] = batch[name][row, places]
        out["segments"][i, : len(places)] = 1
    return out


def main(_):
    repeats = _REPEATS.value

    config = dataclasses.replace(digits_twig.get_config(), base=str(ASSETS / "base"))
    base_config, twig_config = config.model()
    mesh = make_mesh()
    base = start_base(config, mesh)
    twig = start_twig(config, base, mesh)
    tx = optimizer(config.optim, config.steps)
    batches = open_batches(config, base_config)
    packed = next(batches)
    batches.close()
    single = alone(packed, base_config.pad_token_id)

    # A twig on the embeddings themselves, of rows without images, computes what is left.
    rest = dataclasses.replace(twig_config, K=0)
    without = {**packed, "pixels": packed["pixels"][:, :0]}
    without["is_visual"] = np.zeros_like(packed["is_visual"])
    whole = 1 << 20  # more than a row has: logits of all tokens at once
    ways = {
        "packed": (twig_loss(base_config, twig_config, config.head_chunk), packed),
        "alone": (twig_loss(base_config, twig_config, whole), single),
        "from trunk": (twig_loss(base_config, rest, config.head_chunk), without),
    }
    steps, times = {}, {name: [] for name in ways}
    for name, (loss, batch) in ways.items():
        step = make_step(loss, tx)
        batch = jax.tree.map(jnp.asarray, batch)
        state = init_state(jax.tree.map(jnp.copy, twig), tx)
        compiled = step.lower(state, base, batch).compile()
        state, metrics = compiled(state, base, batch)
        steps[name] = [compiled, state, batch]
        rows, tokens = batch["tokens"].shape
        memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
        print(
            f"{name:11} {rows:4} rows of {tokens} tokens, {memory:6.0f} MiB of working memory, "
            f"loss {float(metrics['loss']):.6f}, {float(metrics['weight']):.0f} targets"
        )
    rng = np.random.default_rng(0)
    for _ in range(repeats):
        # What comes behind large buffers finds its memory cold; so each does, now and then.
        for name in rng.permutation(list(steps)):
            compiled, state, batch = steps[name]
            began = time.perf_counter()
            state, metrics = compiled(state, base, batch)
            jax.block_until_ready(metrics)
            times[name].append(time.perf_counter() - began)
            steps[name][1] = state
    medians = {name: float(np.median(taken)) for name, taken in times.items()}
    for name, taken in times.items():
        print(f"{name:11} {medians[name]:.3f} s a step ({min(taken):.3f} to {max(taken):.3f})")
    print(f"packed is {medians['alone'] / medians['packed']:.2f} times as fast as alone")
    saved = 1 - medians["from trunk"] / medians["packed"]
    print(f"the trunk's and the vision tower's outputs, cached, would save {saved:.0%} of a step")

    large = dataclasses.replace(llava15_7b_twig.get_config(), base=None)
    shapes, grown = large.model()
    trained = dataclasses.replace(large, K=0, data=dataclasses.replace(large.data, row_images=0))
    share = 1 - step_flops(trained) / step_flops(large)
    size = large.data.row_tokens * shapes.text.hidden_size * 2
    print(
        f"for LLaVA-1.5-7B and K={grown.K} they are {share:.0%} of the FLOPs and, in bfloat16, "
        f"{size / 2**20:.0f} MiB a row, {size * large.data.batch_size * large.steps / 1e12:.1f} TB "
        "an epoch"
    )
    print(f"{environment()}, {Path(__file__).name}, {repeats} repeats")


if __name__ == "__main__":
    app.run(main)
