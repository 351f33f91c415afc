"""LLaVA's instruction data as one data set, images included, that reads fast from anywhere.

python -m launch.build_dataset --json llava_v1_5_mix665k.json --images images --out data/mix665k

Bad rows are named, counted and left out; beyond --max_bad_fraction of them nothing is written.
"""

import sys

from absl import app, flags, logging

from launch import run

_JSON = flags.DEFINE_string("json", None, "file of LLaVA's instruction format, .json or .jsonl")
_IMAGES = flags.DEFINE_string("images", None, "folder of the images; the file's own if none")
_OUT = flags.DEFINE_string("out", None, "folder to write the data set to")
_MAX_BAD_FRACTION = flags.DEFINE_float(
    "max_bad_fraction", 0.01, "share of bad rows to put up with", 0.0, 1.0
)


def main(argv: list[str]) -> None:
    if len(argv) > 1 or not (_JSON.value and _OUT.value):
        raise app.UsageError("give --json FILE, --images FOLDER and --out FOLDER, nothing else")
    logging.set_verbosity(logging.FATAL)  # what libraries log of an error is told once, below
    try:
        build()
    except (ImportError, OSError, RuntimeError, ValueError) as error:  # the writer's: a full disk
        sys.exit(f"build_dataset: {error}")


def build() -> None:
    """Builds the data set as the flags say."""
    from tqdm import tqdm

    from twig_jax.data.build import build
    from twig_jax.data.sources import BadSample, InstructionFile

    source = InstructionFile(_JSON.value or "", _IMAGES.value)
    with tqdm(total=len(source), unit=" samples", disable=None) as bar:

        def seen(bad: BadSample | None) -> None:
            if bad is not None:
                bar.write(f"left out: {bad}", file=sys.stderr)
            bar.update()

        report = build(
            source, _OUT.value or "", max_bad_fraction=_MAX_BAD_FRACTION.value, seen=seen
        )
    print(f"{report.written} samples in {_OUT.value}, {len(report.bad)} bad ones left out")


if __name__ == "__main__":
    run(main)
