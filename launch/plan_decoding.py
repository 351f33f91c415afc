"""What decoding takes on machines that need not be there: memory, traffic, collectives, time.

    python -m launch.plan_decoding --topology v5e:2x4
    python -m launch.plan_decoding --topology h100:1,h200:1 --batch 1,8,32,128

Prefill and the decoding loop are compiled ahead of time, which needs the devices' compiler alone
(pip install -e '.[tpu]' or '.[cuda]'); for GPUs without theirs all is from shapes. Weights are
never there. Nothing is timed: milliseconds are predictions from the data sheets' peaks, see
docs/performance.md.
"""

import itertools
import sys
from typing import Any

from absl import app, flags

from launch import run, whole
from launch.output import aligned, write_json
from twig_jax.config import DTYPES, INT8

_PRESET = flags.DEFINE_string("preset", "llava-1.5-7b", "whose shapes")
_TOPOLOGY = flags.DEFINE_list(
    "topology", None, "TPU slices, v5e:2x4, or GPUs, h100:8", required=True
)
_TENSOR = flags.DEFINE_integer("tensor", 0, "devices that split heads; 0 for all", lower_bound=0)
_MODES = flags.DEFINE_list("modes", ["plain", "ttp_ssd"], "modes to plan")
_AVG_RETAINED = flags.DEFINE_float("avg_retained", None, "R̄ per image; default 1/9 of M")
_BATCH = flags.DEFINE_list("batch", ["8"], "rows, one or several sizes")
_TEXT = flags.DEFINE_integer("text_tokens", 64, "text tokens of a prompt", lower_bound=1)
_NEW = flags.DEFINE_integer("max_new_tokens", 128, "tokens of each answer", lower_bound=1)
_GAMMA = flags.DEFINE_integer("gamma", 5, "tokens ahead that are drafted", lower_bound=1)
_CHILDREN = flags.DEFINE_integer("children", 1, "drafts tried after each; 1 is a chain")
_EXPANDED = flags.DEFINE_integer("expanded", 1, "drafts of a level that have children")
_NODES = flags.DEFINE_integer("nodes", 0, "most drafts an iteration; 0 for all of the tree")
_TOKAR = flags.DEFINE_float(
    "tokar", 0.574, "share of levels that have an accepted draft; TwigVLM publishes 57.4 %", 0, 1
)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", DTYPES, "of weights and computation")
_INT8 = flags.DEFINE_enum("int8", None, INT8, "what is in int8, as in launch.generate")
_JSON = flags.DEFINE_string("json", None, "write all figures here; - is standard output")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    try:
        plans = planned(whole("batch", _BATCH.value))
        if _JSON.value != "-":
            report(plans)
        write_json(_JSON.value, [plan.as_json() for plan in plans])
    except (OSError, ValueError) as error:
        sys.exit(f"plan_decoding: {error}")


def planned(batches: list[int]) -> list[Any]:
    """The plan of every topology, batch and mode."""
    from twig_jax.decoding.buckets import Bucket
    from twig_jax.decoding.plan import plan
    from twig_jax.decoding.settings import Settings
    from twig_jax.evaluation.speed import check_room
    from twig_jax.presets import preset

    config, twig = preset(_PRESET.value)
    M, retained = config.vision.num_tokens, _AVG_RETAINED.value
    retained = M / 9 if retained is None else retained
    check_room(config, _TEXT.value + M, _NEW.value)
    plans = []
    for topology, rows, mode in itertools.product(_TOPOLOGY.value, batches, _MODES.value):
        settings = Settings(
            mode=mode,
            avg_retained=retained,
            gamma=_GAMMA.value,
            children=_CHILDREN.value,
            expanded=_EXPANDED.value,
            nodes=_NODES.value,
        )
        settings.check()
        plans.append(
            plan(
                config,
                twig,
                settings,
                Bucket(rows, _TEXT.value, 1, _NEW.value),
                topology,
                tensor=_TENSOR.value,
                dtype=_DTYPE.value,
                int8=_INT8.value,
                tokar=_TOKAR.value,
            )
        )
    return plans


def report(plans: list[Any]) -> None:
    """The plans as two tables, of iterations and of prompts."""
    from twig_jax.decoding.plan import HOP, LAUNCH

    parts = ["floor MB", "moved MB", "GFLOP", "collectives", "MB", "kernels"]
    parts += ["memory ms", "math ms", "link ms", "starts ms"]
    plain = {(p.topology, p.rows): p for p in plans if p.mode == "plain"}
    iterations, prompts = [], []
    for plan in plans:
        which = [plan.topology, f"{plan.rows}", plan.mode]
        usual = plain.get((plan.topology, plan.rows))
        iterations.append(
            [
                *which,
                "compiler" if plan.compiled else "shapes",
                f"{plan.total / 2**30:.2f}",
                "yes" if plan.total <= plan.capacity else "NO",
                *_cells(plan.iteration),
                "" if plan.copies is None else f"{plan.copies:.0f}",
                f"{1e3 * plan.iteration.total:.2f}",
                f"{1e3 * plan.token:.2f}",
                "" if usual is None else f"{usual.token / plan.token:.2f}",
            ]
        )
        prompts.append(
            [
                *which,
                *_cells(plan.prompt),
                f"{1e3 * plan.prompt.total:.2f}",
                "" if usual is None else f"{usual.prompt.total / plan.prompt.total:.2f}",
            ]
        )
    first, last = ["topology", "rows", "mode"], ["over plain"]
    held = ["from", "GiB a device", "fits"]
    times = ["copies", "iteration ms", "token ms"]
    print(aligned([*first, *held, *parts, *times, *last], iterations))
    print("\nPrompts, without their images, with first drafts:")
    print(aligned([*first, *parts, "prompt ms", *last], prompts))
    print(
        f"Of one device, and of one iteration, in which ssd drafts {_GAMMA.value} tokens ahead and "
        f"{_TOKAR.value:.1%} of\nthem are taken to be accepted. Times are PREDICTED, not "
        "measured: bytes and FLOPs at the\npeaks of data sheets, collectives over a ring at "
        f"{1e6 * HOP:g} µs a hop, {1e6 * LAUNCH:g} µs for the start\nand end of each kernel of a "
        "GPU."
    )


def _cells(taken: Any) -> list[str]:
    """A prompt's or an iteration's."""
    return [
        f"{taken.floor / 1e6:.0f}",
        "" if taken.moved is None else f"{taken.moved / 1e6:.0f}",
        f"{taken.flops / 1e9:.1f}",
        f"{sum(one.count for one in taken.collectives.values()):.0f}",
        f"{sum(one.bytes for one in taken.collectives.values()) / 1e6:.1f}",
        "" if taken.kernels is None else f"{taken.kernels:.0f}",
        *(f"{1e3 * part:.2f}" for part in taken.seconds.values()),
    ]


if __name__ == "__main__":
    run(main)
