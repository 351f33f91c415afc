"""Imports point one way, and heavy packages stay where they are needed."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "twig_jax"

# What each part of the package may import from it, besides itself.
SHAPES = {"config", "presets"}
INFERENCE = ("sharding", "models", "pruning", "decoding")
MAY_IMPORT = {
    "config": set(),
    "presets": {"config"},
    "runtime": set(),
    "hardware": set(),
    "programs": set(),
    "sharding": SHAPES,
    "models": SHAPES | {"sharding"},
    "pruning": SHAPES | {"sharding", "models"},
    "decoding": SHAPES | {"sharding", "models", "pruning", "programs", "hardware"},
    "data": SHAPES | {"sharding", "checkpoints"},
    "checkpoints": SHAPES | {"sharding"},
    "training": SHAPES
    | {"sharding", "models", "pruning", "data", "checkpoints", "runtime"}
    | {"programs", "hardware"},
    "evaluation": SHAPES | {*INFERENCE, "data", "checkpoints", "programs"},
    "assets": SHAPES | {"data"},
    "api": SHAPES | {*INFERENCE, "data", "checkpoints", "evaluation", "training", "runtime"},
    "lmms": {"api", "decoding", "evaluation", "runtime"},
}
# The inference path runs wherever these do.
INFERENCE_NEEDS = {"jax", "flax", "numpy", "einops"}
# Where else a package may appear: a file, or a folder with all in it.
ONLY_IN = {
    "absl": ["launch", "twig_jax/data/instruct.py"],
    "orbax": ["twig_jax/checkpoints/manager.py"],
    "torch": ["twig_jax/checkpoints/storage.py", "launch/compare.py"],
    "huggingface_hub": ["twig_jax/checkpoints/llava.py"],
    "grain": ["twig_jax/data"],
    "tensorflow_datasets": ["twig_jax/data"],
    "sklearn": ["twig_jax/assets"],
    "lmms_eval": ["twig_jax/lmms"],
}


def part(path):
    """The part of the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """Every module a file names in an import, wherever in the file it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield node.module
            # `from twig_jax import models` names a part too.
            if node.module == "twig_jax":
                yield from (f"twig_jax.{alias.name}" for alias in node.names)


FILES = sorted(PACKAGE.rglob("*.py"))
LEAN = [path for path in FILES if part(path) in {*SHAPES, *INFERENCE}]
SCRIPTS = [path for name in ("launch", "configs") for path in sorted((ROOT / name).rglob("*.py"))]


def names(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_directions(path):
    own = part(path)
    if own == "__init__":
        allowed = set(MAY_IMPORT) - {"evaluation", "training"}
    else:
        assert own in MAY_IMPORT, f"say in MAY_IMPORT what {own} may import"
        allowed = MAY_IMPORT[own] | {own}
    found = {name.split(".")[1] for name in imports(path) if name.startswith("twig_jax.")}
    assert found <= allowed, f"{path} must not import {found - allowed}"
    assert not {name.split(".")[0] for name in imports(path)} & {"launch", "configs", "tests"}


@pytest.mark.parametrize("path", LEAN, ids=names(LEAN))
def test_the_inference_path_needs_little(path):
    found = {name.split(".")[0] for name in imports(path)} - sys.stdlib_module_names
    assert found <= INFERENCE_NEEDS | {"twig_jax"}


@pytest.mark.parametrize("path", FILES + SCRIPTS, ids=names(FILES + SCRIPTS))
def test_packages_with_one_place(path):
    for name in imports(path):
        places = ONLY_IN.get(name.split(".")[0])
        if places is not None:
            allowed = any(path.is_relative_to(ROOT / place) for place in places)
            assert allowed, f"{path} imports {name}; that belongs in {places or 'no file here'}"


def test_reading_checkpoints_needs_no_training():
    needs = {"numpy", "safetensors", "ml_dtypes", "jax", "twig_jax"} | sys.stdlib_module_names
    # Only where .bin files or the hub are asked for.
    needs |= {"torch", "huggingface_hub"}
    for path in (PACKAGE / "checkpoints").glob("*.py"):
        found = {name.split(".")[0] for name in imports(path)}
        assert found <= needs or path.name == "manager.py", f"{path}: {found - needs}"


def test_decoding_and_training_do_not_know_each_other():
    """Nor by way of others: what one reaches, the other is not in."""

    def reached(name):
        found, waiting = set(), [name]
        while waiting:
            for other in MAY_IMPORT[waiting.pop()] - found:
                found.add(other)
                waiting.append(other)
        return found

    assert "training" not in reached("decoding") and "decoding" not in reached("training")
    assert all(name not in reached(name) for name in MAY_IMPORT)  # no circles
