"""A training run with its validation, for the launchers that train."""

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from absl import logging
from etils import epath
from tqdm import tqdm

from launch import stop_at_sigterm


def read_config(path: str) -> Any:
    """The configuration that a file's get_config() returns."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no configuration file {path}")
    spec = importlib.util.spec_from_file_location("config", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path} has no get_config()")
    return module.get_config()


def train(
    config: Any,
    *,
    export: str | None = None,
    say: Callable[[str], None] = tqdm.write,  # above the progress bar
) -> None:
    """Runs a training configuration to its end, validating before every checkpoint."""
    import jax
    from jax.experimental import multihost_utils

    from twig_jax.checkpoints.llava import write_llava
    from twig_jax.checkpoints.twig import TWIG_FILE, write_twig
    from twig_jax.models.twig import feeding
    from twig_jax.sharding.mesh import make_mesh
    from twig_jax.sharding.placement import gather
    from twig_jax.training.loop import fit
    from twig_jax.training.start import start_base, start_twig

    grows = config.stage == "twig"
    if export and "://" not in export and not jax.process_index():
        other = Path(export) / ("config.json" if grows else TWIG_FILE)
        if other.is_file():
            what = ("base", "twig") if grows else ("twig", "base")
            raise ValueError(f"{export} holds a {what[0]}: export the {what[1]} to another folder")
        Path(export).mkdir(parents=True, exist_ok=True)  # or it is known now that it cannot be
    base_config, twig_config = config.model()
    mesh = make_mesh(*config.mesh)
    first = not jax.process_index()
    base = start_base(config, mesh)
    answers = config.holds_out and config.whole_base and config.stage != "vision"
    callback = None
    if answers:
        told = say if first else lambda text: None
        callback = validation(config, base if grows else None, mesh, told)
    if grows:
        begun = [start_twig(config, base, mesh)]
        if not config.whole_base:
            base = feeding(base, twig_config.K)
    else:
        begun, base = [base], {}
    # Nothing here may hold what the run begins with, or the devices would hold it to the end.
    trained = gather(fit(config, begun.pop(), base, callback=callback))
    if jax.process_count() > 1:
        stop_at_sigterm()  # nobody asks jax for the signal any more
    if export and grows:
        sampled = gather(feeding(base, twig_config.K))
        if first:
            with _local(export) as folder:
                write_twig(folder, trained, twig_config, sampled, base_config)
    elif export and first:
        with _local(export) as folder:
            write_llava(folder, trained, base_config, tokenizer=config.reads_as())
    if export and first:
        say(f"exported to {export}")
    # jax aborts all processes, the one that writes too, five minutes after the first has ended.
    multihost_utils.sync_global_devices("exported")


@contextmanager
def _local(folder: str) -> Iterator[str]:
    """The folder to write to: itself, or one whose files are then copied to a bucket's."""
    if "://" not in folder:
        yield folder
        return
    from twig_jax.checkpoints.twig import TWIG_FILE

    with tempfile.TemporaryDirectory() as local:
        yield local
        target = epath.Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        # A twig's notes last, by which it is known to be there.
        for file in sorted(Path(local).iterdir(), key=lambda file: file.name == TWIG_FILE):
            epath.Path(file).copy(target / file.name, overwrite=True)


def validation(
    config: Any, base: Any, mesh: Any, say: Callable[[str], None]
) -> Callable[[int, Any], dict[str, float]]:
    """A callback(step, params) -> `validation/...` figures of answers to held-out questions.

    base: that the twig of a run is on; not needed where the base itself is trained.
    """
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
    from twig_jax.decoding.settings import Settings
    from twig_jax.evaluation import tasks
    from twig_jax.evaluation.validation import HeldOut

    base_config, _ = config.model()
    tokenizer, n = load_tokenizer(config.reads_as()), config.validation_samples
    if config.data.source is None:
        samples = tasks.load_samples(tokenizer, base_config, n, split="validation")
        return tokenizer, [HeldOut(s.request, s.question.answer) for s in samples]
    reads = conventions(config.reads_as(), config.data.conventions)
    reader = Model(Generator(base_config, {}), tokenizer, reads)
    source = open_source(config.data.validation, config.data.images)
    found: list[HeldOut] = []
    for index in range(len(source)):
        if len(found) == n:
            break
        try:
            sample = source[index]
            question, answer = sample.turns[0]
            images = sample.images[: question.count("<image>")]
            request = reader.request(question, images)
            reader.generator.batches.need(index, request, Settings(mode="plain"))
        except (BadSample, ValueError) as error:
            logging.warning("left out of validation: %s", error)
            continue
        found.append(HeldOut(request, answer.strip()))
    return tokenizer, found
