"""Reruns the paper's ablations: twigs are trained, answer a benchmark, and are timed.

    python -m launch.ablate --config configs/digits_twig.py --set steps=300 --set save_every=300 \\
        --set whole_base=False --task digits --limit 1024 --seeds 0,1,2 --out runs/ablation

    python -m launch.ablate --config configs/digits_twigpp_stage1.py --set twig_init=next \\
        --reinforced configs/digits_twigpp_stage2.py --ablations stages --limit 1024

Every variant is the configuration's twig but for one thing. Twigs that are there are not trained
again, and answers that are there are not asked again: a run that was stopped goes on.
OUT/results.json has the figures, OUT/ablations.png their picture.
"""

import contextlib
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

from absl import app, flags
from tqdm import tqdm

from launch import run
from launch.output import aligned, write_json

_CONFIG = flags.DEFINE_string("config", None, "file with get_config() of a twig, see configs/")
_SET = flags.DEFINE_multi_string("set", [], "override, as in optim.lr=2e-4; repeatable")
_REINFORCED = flags.DEFINE_string(
    "reinforced", None, "file with get_config() of what P-Heads are trained by after that"
)
_ABLATIONS = flags.DEFINE_list("ablations", [], "some of them; default all")
_SEEDS = flags.DEFINE_list("seeds", ["0"], "seeds that every twig is trained with")
_TASK = flags.DEFINE_string("task", "digits", "the benchmark, as in launch.evaluate")
_DATA = flags.DEFINE_string("data", "", "its folder")
_LIMIT = flags.DEFINE_integer("limit", None, "only the first so many questions", lower_bound=1)
_RETAINED = flags.DEFINE_float(
    "avg_retained", None, "visual tokens a layer sees; default a ninth of an image's"
)
_GAMMA = flags.DEFINE_integer("gamma", 5, "most drafts an iteration")
_THETA = flags.DEFINE_float("theta", 0.6, "drafting stops after a token less probable than this")
_TIMED = flags.DEFINE_integer(
    "timed_samples", 24, "questions for speed, one at a time; 0 measures none", lower_bound=0
)
_REPEATS = flags.DEFINE_integer("repeats", 3, "interleaved timings of each", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 32, "questions answered at once", lower_bound=1)
_OUT = flags.DEFINE_string("out", "runs/ablation", "where twigs, answers and figures go")
_JSON = flags.DEFINE_string("json", None, "write the figures here too; - is standard output")


# Settings of a training run that may be others when it goes on, for the same twig.
_CHANGE_NOTHING = "out mesh device_rows remat log_every save_every keep data.workers".split()


def main(argv: list[str]) -> None:
    if len(argv) > 1 or not _CONFIG.value:
        raise app.UsageError("give --config FILE, and flags alone")
    from twig_jax.training.preemption import Preempted

    try:
        ablate()
    except (FloatingPointError, ImportError, OSError, ValueError) as error:
        sys.exit(f"ablate: {error}")
    except Preempted as notice:
        print(f"ablate: {notice}", file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL)


