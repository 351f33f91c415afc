"""Trains one stage: the vision tower's warm-up, a base, or a twig on a frozen base.

    python -m launch.train --config configs/digits_twig.py --set optim.lr=5e-4 --set steps=300
    python -m launch.train --config configs/llava15_7b_twig.py --plan --topology v5e:2x4

The second prints what a step takes on machines that need not be there, and trains nothing.

Status: 0 done, 1 failed, 75 told to stop by SIGTERM and saved: started again, the run goes on.
"""

import dataclasses
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from launch import run
from launch.output import write_json

_CONFIG = flags.DEFINE_string("config", None, "file with get_config(), see configs/")
_SET = flags.DEFINE_multi_string("set", [], "override, as in optim.lr=2e-4; repeatable")
_EXPORT = flags.DEFINE_string("export", None, "write the trained model to this folder at the end")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "one of several processes; the cluster says how many (TPU, Slurm, GKE)"
)

_PLAN = flags.DEFINE_bool("plan", False, "print what a step takes on --topology, and end")
_TOPOLOGY = flags.DEFINE_string("topology", None, "a TPU slice, v5e:2x4, or GPUs, h100:8")
_PLAN_JSON = flags.DEFINE_string("plan_json", None, "write the plan's figures to this file")


def main(argv: list[str]) -> None:
    if len(argv) > 1 or not _CONFIG.value:
        raise app.UsageError("give --config FILE and overrides as --set name=value, nothing else")
    if _PLAN.value != (_TOPOLOGY.value is not None):
        raise app.UsageError("--plan and --topology go together")
    import jax

    from twig_jax.runtime import use_compilation_cache
    from twig_jax.training.overrides import override
    from twig_jax.training.preemption import Preempted

    if _DISTRIBUTED.value:
        jax.distributed.initialize()
    use_compilation_cache()
    try:
        config = override(read_config(_CONFIG.value), _SET.value)
        if _TOPOLOGY.value:
            show_plan(config, _TOPOLOGY.value)
        else:
            train(config, export=_EXPORT.value)
    except (FileNotFoundError, FloatingPointError, ImportError, ValueError) as error:
        sys.exit(f"train: {error}")
    except Preempted as notice:
        print(f"train: {notice}", file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL)


def read_config(path: str) -> Any:
    """The configuration that a file's get_config() returns."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no configuration file {path}")
    spec = importlib.util.spec_from_file_location("config", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def show_plan(config: Any, topology: str) -> None:
    """Prints what a step takes; the base has the preset's shapes, its weights need not be there."""
    from twig_jax.training.plan import plan

    found = plan(dataclasses.replace(config, base=None), topology)
    print(found)
    write_json(_PLAN_JSON.value, found.as_json())


def train(
    config: Any,
    *,
    export: str | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Runs a training configuration to its end, validating before every checkpoint."""
    import jax

    from twig_jax.checkpoints.llava import write_llava
    from twig_jax.checkpoints.twig import write_twig
    from twig_jax.data.digits import ASSETS
    from twig_jax.models.twig import feeding
    from twig_jax.sharding.mesh import make_mesh
    from twig_jax.sharding.placement import gather
    from twig_jax.training.loop import fit
    from twig_jax.training.start import start_base, start_twig

    base_config, twig_config = config.model()
    mesh = make_mesh(*config.mesh)
    first = not jax.process_index()
    base = start_base(config, mesh)
    answers = config.holds_out and config.whole_base and config.stage != "vision"
    callback = None
    if answers:
        callback = validation(config, base, mesh, say if first else lambda text: None)
    if config.stage == "twig":
        twig = start_twig(config, base, mesh)
        if not config.whole_base:
            base = feeding(base, twig_config.K)
        twig = gather(fit(config, twig, base, callback=callback))
        if export:
            sampled = gather(feeding(base, twig_config.K))
            if first:
                write_twig(export, twig, twig_config, sampled, base_config)
    else:
        base = gather(fit(config, base, {}, callback=callback))
        if export and first:
            write_llava(export, base, base_config, tokenizer=ASSETS)


def validation(
    config: Any, base: Any, mesh: Any, say: Callable[[str], None]
) -> Callable[[int, Any], dict[str, float]]:
    """A callback(step, params) -> `validation/...` figures of answers to held-out questions."""
    import jax

    from twig_jax.decoding.generate import Generator
    from twig_jax.evaluation.validation import Validation

    base_config, twig_config = config.model()
    tokenizer, held_out = read_held_out(config)
    measure = Validation(tokenizer, held_out)

    def validate(step: int, params: Any) -> dict[str, float]:
        if config.stage == "twig":
            twig = jax.tree.map(lambda x: x.astype(config.base_dtype), params)
            figures = measure(Generator(base_config, base, twig_config, twig, mesh=mesh))
        else:
            figures = measure(Generator(base_config, params, mesh=mesh))
        shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        say(f"step {step}: {shown}")
        return {f"validation/{name}": value for name, value in figures.items()}

    return validate


def read_held_out(config: Any) -> tuple[Any, Any]:
    """(tokenizer, held-out questions with their answers): the first ones of digits or a source."""
    from twig_jax.api import Model
    from twig_jax.data.sources import BadSample, open_source
    from twig_jax.data.tokens import conventions, load_tokenizer
    from twig_jax.decoding.generate import Generator
    from twig_jax.evaluation import tasks
    from twig_jax.evaluation.validation import HeldOut

    base_config, _ = config.model()
    tokenizer, n = load_tokenizer(config.reads_as()), config.validation_samples
    if config.data.source is None:
        samples = tasks.load_samples(tokenizer, base_config, n, split="validation")
        return tokenizer, [HeldOut(s.request, s.question.answer) for s in samples]
    reader = Model(Generator(base_config, {}), tokenizer, conventions(config.reads_as()))
    source = open_source(config.data.validation, config.data.images)
    found: list[HeldOut] = []
    for index in range(len(source)):
        if len(found) == n:
            break
        try:
            sample = source[index]
        except BadSample as error:
            logging.warning("left out of validation: %s", error)
            continue
        question, answer = sample.turns[0]
        images = sample.images[: question.count("<image>")]
        found.append(HeldOut(reader.request(question, images), answer.strip()))
    return tokenizer, found


if __name__ == "__main__":
    run(main)
