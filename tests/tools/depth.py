"""How many of its layers the embedded base needs.

python -m tests.tools.depth --samples 1536
"""

from collections import Counter

from absl import app, flags, logging

from launch.output import aligned
from tests.shallow import first_layers
from twig_jax import api
from twig_jax.checkpoints.llava import read_llava
from twig_jax.data.digits import ASSETS
from twig_jax.decoding.generate import Generator
from twig_jax.decoding.settings import Settings
from twig_jax.evaluation import tasks

_SAMPLES = flags.DEFINE_integer("samples", 1536, "unseen pages, a question each", lower_bound=1)
_LAYERS = flags.DEFINE_list("layers", ["5", "6", "16"], "how many of the first to keep")


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    tokenizer = api.load().tokenizer
    whole, base = read_llava(ASSETS / "base")
    samples = tasks.load_samples(tokenizer, whole, _SAMPLES.value)
    asked = Counter(map(kind, samples))
    table = []
    for layers in map(int, _LAYERS.value):
        generator = Generator(*first_layers(whole, base, layers))
        results = tasks.answer(generator, samples, Settings(mode="plain", max_new_tokens=64))
        right = Counter(
            kind(sample)
            for sample, result in zip(samples, results, strict=True)
            if tasks.exact(tokenizer, sample, result)
        )
        table.append([str(layers), f"{right.total()}", *(f"{right[name]}" for name in asked)])
    heads = [f"{name} of {count}" for name, count in asked.items()]
    print(aligned(["layers", f"right of {len(samples)}", *heads], table))


def kind(sample: tasks.Sample) -> str:
    """The kind of question; neighbours of a digit named by its value are one of their own."""
    name = sample.question.kind
    by_value = "neighbour" in name and "row" not in sample.question.text
    return f"{name} by value" if by_value else name


if __name__ == "__main__":
    app.run(main)
