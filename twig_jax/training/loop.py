"""The training loop that all three stages share."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from twig_jax.checkpoints.manager import CheckpointManager
from twig_jax.data.digits import ASSETS
from twig_jax.data.pipeline import DigitsBatches, prefetch
from twig_jax.data.tokens import load_tokenizer
from twig_jax.models.llava import Params
from twig_jax.sharding.mesh import make_mesh
from twig_jax.sharding.rules import shardings
from twig_jax.training.config import TrainConfig
from twig_jax.training.losses import Loss, base_loss, twig_loss, vision_loss
from twig_jax.training.optim import optimizer, schedule
from twig_jax.training.preemption import Preempted, preemption
from twig_jax.training.step import batch_sharding, init_state, make_step

Callback = Callable[[int, Params], dict[str, float]]


def stage_loss(config: TrainConfig) -> Loss:
    """The loss of the run's stage; ValueError names the stages there are."""
    base, twig = config.model()
    match config.stage:
        case "vision":
            return vision_loss(base)
        case "base":
            return base_loss(base, config.head_chunk, config.content_weight, config.naming_weight)
        case "twig":
            return twig_loss(base, twig, config.head_chunk, config.remat)
    raise ValueError(f"no training stage {config.stage!r}; there are: vision, base, twig")


def fit(
    config: TrainConfig,
    params: Params,
    frozen: Params,
    *,
    callback: Callback | None = None,
    progress: bool = True,
) -> Params:
    """Trains `params` for `config.steps` steps, resuming from a checkpoint in `config.out`.

    `frozen` are parameters the loss reads but never changes (the base, when the twig trains).
    `callback(step, params)` runs at every checkpoint; its figures are logged with the others, one
    JSON line at a time, in `out/metrics.jsonl`. Returns the trained parameters. Raises
    FloatingPointError after ten steps in a row whose loss is not finite; the last good checkpoint
    stays. On SIGTERM it saves and raises Preempted.
    """
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    base, _ = config.model()
    mesh = make_mesh(*config.mesh)
    tx = optimizer(config.optim, config.steps)
    learning_rate = schedule(config.optim, config.steps)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, shardings(params, mesh))
        frozen = jax.device_put(frozen, shardings(frozen, mesh))
        state = jax.jit(init_state, static_argnums=1)(params, tx)
        step = make_step(stage_loss(config), tx, config.accumulate)
        manager = CheckpointManager(out / "checkpoints")
        start = manager.latest() or 0
        if start:
            like = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
            )
            state = manager.restore(like)
        data = DigitsBatches(
            load_tokenizer(ASSETS),
            seed=config.seed,
            batch_size=config.data.batch_size,
            row_tokens=config.data.row_tokens,
            image_token_id=base.image_token_id,
            mean=base.vision.image_mean,
            std=base.vision.image_std,
            mix=None if config.data.mix is None else dict(config.data.mix),
            start=start,
        )
        batches = prefetch(data)
        rows = batch_sharding(mesh)
        pending: list[dict[str, Any]] = []
        bad = 0
        began = time.monotonic()
        with (
            preemption() as told_to_stop,
            tqdm(total=config.steps, initial=start, disable=not progress, unit="step") as bar,
            (out / "metrics.jsonl").open("a") as log,
        ):
            for n in range(start + 1, config.steps + 1):
                state, metrics = step(state, frozen, jax.device_put(next(batches), rows))
                pending.append(metrics)
                bar.update()
                last = n == config.steps
                stop = told_to_stop(n) and not last
                save = n % config.save_every == 0 or last
                if n % config.log_every == 0 or last or stop:
                    fetched = jax.device_get(pending)
                    for m in fetched:
                        bad = bad + 1 if m["skipped"] else 0
                        if bad >= 10:
                            raise FloatingPointError(
                                f"ten steps in a row up to step {n} had a loss that is not finite; "
                                f"the checkpoint of step {manager.latest()} in {out} is good: "
                                "lower the learning rate and start again from it"
                            )
                    line = {"step": n, "lr": float(learning_rate(n)), **summarise(fetched)}
                    line["step_time"] = (time.monotonic() - began) / len(pending)
                    pending, began = [], time.monotonic()
                    bar.set_postfix_str(f"loss {line['loss']:.3f}")
                    print(json.dumps(line), file=log, flush=True)
                if save or stop:
                    manager.save(n, state, {"config": dataclasses.asdict(config)})
                if save and callback is not None:
                    line = {"step": n, **callback(n, state.params)}
                    print(json.dumps(line), file=log, flush=True)
                if stop:
                    manager.close()
                    raise Preempted(f"told to stop, saved at step {n} of {config.steps} in {out}")
        manager.close()
    return state.params


def summarise(metrics: list[dict[str, Any]]) -> dict[str, float]:
    """Means over steps; (sum, count) pairs become shares, left out where nothing counted."""
    line = {}
    for name in metrics[0]:
        values = np.stack([m[name] for m in metrics]).astype(np.float64)
        if values.ndim == 2:
            total, count = values.sum(0)
            if count:
                line[name] = float(total / count)
        else:
            line[name] = float(values.mean())
    return {name: round(value, 5) for name, value in line.items()}
