"""The training loop that all three stages share."""

import contextlib
import dataclasses
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from etils import epath
from jax.experimental import multihost_utils
from tqdm import tqdm

from twig_jax.checkpoints.manager import CheckpointManager
from twig_jax.checkpoints.storage import locked
from twig_jax.checkpoints.twig import fingerprint
from twig_jax.hardware import Chip, chip
from twig_jax.models.llava import Params
from twig_jax.runtime import memory_used
from twig_jax.sharding.mesh import make_mesh
from twig_jax.sharding.placement import distribute
from twig_jax.training.config import TrainConfig
from twig_jax.training.data import Batches, State, on_mesh, open_batches, row_shard
from twig_jax.training.distill import distill_loss
from twig_jax.training.flops import step_flops
from twig_jax.training.log import Log
from twig_jax.training.losses import Loss, base_loss, twig_agreement, twig_loss, vision_loss
from twig_jax.training.optim import optimizer, schedule
from twig_jax.training.preemption import Preempted, preemption
from twig_jax.training.reinforce import Reinforcement, budget_at
from twig_jax.training.step import TrainState, init_state, make_step, of_a_part
from twig_jax.training.targets import Targets
from twig_jax.training.validation import validation_loss

Callback = Callable[[int, Params], dict[str, float]]

# Steps in a row that may be skipped before a run is given up.
_PATIENCE = 10

# What a checkpoint's run and the one that goes on from it must have in common.
_SHAPE = ("stage", "preset", "layers", "K", "T", "K_f", "p_head")
_SIZES = ("layers", "K", "T", "K_f")  # of which None is the preset's

_LOG = logging.getLogger(__name__)


def stage_loss(config: TrainConfig, budget: float | None = None) -> Loss:
    """The loss of the run's stage; ValueError names the stages there are.

    budget: R̄ of the step, where a P-Head is reinforced; None for the largest.
    """
    base, twig = config.model()
    match config.stage:
        case "vision":
            return vision_loss(base)
        case "base":
            return base_loss(base, config.head_chunk, config.content_weight, config.naming_weight)
        case "twig" if config.reinforce.actions:
            return _reinforcement(config, budget).loss
        case "twig":
            if config.distill.prediction or config.distill.attention:
                if not (config.whole_base or config.distill.targets):
                    raise ValueError(
                        "distillation needs the whole base, or what it teaches: set "
                        "whole_base=True, or distill.targets"
                    )
                return distill_loss(base, twig, config.distill, config.head_chunk, config.remat)
            return twig_loss(base, twig, config.head_chunk, config.remat)
    raise ValueError(f"no training stage {config.stage!r}; there are: vision, base, twig")


def _reinforcement(config: TrainConfig, budget: float | None = None) -> Reinforcement:
    """The losses at a budget, None for the largest."""
    part = config.reinforce
    if not config.whole_base or not part.budgets:
        raise ValueError("reinforcing needs whole_base=True, and average budgets")
    average = max(part.budgets) if budget is None else budget
    return Reinforcement(*config.model(), part, average, config.head_chunk)


def _held_out_loss(config: TrainConfig) -> Loss:
    """The loss that says how good a run's model is, on batches without randomness."""
    if config.reinforce.actions:
        return _reinforcement(config, min(config.reinforce.budgets)).best
    if config.distill.targets:
        return twig_loss(*config.model(), config.head_chunk)  # what is held out has no targets
    return stage_loss(config)


