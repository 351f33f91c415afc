"""Trains one stage: the vision tower's warm-up, a base, or a twig on a frozen base.

python -m launch.train --config configs/digits_twig.py --set optim.lr=5e-4 --set steps=300

Status: 0 done, 1 failed, 75 told to stop by SIGTERM and saved: started again, the run goes on.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags

from launch import run

_CONFIG = flags.DEFINE_string("config", None, "file with get_config(), see configs/")
_SET = flags.DEFINE_multi_string("set", [], "override, as in optim.lr=2e-4; repeatable")
_EXPORT = flags.DEFINE_string("export", None, "write the trained model to this folder at the end")


def main(argv: list[str]) -> None:
    if len(argv) > 1 or not _CONFIG.value:
        raise app.UsageError("give --config FILE and overrides as --set name=value, nothing else")
    from twig_jax.runtime import use_compilation_cache
    from twig_jax.training.overrides import override
    from twig_jax.training.preemption import Preempted

    use_compilation_cache()
    try:
        config = override(read_config(_CONFIG.value), _SET.value)
        train(config, export=_EXPORT.value)
    except (FileNotFoundError, FloatingPointError, ValueError) as error:
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


def train(
    config: Any,
    *,
    export: str | None = None,
    model: Any = None,
    say: Callable[[str], None] = print,
) -> None:
    """Runs a training configuration to its end, validating at every checkpoint.

    `model` is a loaded `api.Model` to take the base from instead of `config.base`.
    """
    import jax

    from twig_jax.api import DIGITS
    from twig_jax.checkpoints.llava import write_llava
    from twig_jax.checkpoints.twig import write_twig
    from twig_jax.training.loop import fit

    base_config, twig_config = config.model()
    base = start_from(config) if model is None else model.generator.weights.base
    if config.stage == "twig":
        twig = start_twig(config, base)
        callback = _saying(validation(config, base), say)
        twig = fit(config, twig, base, callback=callback)
        if export:
            base = jax.device_get(base)
            write_twig(export, jax.device_get(twig), twig_config, base, base_config)
    else:
        # In the vision stage the decoder does not answer yet.
        callback = None if config.stage == "vision" else _saying(validation(config, None), say)
        base = fit(config, base, {}, callback=callback)
        if export:
            write_llava(export, jax.device_get(base), base_config, tokenizer=DIGITS)


def start_from(config: Any) -> Any:
    """The base a run starts from: random, a training run's, or a model folder's; deepened if told.

    Raises FileNotFoundError for a folder that is neither.
    """
    import jax
    import jax.numpy as jnp

    from twig_jax.checkpoints.llava import read_llava
    from twig_jax.checkpoints.manager import CheckpointManager
    from twig_jax.models.grow import deepen
    from twig_jax.models.llava import init_base

    base_config, _ = config.model()
    fresh = init_base(base_config, jax.random.key(config.seed))
    if config.base is None:
        return fresh
    folder = Path(config.base)
    if (folder / "checkpoints").is_dir():
        manager = CheckpointManager(folder / "checkpoints")
        base = manager.restore(None)["params"]
        manager.close()
    elif (folder / "config.json").is_file():
        _, base = read_llava(folder, jnp.float32)
        base = jax.tree.map(jnp.asarray, base)
    else:
        raise FileNotFoundError(f"{folder} is neither a training run nor a model folder")
    if config.deepen is not None:
        return deepen(base, config.deepen)
    if len(base["text"]) != len(fresh["text"]):
        # From the vision stage, whose decoder never ran: everything but the decoder's layers.
        text = {k: v for k, v in base["text"].items() if not k.startswith("layers_")}
        return {**base, "text": {**fresh["text"], **text}}
    return base


def start_twig(config: Any, base: Any) -> Any:
    """The twig a run starts from: grown from the base, or a twig folder's to be trained on.

    Raises FileNotFoundError and ValueError for folders that hold no twig of this base, and
    ValueError for a twig of another shape than the run's.
    """
    import jax
    import jax.numpy as jnp

    from twig_jax.checkpoints.twig import read_twig
    from twig_jax.models.twig import init_twig

    base_config, twig_config = config.model()
    if not Path(config.twig_init).is_dir():
        return init_twig(base, base_config.text, twig_config, config.twig_init, config.seed)
    grown, twig = read_twig(config.twig_init, jax.device_get(base), base_config, jnp.float32)
    if grown != twig_config:
        raise ValueError(f"the twig in {config.twig_init} is {grown}, the run's is {twig_config}")
    return jax.tree.map(jnp.asarray, twig)


def validation(config: Any, base: Any, n: int = 64) -> Callable[[int, Any], dict[str, float]]:
    """A callback(step, params) -> figures on validation pages: exact match, and a twig's TokAR."""
    from twig_jax.api import DIGITS
    from twig_jax.data.tokens import load_tokenizer
    from twig_jax.decoding.generate import Generator
    from twig_jax.decoding.settings import Settings
    from twig_jax.evaluation import tasks
    from twig_jax.evaluation.compare import content_tokens
    from twig_jax.evaluation.scoring import acceptance

    base_config, twig_config = config.model()
    tokenizer = load_tokenizer(DIGITS)
    samples = tasks.load_samples(tokenizer, base_config, n, split="validation")

    def validate(step: int, params: Any) -> dict[str, float]:
        if config.stage == "twig":
            generator = Generator(base_config, base, twig_config, params)
            settings = Settings(mode="ssd", max_new_tokens=64)
        else:
            generator = Generator(base_config, params)
            settings = Settings(mode="plain", max_new_tokens=64)
        results = tasks.answer(generator, samples, settings)
        figures: dict[str, float] = {}
        for task in ("short", "long"):
            right = [
                tasks.exact(tokenizer, s, r)
                for s, r in zip(samples, results, strict=True)
                if s.question.task == task
            ]
            figures[f"validation/{task}_exact"] = sum(right) / max(len(right), 1)
        if config.stage == "twig":
            a = acceptance(results, [content_tokens(tokenizer, s) for s in samples])
            figures["validation/tokar"] = a.tokar
            figures["validation/mean_accepted"] = a.accepted
        return {k: round(v, 4) for k, v in figures.items()}

    return validate


def _saying(callback: Any, say: Callable[[str], None]) -> Any:
    def told(step: int, params: Any) -> dict[str, float]:
        figures = callback(step, params)
        say(f"step {step}: {json.dumps(figures)}")
        return figures

    return told


if __name__ == "__main__":
    run(main)