def ablate() -> None:
    """Trains, answers, times, prints and writes."""
    from launch.training import read_config
    from twig_jax.evaluation.ablations import ablations, over_seeds
    from twig_jax.evaluation.plots import plot_ablations
    from twig_jax.runtime import environment, use_compilation_cache
    from twig_jax.training.overrides import override

    use_compilation_cache()
    config = override(read_config(_CONFIG.value or ""), _SET.value)
    if config.stage != "twig":
        raise ValueError(f"--config {_CONFIG.value} trains no twig, but the {config.stage} stage")
    if not all(seed.isdecimal() for seed in _SEEDS.value):
        raise ValueError(f"--seeds takes whole numbers, not {','.join(_SEEDS.value)!r}")
    base_config, twig_config = config.model()
    reinforced = None if _REINFORCED.value is None else read_config(_REINFORCED.value)
    if reinforced is not None and not reinforced.reinforce.actions:
        raise ValueError(f"--reinforced {_REINFORCED.value} reinforces nothing: it has no actions")
    budgets = () if reinforced is None else reinforced.reinforce.budgets
    known = ablations(
        twig_config, base_config.text.num_layers, config.twig_init, config.p_head, budgets
    )
    for name in _ABLATIONS.value:
        if name not in known:
            raise ValueError(f"no --ablations {name}; there are: {', '.join(known)}")
    chosen = _ABLATIONS.value or list(known)
    shapes = [name for name in ("T", "K") if name in chosen]
    if shapes and config.twig_folder is not None:
        raise ValueError(
            f"--ablations {','.join(shapes)} grows twigs of other shapes than the one in "
            f"{config.twig_init}: --set twig_init=next starts all of them from the base"
        )
    variants = [v for name in chosen for v in known[name]]
    bench = _Bench(config, reinforced)
    lines = []
    with tqdm(variants, unit="variant", disable=None) as bar:
        for variant in bar:
            bar.set_description(f"{variant.ablation}: {variant.name}")
            seeds = _SEEDS.value[:1] if variant.once else _SEEDS.value
            rows = [bench.row(variant, int(seed)) for seed in seeds]
            lines.append(over_seeds(variant, rows))
    out = Path(_OUT.value)
    content = {
        "schema": 1,
        **environment(),
        "settings": {
            "config": dataclasses.asdict(config),
            "reinforced": None if reinforced is None else dataclasses.asdict(reinforced),
            **{f.name: f.value for f in (_TASK, _LIMIT, _SEEDS, _GAMMA, _THETA, _TIMED)},
        },
        "results": lines,
    }
    write_json(str(out / "results.json"), content)
    write_json(_JSON.value, content)
    plot_ablations(out / "ablations.png", lines)
    print(_table(lines), file=sys.stderr if _JSON.value == "-" else sys.stdout)