def fit(
    config: TrainConfig,
    params: Params,
    frozen: Params,
    *,
    callback: Callback | None = None,
    progress: bool = True,
) -> Params:
    """Trains `params` for `config.steps` steps, going on from a checkpoint in `config.out`.

    `frozen` are parameters the loss reads but never changes (the base, when the twig trains).
    `callback(step, params)` runs before every checkpoint; its figures are logged with the others
    (see `Log`). The loss on what is held out, `validation/loss`, decides which checkpoint is the
    best. On several hosts all call this with the same arguments. `params` are copied, and theirs
    stay in memory only where the caller holds them. Returns the trained parameters: the last, the
    best or the averaged ones, as configured.

    Raises ValueError for settings that do not fit together, and for checkpoints of another model
    or base; FileExistsError while another process trains into the folder; FloatingPointError after
    ten steps in a row whose loss is not finite, where the last good checkpoint stays; Preempted,
    saved, when told to stop; and what the data raise.
    """
    stage_loss(config)  # raises for settings that do not fit together
    out = epath.Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    base, twig = config.model()
    mesh = make_mesh(*config.mesh)
    accumulate = config.accumulate(mesh.shape)
    flops = step_flops(config) / mesh.size
    shard = row_shard(mesh, config.data.batch_size)
    tx = optimizer(config.optim, config.steps, config.trains_only)
    learning_rate = schedule(config.optim, config.steps)
    measured = config.stage == "twig" and config.whole_base
    agreement = None
    if measured:
        agreement = of_a_part(twig_agreement(base, twig, config.head_chunk), accumulate)
    with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
        told_to_stop = stack.enter_context(preemption())  # until the last checkpoint is whole
        params, frozen = distribute(params, mesh), distribute(frozen, mesh)
        grown_on = fingerprint(base, frozen, twig.K) if config.stage == "twig" else None
        state = jax.jit(init_state, static_argnums=(1, 2))(params, tx, config.ema is not None)
        if config.reinforce.actions:
            frozen = {**frozen, "p_head": params["p_head"]}
        del params  # the state has its own copy

        programs: dict[float | None, Any] = {}  # a step for each budget
        loss = jax.jit(_held_out_loss(config))
        held_out = validation_loss(config, loss, mesh) if config.holds_out else None
        targets = None
        if config.distill.targets and grown_on:
            targets = Targets(config, base, grown_on, shard)
        if "://" not in config.out and not jax.process_index():
            stack.enter_context(locked(Path(config.out) / ".lock"))
        manager = CheckpointManager(out / "checkpoints", config.keep)
        stack.callback(manager.close)
        batches = open_batches(config, base, shard)
        stack.callback(batches.close)
        start = manager.latest() or 0
        _check_shared(out, start)
        if start > config.steps:
            raise ValueError(
                f"{out} has been trained for {start} steps, not {config.steps}: name another out, "
                "or ask for as many"
            )
        if start:
            notes = manager.notes(start)
            _check_notes(notes, config, grown_on)
            state = _restored(manager, state, start)
            _go_on(batches, notes["data"], shard)
            # Several hosts agree on the step after the last that any has asked about, so that a
            # notice from before a run goes on would be for one that is never reached.
            if any(told_to_stop(n) for n in range(1, start + 1)) and start < config.steps:
                raise Preempted(f"told to stop, saved at step {start} of {config.steps} in {out}")
            if start == config.steps:
                _LOG.warning("%s is complete, at step %s: nothing is trained", out, start)
        log = stack.enter_context(Log(out, start))
        show = progress and not jax.process_index()
        bar = stack.enter_context(
            tqdm(total=config.steps, initial=start, disable=not show or None, unit="step")
        )
        clock = _Clock()
        pending: list[dict[str, Any]] = []
        bad = 0
        for n in range(start + 1, config.steps + 1):
            with clock.waiting():
                local = next(batches)
                if targets is not None:
                    local = targets.beside(local, n)
            if len(pending) > 1:
                # The device has one step to do while the next is prepared; more would each hold a
                # batch, and a notice to stop would wait for all of them.
                jax.block_until_ready(pending[-2])
            budget = None
            if config.reinforce.actions:
                budget = budget_at(config.reinforce, config.seed, n, config.steps)
                local = {**local, "draws": _draws(config, n, shard)}
            batch = on_mesh(local, mesh)
            compiles = budget not in programs
            if compiles:
                programs[budget] = make_step(stage_loss(config, budget), tx, accumulate, config.ema)
            state, metrics = programs[budget](state, frozen, batch)
            pending.append(metrics)
            clock.steps += 1
            if compiles:
                jax.block_until_ready(metrics)
                clock = _Clock()  # without the compiler's time
            bar.update()
            last = n == config.steps
            stop = told_to_stop(n) and not last
            save = n % config.save_every == 0 or last
            if n % config.log_every == 0 or last or stop:
                fetched = jax.device_get(pending)
                for m in fetched:
                    bad = bad + 1 if m["skipped"] else 0
                    if bad >= _PATIENCE:
                        saved = manager.latest()
                        raise FloatingPointError(
                            f"ten steps in a row up to step {n} had a loss that is not finite: "
                            "lower the learning rate and start again"
                            + (f" from step {saved}, saved in {out}" if saved else "")
                        )
                # Steps that were skipped are none to the schedule.
                done = int(optax.tree.get_all_with_path(state.opt_state, "count")[0][1])
                line = {"lr": float(learning_rate(max(done - 1, 0))), **summarise(fetched)}
                if budget is not None:
                    line["budget"] = budget
                tokens = (1 - line["padding"]) * batch["segments"].size
                line |= clock.read(tokens, flops, chip(jax.devices()[0].device_kind))
                line |= batches.counters
                if agreement is not None:
                    same = jax.device_get(agreement(state.params, frozen, batch))
                    line |= summarise([{"agreement": same}])
                line["memory_gib"] = memory_used() / 2**30
                log.write(n, line)
                bar.set_postfix_str(_brief(line))
                if show and bar.disable:  # not a terminal but a log
                    print(f"step {n} of {config.steps}: {_brief(line)}", file=sys.stderr)
                pending, clock = [], _Clock()
            if save or stop:
                jax.block_until_ready(metrics)
                with clock.stopped():
                    figures = {}
                    if save and held_out is not None:
                        figures["validation/loss"] = held_out(state.result, frozen)
                    if save and callback is not None:
                        figures |= callback(n, state.result)
                    notes = {
                        "config": dataclasses.asdict(config),
                        "base": grown_on,
                        "data": _positions(batches, shard),
                    }
                    manager.save(n, state, notes, figures.get("validation/loss"))
                    if figures:
                        log.write(n, figures)
            if stop:
                manager.wait()
                raise Preempted(f"told to stop, saved at step {n} of {config.steps} in {out}")
        if config.best and (best := manager.best()) not in (None, config.steps):
            _LOG.warning("the best checkpoint is that of step %s", best)
            state = _restored(manager, state, best)
    return state.result


