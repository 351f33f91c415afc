"""Runs on a published base and on conversations, from where they start to what they give."""

import dataclasses
import json
from pathlib import Path

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

import twig_jax
from launch.training import read_held_out, train, validation
from tests.training.conftest import TINY
from tests.training.worker import lines
from twig_jax.checkpoints.llava import write_llava
from twig_jax.checkpoints.manager import CheckpointManager
from twig_jax.checkpoints.twig import read_notes, read_twig
from twig_jax.data.digits import ASSETS
from twig_jax.models.llava import init_base
from twig_jax.sharding.mesh import make_mesh
from twig_jax.training.config import DataConfig, OptimConfig, TrainConfig
from twig_jax.training.loop import fit
from twig_jax.training.start import start_base, start_twig

LAYERS = 4


@pytest.fixture(scope="module")
def shape():
    base, _ = TINY
    return dataclasses.replace(base, text=dataclasses.replace(base.text, num_layers=LAYERS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shape, draw):
    """A base of four layers, as published ones are."""
    params = draw(jax.eval_shape(lambda key: init_base(shape, key), jax.random.key(0)), seed=5)
    folder = tmp_path_factory.mktemp("base")
    write_llava(folder, params, shape, dtype="float32", tokenizer=ASSETS / "base")
    return folder


def config(folder, out="", **changes):
    settings = {"steps": 2, "preset": "tiny", "base": str(folder), "K": 1, "T": 2, "K_f": 3}
    return TrainConfig("twig", str(out), **settings | changes)


def layers(tree):
    return sorted(int(name.removeprefix("layers_")) for name in tree if name.startswith("layers_"))


def test_the_base_has_its_folders_shape(folder, shape):
    base, twig = config(folder).model()
    assert base.text == dataclasses.replace(shape.text, max_positions=base.text.max_positions)
    assert (twig.K, twig.T, twig.K_f) == (1, 2, 3)


def test_a_base_is_placed_in_its_type(folder):
    mesh = make_mesh(1, 4, 2)
    run = config(folder, base_dtype="bfloat16")
    base = start_base(run, mesh)
    assert layers(base["text"]) == [0, 1, 2, 3]
    assert {x.dtype for x in jax.tree.leaves(base)} == {jnp.dtype(jnp.bfloat16)}
    kernel = base["text"]["layers_0"]["q_proj"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (8, 16)
    twig = start_twig(run, base, mesh)
    assert {x.dtype for x in jax.tree.leaves(twig)} == {jnp.dtype(jnp.float32)}
    kernel = twig["layers_0"]["q_proj"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (8, 16)


@pytest.mark.parametrize(
    ("how", "read", "first"),
    [("next", [0, 1, 2], 1), ("last", [0, 2, 3], 2), ("random", [0], None)],
)
def test_a_twig_starts_from_the_layers_told(folder, how, read, first):
    """And no other layers are read, if the whole base is not wanted."""
    mesh = make_mesh()
    run = config(folder, twig_init=how, whole_base=False)
    base = start_base(run, mesh)
    assert layers(base["text"]) == read
    twig = start_twig(run, base, mesh)
    assert layers(twig) == [0, 1]
    if first is not None:
        for t in range(2):
            jax.tree.map(
                np.testing.assert_array_equal,
                twig[f"layers_{t}"],
                base["text"][f"layers_{first + t}"],
            )


def test_a_twig_of_another_shape_is_refused(folder, tmp_path):
    run = config(folder, tmp_path / "run", steps=1, data=conversations(tmp_path))
    train(run, export=str(tmp_path / "twig"), say=lambda text: None)
    mesh = make_mesh()
    base = start_base(run, mesh)
    twig = start_twig(dataclasses.replace(run, twig_init=str(tmp_path / "twig")), base, mesh)
    assert layers(twig) == [0, 1]
    # The run is over: this exports it again, to a bucket.
    fsspec.register_implementation("gcs", MemoryFileSystem, clobber=True)
    train(run, export="gs://bucket/a/twig", say=lambda text: None)
    for file in (tmp_path / "twig").iterdir():
        stored = epath.Path("gs://bucket/a/twig") / file.name
        assert stored.read_bytes() == file.read_bytes()
    assert not Path("gs:").exists()
    with pytest.raises(ValueError, match="holds a base: export the twig to another folder"):
        train(run, export=str(folder), say=lambda text: None)
    other = dataclasses.replace(run, twig_init=str(tmp_path / "twig"), T=1)
    with pytest.raises(ValueError, match=r"T=2, .* the run's is .*T=1"):
        start_twig(other, base, mesh)


def conversations(folder, **changes):
    """Rows with an image, without, and with two, of which one has lost its image."""
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 256, (60, 90, 3), np.uint8)).save(folder / name)
    shown = {0: "a.png", 1: None, 2: ["a.png", "b.png"]}
    rows = []
    for n in range(120):
        row = {"id": f"s{n}", "image": shown[n % 3]}
        marks = {0: "<image>\n", 1: "", 2: "<image>\n<image>\n"}[n % 3]
        if row["image"] is None:
            del row["image"]
        if n == 60:
            row["image"] = "lost.png"
        turns = [marks + "What digit is in row B, column 3?", "seven", "And below?", "It is blank."]
        row["conversations"] = [
            {"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)
        ]
        rows.append(row)
    (folder / "train.json").write_text(json.dumps(rows))
    (folder / "held_out.jsonl").write_text("\n".join(json.dumps(row) for row in rows[57:63]))
    settings = {"batch_size": 8, "row_tokens": 400, "row_images": 2, "max_bad_fraction": 0.2}
    return DataConfig(source=str(folder / "train.json"), **settings | changes)


def test_a_twig_grows_on_conversations(folder, tmp_path, caplog):
    """In bfloat16, validated on conversations held out; what it exports answers with its base."""
    data = conversations(tmp_path, validation=str(tmp_path / "held_out.jsonl"))
    said = []
    run = config(
        folder,
        tmp_path / "run",
        base_dtype="bfloat16",
        steps=4,
        save_every=2,
        log_every=1,
        device_rows=1,
        remat=True,
        data=data,
        optim=OptimConfig(lr=1e-2),
        validation_samples=5,
    )
    train(run, export=str(tmp_path / "twig"), say=said.append)
    validated = [line for line in lines(tmp_path / "run") if "validation/loss" in line]
    assert [line["step"] for line in validated] == [2, 4]
    for line in validated:
        assert 0 <= line["validation/exact"] <= 1
        assert 0 <= line["validation/tokar"] <= 1
        assert np.isfinite(line["validation/loss"])
    assert len(said) == 3 and said[0].startswith("step 2: exact ")
    assert said[-1] == f"exported to {tmp_path / 'twig'}"
    assert "left out: sample s60: image" in caplog.text

    model = twig_jax.load(folder, tmp_path / "twig")
    answer = model.generate("What digit is in row B, column 3?", [tmp_path / "a.png"])
    plain = model.generate("What digit is in row B, column 3?", [tmp_path / "a.png"], mode="ttp")
    assert answer.tokens.tolist() == plain.tokens.tolist()
    _, twig = read_twig(tmp_path / "twig", model.generator.weights.base, model.config)
    before = start_base(run, make_mesh())["text"]["layers_1"]["q_proj"]["kernel"]
    assert np.abs(twig["layers_0"]["q_proj"]["kernel"] - np.float32(before)).max() > 1e-3


def test_held_out_questions_that_cannot_be_asked_are_left_out(folder, tmp_path, caplog):
    path = tmp_path / "held_out.jsonl"
    data = conversations(tmp_path, validation=str(path))
    turns = [{"from": "human", "value": "What? " * 5000}, {"from": "gpt", "value": "It is blank."}]
    long = json.dumps({"id": "long", "conversations": turns})
    path.write_text(f"{long}\n{path.read_text()}")
    _, found = read_held_out(config(folder, data=data, validation_samples=5))
    assert len(found) == 5 and "left out of validation: request 0: a prompt of" in caplog.text


def test_a_base_that_answers_right_is_measured_against(folder, tmp_path):
    """What the base itself says is held out as the right answer, so that pruning is compared."""
    data = conversations(tmp_path, validation=str(tmp_path / "held_out.jsonl"))
    run = config(folder, data=data, validation_samples=5)
    mesh = make_mesh()
    base = start_base(run, mesh)
    twig = start_twig(run, base, mesh)
    model = twig_jax.load(folder)
    rows = [json.loads(x) for x in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    for row in rows:
        images = row.get("image", [])
        images = [images] if isinstance(images, str) else images
        if row["id"] != "s60":
            paths = [tmp_path / image for image in images]
            asked = row["conversations"][0]["value"]
            said = model.generate(asked, paths, mode="plain", max_new_tokens=64)
            row["conversations"][1]["value"] = model.tokenizer.decode(
                said.tokens, skip_special_tokens=True
            )
    (tmp_path / "held_out.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    figures = validation(run, base, mesh, lambda text: None)(1, twig)
    assert figures["validation/exact"] == 1
    # Of 144 visual tokens, the first of four layers alone sees 36 a layer.
    assert [name for name in figures if "relacc" in name] == ["validation/relacc_48"]
    assert 0 <= figures["validation/relacc_48"] <= 1


def test_nothing_held_out_is_validated_on_nothing(folder, tmp_path):
    said = []
    train(config(folder, tmp_path / "run", data=conversations(tmp_path)), say=said.append)
    assert said == []


def test_the_stages_of_digits_follow_each_other(tmp_path):
    """Vision tower, a shallow base, a deeper one; each starts from what the one before has made."""

    def stage(name, out, **changes):
        settings = {
            "preset": "tiny",
            "steps": 2,
            "data": DataConfig(batch_size=8, row_tokens=276),
            "optim": OptimConfig(lr=1e-2),
            "validation_samples": 4,
            "naming_weight": 0.5,
        }
        said = []
        run = TrainConfig(name, str(tmp_path / out), **settings | changes)
        train(run, export=str(tmp_path / f"{out}_model"), say=said.append)
        assert lines(tmp_path / out)[-1]["validation/loss"] > 0
        return said[:-1]  # and where the model is

    assert stage("vision", "vision", layers=1) == []  # the decoder does not answer yet
    (said,) = stage("base", "shallow", layers=1, base=str(tmp_path / "vision"))
    assert said.startswith("step 2: exact ")
    stage("base", "deep", base=str(tmp_path / "shallow"), deepen=(0, None))
    stage("twig", "twig", base=str(tmp_path / "deep_model"))
    assert read_notes(tmp_path / "twig_model")[0] == TINY[1]
    with pytest.raises(FileNotFoundError, match="neither a training run nor a model folder"):
        stage("twig", "again", base=str(tmp_path))


def digits(stage, out="", **changes):
    settings = {"preset": "tiny", "steps": 3, "data": DataConfig(batch_size=8, row_tokens=212)}
    return TrainConfig(stage, str(out), **settings | changes)


def saved(out, params, stage="base", **changes):
    """The folder of a run that has saved these parameters, untrained."""
    manager = CheckpointManager(out / "checkpoints")
    notes = {"config": dataclasses.asdict(digits(stage, out, **changes))}
    manager.save(3, {"params": params, "ema": None, "step": jnp.int32(3)}, notes)
    manager.close()
    return str(out)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_base_of_another_depth_is_refused(base, tmp_path):
    """The layers of a vision run alone are drawn anew: nothing has trained them."""
    run = saved(tmp_path / "base", base)
    for stage in ("base", "twig"):
        deeper = digits(stage, layers=3, base=run)
        with pytest.raises(ValueError, match=r"2 decoder layers, .* has 3: set layers=2"):
            start_base(deeper, make_mesh())
        assert_same(start_base(dataclasses.replace(deeper, layers=2), make_mesh()), base)
    with pytest.raises(ValueError, match=r"3 decoder layers once deepened, .* has 2: set layers=3"):
        start_base(digits("base", base=run, deepen=(0, None, 1)), make_mesh())
    towers = start_base(
        digits("base", layers=3, base=saved(tmp_path / "vision", base, "vision")), make_mesh()
    )
    assert layers(towers["text"]) == [0, 1, 2]
    assert_same(towers["vision"], base["vision"])


def test_a_base_of_a_model_folder_keeps_its_layers(folder):
    with pytest.raises(ValueError, match=r"4 decoder layers, .* has 2: set layers=4"):
        start_base(digits("base", base=str(folder)), make_mesh())
    for change in ({"layers": 2}, {"deepen": (0, None)}):
        with pytest.raises(
            ValueError, match=r"of 4 decoder layers, .* leave out layers and deepen"
        ):
            start_base(
                digits("twig", **{"layers": None, "base": str(folder), **change}), make_mesh()
            )


@pytest.mark.parametrize(("was", "now"), [("twig", "twig"), ("twig", "base"), ("vision", "twig")])
def test_a_run_of_an_unsuitable_stage_is_refused(base, tmp_path, was, now):
    run = saved(tmp_path / "run", base, was)
    with pytest.raises(ValueError, match=f"a run of the {was} stage, which the {now} stage"):
        start_base(digits(now, base=run), make_mesh())


def test_the_next_stage_starts_from_what_the_run_gave(base, tmp_path):
    """The average of the best checkpoint here, which is not the newest."""
    run = digits(
        "vision",
        tmp_path / "run",
        ema=0.5,
        best=True,
        save_every=1,
        optim=OptimConfig(lr=100.0, warmup=1.0),
    )
    result = fit(run, base, {}, progress=False)
    manager = CheckpointManager(tmp_path / "run/checkpoints", reads_only=True)
    assert manager.best() < manager.latest() == 3
    manager.close()
    assert_same(start_base(digits("base", base=run.out), make_mesh()), result)


def test_a_base_may_come_from_other_devices(base, tmp_path):
    run = saved(tmp_path / "run", base)
    (notes,) = (tmp_path / "run/checkpoints/3").rglob("_sharding")
    assert "cpu:0" in notes.read_text()
    notes.write_text(notes.read_text().replace("cpu:0", "cpu:77"))
    mesh = make_mesh(1, 4, 2)
    found = start_base(digits("base", base=run), mesh)
    assert_same(found, base)
    kernel = found["text"]["layers_0"]["q_proj"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (8, 16)


def test_what_another_run_is_saving_is_left_alone(base, tmp_path):
    run = saved(tmp_path / "run", base)
    unfinished = tmp_path / "run/checkpoints/4.orbax-checkpoint-tmp"
    unfinished.mkdir()
    start_base(digits("base", base=run), make_mesh())
    assert unfinished.is_dir()


def test_a_run_that_has_saved_nothing_is_no_base(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match="has saved nothing yet"):
        start_base(digits("base", base=str(tmp_path)), make_mesh())