class _Bench:
    """The benchmark, and the base that all twigs grow on."""

    def __init__(self, config: Any, reinforced: Any) -> None:
        from twig_jax import api
        from twig_jax.decoding.settings import Settings
        from twig_jax.evaluation.benchmarks import open_benchmark
        from twig_jax.evaluation.judge import Judge, Way

        self.config, self.reinforced, self.out = config, reinforced, Path(_OUT.value)
        self.model = api.load(config.base)
        benchmark = open_benchmark(_TASK.value, Path(_DATA.value), _LIMIT.value)
        self.judge = Judge(
            self.model,
            _TASK.value,
            benchmark,
            benchmark.questions()[: _LIMIT.value],
            self.out / "answers",
            Settings(
                max_new_tokens=benchmark.max_new_tokens, gamma=_GAMMA.value, theta=_THETA.value
            ),
            batch=_BATCH.value,
            model_id=Path(config.base).name,
            notes={
                "dtype": self.model.generator.weights.dtype.name,
                **{flag.name: flag.value for flag in (_GAMMA, _THETA)},
            },
            limited=_LIMIT.value is not None,
        )
        plain = Way("plain")
        _, self.score = self.judge.row(plain, self.judge.answers(plain), None)
        if self.score is None:
            raise ValueError(f"{_TASK.value} is scored by a judge, not here; choose another --task")

    def row(self, variant: Any, seed: int) -> dict[str, Any]:
        """The figures of a variant with a twig of one seed; only its budget where it has none."""
        from twig_jax.evaluation.judge import Way

        way = Way(variant.mode)
        row: dict[str, Any] = {"avg_retained": None, "retained": None}
        if variant.mode != "ssd":
            M, asked = self.model.config.vision.num_tokens, _RETAINED.value
            budget = round(M / 9) if asked is None else asked
            way = Way(variant.mode, variant.selector, budget)
            row = {"avg_retained": budget, "retained": self._kept(variant, budget)}
            if row["retained"] is None:
                return row
        judge = self._judge(variant, seed)
        if _TIMED.value:
            row |= judge.speeds([way], _TIMED.value, _REPEATS.value)[way]
        if variant.answered:
            row |= judge.row(way, judge.answers(way), self.score)[0]
        return row

    def _kept(self, variant: Any, budget: float) -> int | None:
        """R of one image; None where no R reaches the budget."""
        from twig_jax.pruning.budget import retained
        from twig_jax.training.overrides import override

        base, twig = override(self.config, variant.trained).model()
        if variant.K_f is not None:
            twig = dataclasses.replace(twig, K_f=variant.K_f)
        with contextlib.suppress(ValueError):
            return retained(budget, twig, base.text.num_layers, base.vision.num_tokens)
        return None

    def _judge(self, variant: Any, seed: int) -> Any:
        import jax.numpy as jnp

        from twig_jax.checkpoints.twig import read_twig
        from twig_jax.decoding.generate import Generator
        from twig_jax.models.cpu import restored

        own, folder = self.model.generator, self._grown(variant, seed)
        base = own.weights.base
        dtype = own.weights.dtype
        grown, twig = read_twig(
            folder, restored(base), own.config, dtype, lambda _, x: jnp.asarray(x)
        )
        changes = {"K_f": variant.K_f} if variant.K_f is not None else {}
        generator = Generator(
            own.config,
            base,
            dataclasses.replace(grown, **changes),
            twig,
            detokenize=own.detokenize,
        )
        drafting = {"gamma": variant.gamma, "theta": variant.theta}
        drafting = {k: v for k, v in drafting.items() if v is not None}
        name = "-".join([variant.twig, *(f"{k}={v}" for k, v in {**changes, **drafting}.items())])
        return dataclasses.replace(
            self.judge,
            model=dataclasses.replace(self.model, generator=generator),
            folder=self.judge.folder / name / f"seed{seed}",
            common=dataclasses.replace(self.judge.common, **drafting),
            notes={**self.judge.notes, "twig": variant.twig, "seed": seed, **changes, **drafting},
        )

    def _grown(self, variant: Any, seed: int) -> Path:
        """The folder of a variant's twig, which is trained unless it is there."""
        from twig_jax.training.overrides import override

        twig = self._trained(variant.grown, override(self.config, variant.trained), seed)
        if variant.reinforced is None:
            return twig
        config = dataclasses.replace(self.reinforced, base=self.config.base, twig_init=str(twig))
        return self._trained(variant.twig, override(config, variant.reinforced), seed)

    def _trained(self, name: str, config: Any, seed: int) -> Path:
        from launch.training import train
        from twig_jax.evaluation.answers import keep_settings

        out = self.out / "twigs" / name / f"seed{seed}"
        config = dataclasses.replace(config, seed=seed)
        made = dataclasses.asdict(config)
        made |= {f"data.{name}": value for name, value in made.pop("data").items()}
        out.mkdir(parents=True, exist_ok=True)
        matters = {k: v for k, v in made.items() if k not in _CHANGE_NOTHING}
        keep_settings(out / "config.json", matters)
        if not (out / "twig" / "twig.json").is_file():
            config = dataclasses.replace(config, out=str(out))
            print(f"training {out}", file=sys.stderr)
            train(config, export=str(out / "twig"), say=lambda text: tqdm.write(text, sys.stderr))
        return out / "twig"


def _table(lines: list[dict[str, Any]]) -> str:
    from twig_jax.evaluation.ablations import spread

    def figure(line: dict[str, Any], name: str, scale: float, digits: int) -> str:
        value, sd = line[name], spread(line, name)
        if value is None:
            return ""
        text = f"{scale * value:.{digits}f}"
        return text if sd is None else f"{text} ± {scale * sd:.{digits}f}"

    headers = ["ablation", "variant", "kept", "RelAcc %", "RelSpd", "TokAR %", "accepted"]
    return aligned(
        headers,
        [
            [
                line["ablation"],
                line["variant"],
                "" if line["retained"] is None else str(line["retained"]),
                figure(line, "relacc", 100, 1),
                figure(line, "relspd", 1, 2),
                figure(line, "tokar", 100, 1),
                figure(line, "mean_accepted", 1, 2),
            ]
            for line in lines
        ],
    )


if __name__ == "__main__":
    run(main)