def _check_shared(out: epath.Path, start: int) -> None:
    """Raises ValueError, on all hosts, unless they share a run's folder and see its last step."""
    if jax.process_count() == 1:
        return
    mark = out / ".shared"
    if not jax.process_index():
        mark.write_text("")
    multihost_utils.sync_global_devices("shared folder")
    for _ in range(_PATIENCE):  # a network disk may take seconds
        if there := mark.exists():
            break
        time.sleep(1)
    seen, steps = multihost_utils.process_allgather(np.array([there, start])).T
    if not jax.process_index():
        mark.unlink()
    if not seen.all():
        raise ValueError(
            f"hosts do not share {out}, where they save together: name a folder of all"
        )
    if len(set(steps.tolist())) > 1:
        raise ValueError(
            f"hosts see checkpoints up to steps {sorted(set(steps.tolist()))} in {out}: wait until "
            "all see the same files, then start again"
        )


def _draws(config: TrainConfig, step: int, shard: tuple[int, int]) -> np.ndarray:
    """Another number for each row of a run, uint32 [rows of this shard]."""
    everyone = np.random.SeedSequence([config.seed, step]).generate_state(config.data.batch_size)
    return np.split(everyone, shard[1])[shard[0]]


def summarise(metrics: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the steps that were taken, or over all if none was, and the share of `skipped`.

    (sum, count) pairs become shares. What is no number, as nothing counted, is left out.
    """
    taken = [m for m in metrics if not m.get("skipped")] or metrics
    line = {}
    for name in metrics[0]:
        steps = metrics if name == "skipped" else taken
        values = np.stack([m[name] for m in steps]).astype(np.float64)
        if values.ndim == 2:
            total, count = values.sum(0)
            value = total / count if count else np.nan
        else:
            value = values.mean()
        if np.isfinite(value):
            line[name] = float(value)
    return line


def _brief(line: dict[str, float]) -> str:
    """The figures that a line has room for."""
    names = ("loss", "accuracy", "agreement", "reward", "tokens_per_s")
    return ", ".join(f"{name} {line[name]:.4g}" for name in names if name in line)


class _Clock:
    """Times steps, and how long of it they waited for their input."""

    def __init__(self) -> None:
        self.steps = 0
        self._waited, self._began = 0.0, time.monotonic()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._began += time.monotonic() - began

    def read(self, tokens: float, flops: float, chip: Chip | None) -> dict[str, float]:
        """Figures of a step with so many tokens, and FLOPs a device.

        Seconds it takes and those it waits for its input, tokens a second, model TFLOP/s of a
        device and, of a known one, their share in what it can do (MFU).
        """
        if not self.steps:
            return {}
        step_time = (time.monotonic() - self._began) / self.steps
        figures = {
            "step_time": step_time,
            "input_wait": self._waited / self.steps,
            "tokens_per_s": tokens / step_time,
            "tflops": flops / step_time / 1e12,
        }
        if chip is not None:
            figures["mfu"] = flops / step_time / chip.flops
        return figures


def _restored(manager: CheckpointManager, state: TrainState, step: int) -> TrainState:
    """The state saved at `step`, in the place of `state`, whose arrays are gone after it."""
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    for x in jax.tree.leaves(state):
        x.delete()  # what a step fits into may have no room for two
    return manager.restore(like, step)


def _check_notes(notes: dict[str, Any], config: TrainConfig, grown_on: str | None) -> None:
    """Refuses checkpoints that are not this run's, and tells of settings that have changed."""
    was, now = notes["config"], json.loads(json.dumps(dataclasses.asdict(config)))
    before = dataclasses.replace(config, **{name: was.get(name) for name in _SIZES})
    sized_alike = before.model() == config.model()
    other = [
        f"{name} {was.get(name)}, now {now[name]}"
        for name in _SHAPE
        if was.get(name, False) != now[name] and not (sized_alike and name in _SIZES)
    ]
    # An average is kept with the one, moments of the P-Head alone with the other.
    actions = was.get("reinforce", {}).get("actions", 0), now["reinforce"]["actions"]
    for name, (a, b) in {"ema": (was.get("ema"), now["ema"]), "reinforce.actions": actions}.items():
        if bool(a) != bool(b):
            other.append(f"{name} {a}, now {b}")
    if other:
        raise ValueError(
            f"the checkpoints in {config.out} are of another model: {'; '.join(other)}; give the "
            "run another folder (out)"
        )
    if notes["base"] != grown_on:
        raise ValueError(
            f"the checkpoints in {config.out} are of a twig on another base than {config.base}; "
            "give the run another folder (out), or its own base"
        )
    if (was["data"]["source"] is None) != (config.data.source is None):
        raise ValueError(
            f"the checkpoints in {config.out} have read other data, of which none can go on: "
            f"data.source was {was['data']['source']}; give the run another folder (out)"
        )
    changed = [f"{k}={now[k]} (was {was.get(k)})" for k in now if was.get(k) != now[k]]
    if changed:
        _LOG.warning("goes on with other settings than before: %s", ", ".join(changed))


def _positions(batches: Batches, shard: tuple[int, int]) -> list[State]:
    """The positions of all shards, on every host."""
    mine = json.dumps([shard[0], batches.get_state()]).encode()
    length = int(np.max(multihost_utils.process_allgather(np.array(len(mine)))))
    padded = np.frombuffer(mine.ljust(length), np.uint8)
    texts = multihost_utils.process_allgather(padded).reshape(-1, length)
    states = dict(json.loads(text.tobytes()) for text in texts)
    return [states[index] for index in range(shard[1])]


def _go_on(batches: Batches, states: list[State], shard: tuple[int, int]) -> None:
    """Goes on behind the positions of all shards there were."""
    if len(states) != shard[1]:
        states = batches.reshard(states, shard[1])
    batches.set_state(states[shard[0]])
