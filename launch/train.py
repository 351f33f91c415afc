"""Trains one stage: the vision tower's warm-up, a base, or a twig on a frozen base.

    python -m launch.train --config configs/digits_twig.py --set optim.lr=5e-4 --set steps=300
    python -m launch.train --config configs/llava15_7b_twig.py --plan --topology v5e:2x4

The second prints what a step takes on machines that need not be there, and trains nothing.

Status: 0 done, 1 failed, 75 told to stop by SIGTERM: started again, the run goes on.
"""

import dataclasses
import os
import sys
import traceback
from typing import Any

from absl import app, flags

from launch import run, stop_at_sigterm
from launch.output import write_json
from launch.training import read_config, train

_CONFIG = flags.DEFINE_string("config", None, "file with get_config(), see configs/")
_SET = flags.DEFINE_multi_string("set", [], "override, as in optim.lr=2e-4; repeatable")
_EXPORT = flags.DEFINE_string(
    "export", None, "write the trained model to this folder, or gs://..., at the end"
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "one of several processes; the cluster says how many (TPU, Slurm, GKE)"
)

_WRITE = flags.DEFINE_string(
    "write_targets", None, "train nothing: write what the base teaches to this folder"
)
_PLAN = flags.DEFINE_bool("plan", False, "print what a step takes on --topology, and end")
_TOPOLOGY = flags.DEFINE_string("topology", None, "a TPU slice, v5e:2x4, or GPUs, h100:8")
_JSON = flags.DEFINE_string("json", None, "write the plan's figures here; - is standard output")


def main(argv: list[str]) -> None:
    if len(argv) > 1 or not _CONFIG.value:
        raise app.UsageError("give --config FILE and overrides as --set name=value, nothing else")
    if _PLAN.value != (_TOPOLOGY.value is not None):
        raise app.UsageError("--plan and --topology go together")
    stop_at_sigterm()
    import jax

    from twig_jax.runtime import use_compilation_cache
    from twig_jax.training.overrides import override
    from twig_jax.training.preemption import Preempted

    if _DISTRIBUTED.value:
        jax.distributed.initialize()
        if jax.process_count() == 1 or _WRITE.value:
            stop_at_sigterm()  # jax listens from here on, for several processes that train
    use_compilation_cache()
    try:
        config = override(read_config(_CONFIG.value), _SET.value)
        if _TOPOLOGY.value:
            show_plan(config, _TOPOLOGY.value)
        elif _WRITE.value:
            write_targets(config, _WRITE.value)
        else:
            train(config, export=_EXPORT.value)
    except Preempted as notice:
        print(f"train: {notice}", file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL)
    except Exception as error:
        told = isinstance(error, FloatingPointError | ImportError | OSError | ValueError)
        if jax.process_count() > 1:
            # The others wait for this one in a computation: leaving in order would wait for them,
            # until all are aborted, and the status would say nothing of an error.
            said = f"train: {error}" if told else traceback.format_exc()
            print(said, file=sys.stderr, flush=True)
            os._exit(1)
        if told:
            sys.exit(f"train: {error}")
        raise


def show_plan(config: Any, topology: str) -> None:
    """Prints what a step takes; the base has the preset's shapes, its weights need not be there."""
    from twig_jax.training.plan import plan

    found = plan(dataclasses.replace(config, base=None), topology)
    print(found, file=sys.stderr if _JSON.value == "-" else sys.stdout)
    write_json(_JSON.value, found.as_json())


def write_targets(config: Any, folder: str) -> None:
    """Writes what the base teaches about every batch of the run."""
    import jax
    from tqdm import tqdm

    from twig_jax.sharding.mesh import make_mesh
    from twig_jax.training import targets
    from twig_jax.training.start import start_base

    base = start_base(config, make_mesh(*config.mesh))
    with tqdm(total=config.steps, unit="step", disable=jax.process_index() > 0 or None) as bar:
        targets.write_targets(config, base, folder, told=lambda step: bar.update())
    if not jax.process_index():
        print(f"targets of {config.steps} steps in {folder}")


if __name__ == "__main__":
    run(main)
