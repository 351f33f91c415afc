"""Conversions: bit for bit there and back, nothing half written, everything wrong said at once."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

import tests.llama
from tests.checkpoints.original import original, original_name
from twig_jax.checkpoints import storage
from twig_jax.checkpoints.config_files import read_config
from twig_jax.checkpoints.convert import convert, plan, verify
from twig_jax.checkpoints.llava import read_llava, write_llava
from twig_jax.checkpoints.source import Source, resized
from twig_jax.checkpoints.tables import Tensor, flatten, llava_tensors
from twig_jax.checkpoints.twig import fingerprint, read_twig, write_twig
from twig_jax.config import VisionConfig
from twig_jax.data.digits import ASSETS
from twig_jax.data.tokens import load_tokenizer
from twig_jax.models.llava import init_base
from twig_jax.sharding.mesh import make_mesh

NOT_OF_TWIG = {"model.embed_tokens.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"}
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hf(tmp_path, base, config):
    """A bfloat16 Hugging Face folder of `base`, with a tokenizer's file."""
    folder = tmp_path / "hf"
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    write_llava(folder, base, config, "bfloat16", tokenizer=tmp_path / "tokenizer")
    return folder


@pytest.fixture
def official(tmp_path, twig, twig_config, base, config):
    """A twig as it is published: its tensors, some of its base's, a constant, and no twig.json."""
    folder = tmp_path / "official"
    write_twig(folder, twig, twig_config, base, config, "bfloat16")
    (folder / "twig.json").unlink()
    stored = load_file(folder / "model.safetensors")
    stored |= {name: np.zeros((40, 24), ml_dtypes.bfloat16) for name in NOT_OF_TWIG}
    save_file(stored, folder / "model.safetensors")
    return folder


def run(source, to, out, **options):
    with plan(source, to, **options) as p:
        convert(p, out)
        assert verify(p, out) == []


def stored(folder):
    """Every tensor in a folder's files, as bytes with type and shape."""
    files = sorted(folder.glob("*.safetensors"))
    assert files
    return {
        name: (x.dtype.name, x.shape, x.tobytes())
        for file in files
        for name, x in load_file(file).items()
    }


def test_hf_to_orbax_and_back(tmp_path, hf, config):
    run(hf, "orbax", tmp_path / "orbax")
    run(tmp_path / "orbax", "hf", tmp_path / "again")
    assert stored(tmp_path / "again") == stored(hf)
    for name in ("config.json", "processor_config.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (hf / name).read_bytes()
    found, params = read_llava(tmp_path / "orbax")
    assert found == config
    for (path, x), (other, y) in zip(
        sorted(flatten(params).items()), sorted(flatten(read_llava(hf)[1]).items()), strict=True
    ):
        assert path == other and x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x).view(np.uint16), np.array(y).view(np.uint16))


def test_an_orbax_folder_that_was_copied_in_part(tmp_path, hf):
    """Its description alone: where arrays are missing, orbax leaves threads with errors behind."""
    run(hf, "orbax", tmp_path / "orbax")
    path = tmp_path / "orbax" / "params" / "state" / "_METADATA"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="params is no whole orbax checkpoint"):
        read_llava(tmp_path / "orbax")


def test_official_twig_to_orbax_and_back(tmp_path, official, hf, base, config, twig_config):
    with plan(official, "orbax", K=1, K_f=3, base=hf) as p:
        assert set(p.source.ignored) == NOT_OF_TWIG
        convert(p, tmp_path / "orbax")
    run(tmp_path / "orbax", "twig-official", tmp_path / "again")
    expected = {n: x for n, x in stored(official).items() if n not in NOT_OF_TWIG}
    assert stored(tmp_path / "again") == expected
    notes = json.loads((tmp_path / "again" / "twig.json").read_text())
    assert notes["base_fingerprint"] == fingerprint(config, base, 1)
    for folder in (tmp_path / "orbax", tmp_path / "again"):
        assert read_twig(folder, base, config)[0] == twig_config


def test_a_published_p_head_comes_along(tmp_path, official, hf, base, config, twig_config):
    text, rng = config.text, np.random.default_rng(0)
    heads = {"q": text.num_heads, "k": text.num_kv_heads}
    gates = {
        f"leaf_attention_module.{name}_gate.weight": rng.normal(
            size=(count * text.head_dim, text.hidden_size)
        ).astype(ml_dtypes.bfloat16)
        for name, count in heads.items()
    }
    path = official / "model.safetensors"
    save_file(load_file(path) | gates, path)
    run(official, "orbax", tmp_path / "orbax", K=1, K_f=3, base=hf)
    found, params = read_twig(tmp_path / "orbax", base, config)
    assert found == dataclasses.replace(twig_config, p_head=True, gate="relu * sigmoid")
    assert params["p_head"].keys() == {"q_gate", "k_gate"}
    for name, x in gates.items():
        kernel = params["p_head"][name.split(".")[1]]["kernel"]
        np.testing.assert_array_equal(kernel.T, x)
    run(tmp_path / "orbax", "twig-official", tmp_path / "again")
    assert stored(tmp_path / "again").items() <= stored(official).items()
    assert gates.keys() < stored(tmp_path / "again").keys()


def test_a_twig_keeps_its_vocabulary(tmp_path, official, hf):
    """Also where its base was padded since."""
    source = original(tmp_path / "original", hf, tower=tmp_path / "clip")
    run(source, "hf", tmp_path / "padded", vision_source=tmp_path / "clip")
    run(official, "twig-official", tmp_path / "out", K=1, K_f=3, base=tmp_path / "padded")
    assert stored(tmp_path / "out").items() <= stored(official).items()


def test_a_twig_that_does_not_say_where_it_grows(tmp_path, official):
    with pytest.raises(ValueError, match="give --K"), plan(official, "orbax"):
        pass
    run(official, "twig-official", tmp_path / "out", K=1, K_f=3)
    assert json.loads((tmp_path / "out" / "twig.json").read_text())["base_fingerprint"] is None


@pytest.mark.parametrize("changes", [{"K": 2}, {"K": 1, "K_f": 2}, {"base": True}])
def test_what_a_twig_says_of_itself_stays(
    tmp_path, twig, twig_config, draw, hf, base, config, changes
):
    write_twig(tmp_path / "twig", twig, twig_config, draw(base, seed=9), config)
    if "base" in changes:
        changes = {"base": hf}
    with pytest.raises(ValueError, match=r"says K=1, K_f=3|grew on another base than .*hf$"):
        run(tmp_path / "twig", "orbax", tmp_path / "out", **changes)
    run(tmp_path / "twig", "orbax", tmp_path / "out", K=1, K_f=3)


@pytest.mark.parametrize(
    ("changes", "K_f", "message"),
    [
        ({}, 9, "K < K_f <= L, not K=1, K_f=9, L=3"),
        ({"intermediate_size": 40}, 3, r"mlp.down_proj.weight .*36"),
    ],
)
def test_a_twig_that_cannot_have_grown_on_a_base(
    tmp_path, official, config, draw, changes, K_f, message
):
    """Of fewer layers, or of another width; what it grew on nobody noted."""
    other = dataclasses.replace(config, text=dataclasses.replace(config.text, **changes))
    params = draw(jax.eval_shape(lambda key: init_base(other, key), jax.random.key(0)))
    write_llava(tmp_path / "base", params, other)
    with pytest.raises(ValueError, match=message):
        run(official, "orbax", tmp_path / "out", K=1, K_f=K_f, base=tmp_path / "base")
    assert not (tmp_path / "out").exists()


def test_sharded_files_and_a_mesh(tmp_path, hf, monkeypatch):
    expected = stored(hf)
    monkeypatch.setattr(storage, "SHARD_BYTES", 4000)
    run(hf, "hf", tmp_path / "shards")
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 3 and files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    with plan(tmp_path / "shards", "orbax") as p:
        convert(p, tmp_path / "orbax", mesh=make_mesh(2, 2, 2))
    monkeypatch.undo()
    run(tmp_path / "orbax", "hf", tmp_path / "again")
    assert stored(tmp_path / "again") == expected


def test_original_layout_with_its_tower_apart(tmp_path, hf, config):
    source = original(tmp_path / "original", hf, tower=tmp_path / "clip")
    with plan(source, "orbax", vision_source=tmp_path / "clip") as p:
        assert set(p.source.ignored) == {
            "text_model.embeddings.token_embedding.weight",
            "logit_scale",
        }
        convert(p, tmp_path / "orbax")
    found, params = read_llava(tmp_path / "orbax")
    # Its image slots are marked by the first id beyond the vocabulary.
    assert found.image_token_id == 40 and found.text == config.text
    assert found.vision == config.vision
    for path, x in flatten(read_llava(hf)[1]).items():
        np.testing.assert_array_equal(
            np.array(x).view(np.uint16), np.array(flatten(params)[path]).view(np.uint16)
        )
    assert json.loads((tmp_path / "orbax" / "config.json").read_text())["image_aspect_ratio"] == (
        "pad"
    )


def test_means_of_bfloat16_do_not_stop_growing():
    small, large = (Tensor("x", "x", (n, 1), None) for n in (3000, 3001))
    ones = np.ones((3000, 1), ml_dtypes.bfloat16)
    source = Source("", (small,), {"x": "bfloat16"}, lambda _: ones)
    assert (resized(source, [large]).read(large) == 1).all()


def test_original_layout_gets_room_for_the_image_token(tmp_path, hf, config):
    """transformers looks up every id, so the vocabulary grows; new rows are means of the old."""
    source = original(tmp_path / "original", hf, tower=tmp_path / "clip")
    # LLaVA takes its tower's settings and pads, whatever lies beside the weights.
    shutil.copy(hf / "tokenizer.json", source)
    (source / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "size": 24}')
    run(source, "hf", tmp_path / "out", vision_source=tmp_path / "clip")
    processor = json.loads((tmp_path / "out" / "processor_config.json").read_text())
    assert processor["image_processor"]["do_pad"]
    assert processor["image_processor"]["image_mean"] == [*config.vision.image_mean]
    old, (found, params) = read_llava(hf)[1], read_llava(tmp_path / "out")
    assert (found.text.vocab_size, found.image_token_id, found.pad_token_id) == (64, 40, 41)
    assert found.vision == config.vision
    head = np.array(params["text"]["lm_head"]["kernel"]).astype(np.float32)
    np.testing.assert_array_equal(head[:, :40], np.array(old["text"]["lm_head"]["kernel"]))
    x = np.random.default_rng(0).standard_normal((100, 24)).astype(np.float32)
    assert ((x @ head).argmax(1) < 40).all()


def test_what_is_said_of_a_base_is_in_its_configuration(tmp_path, hf):
    source = original(tmp_path / "original", hf, tower=tmp_path / "clip")
    with plan(source, "hf", vision_source=tmp_path / "clip") as p:
        convert(p, tmp_path / "out", extra={"conversation_template": "plain"})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["conversation_template"], config["image_aspect_ratio"]) == ("plain", "pad")


def test_of_another_model_the_tower_alone_is_taken(tmp_path, hf, base, config, draw):
    write_llava(tmp_path / "other", draw(base, seed=5), config, "bfloat16")
    run(hf, "hf", tmp_path / "out", vision_source=tmp_path / "other")
    ours, theirs = stored(hf), stored(tmp_path / "other")
    expected = {n: theirs[n] if n.startswith("vision_tower.") else x for n, x in ours.items()}
    assert stored(tmp_path / "out") == expected
    # An orbax tree is whole.
    run(hf, "orbax", tmp_path / "orbax")
    with pytest.raises(ValueError, match="a vision tower of its own"):
        plan(tmp_path / "orbax", "hf", vision_source=tmp_path / "other").__enter__()


def test_original_layout_with_a_known_tower_embedded(tmp_path, hf, config):
    """As published: the tower has its full size, so the file is a hole behind its header."""
    config = dataclasses.replace(config, vision=VisionConfig())
    source = original(
        tmp_path / "original", hf, mm_vision_tower="openai/clip-vit-large-patch14-336"
    )
    (source / "pytorch_model.bin").unlink()
    header, end = {}, 0
    for tensor in llava_tensors(config):
        span = [end, end := end + 2 * math.prod(tensor.shape)]
        where = {"dtype": "F16", "shape": tensor.shape, "data_offsets": span}
        header[original_name(tensor.name)] = where
    text = json.dumps(header).encode()
    with open(source / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    with plan(source, "orbax") as p:
        assert p.source.ignored == () and p.nbytes == end
        assert (p.config.vision, p.config.text) == (config.vision, config.text)


@pytest.mark.parametrize("trained", [True, False])
def test_a_tower_that_was_trained_along_is_kept(tmp_path, hf, base, config, draw, trained):
    """LLaVA reads the one that a checkpoint has if it says so, else the one that it names."""
    write_llava(tmp_path / "stock", draw(base, seed=5), config, "bfloat16")
    original(tmp_path / "away", tmp_path / "stock", tower=tmp_path / "clip")
    fields = {"unfreeze_mm_vision_tower": trained}
    source = original(tmp_path / "original", hf, **fields)
    run(source, "orbax", tmp_path / "out", vision_source=tmp_path / "clip")
    found, params = read_llava(tmp_path / "out")
    assert found.vision == config.vision
    expected = read_llava(hf if trained else tmp_path / "stock")[1]["vision"]
    jax.tree.map(np.testing.assert_array_equal, params["vision"], expected)


@pytest.mark.parametrize("where", ["/data/clip-vit-large-patch14", "clip-vit-large-patch14-336/"])
def test_a_tower_is_known_by_its_folder_too(tmp_path, hf, where):
    source = original(tmp_path / "original", hf, mm_vision_tower=where)
    assert read_config(source).vision.image_size == (336 if "336" in where else 224)


def test_an_unknown_tower_must_be_given(tmp_path, hf):
    source = original(tmp_path / "original", hf)
    with pytest.raises(ValueError, match="give its folder as the vision source"):
        plan(source, "orbax").__enter__()


def test_a_tower_that_did_not_come_along_must_be_given(tmp_path, hf):
    """As published, without the tower; and never as a list of all its tensors."""
    tower = "openai/clip-vit-large-patch14-336"
    source = original(tmp_path / "original", hf, tower=tmp_path / "clip", mm_vision_tower=tower)
    with pytest.raises(ValueError, match=f"{tower} as --vision_source$"):
        read_llava(source)


def test_tied_head(tmp_path, base, config):
    tied = dataclasses.replace(config, text=dataclasses.replace(config.text, tied_head=True))
    params = {**base, "text": {k: v for k, v in base["text"].items() if k != "lm_head"}}
    write_llava(tmp_path / "hf", params, tied, "float32")
    assert not any("lm_head" in name for name in load_file(tmp_path / "hf/model.safetensors"))
    # A copy may be stored.
    tensors = load_file(tmp_path / "hf/model.safetensors")
    tensors["lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"].copy()
    save_file(tensors, tmp_path / "hf/model.safetensors")
    with plan(tmp_path / "hf", "orbax") as p:
        assert p.source.ignored == ("lm_head.weight",)
        convert(p, tmp_path / "orbax")
    found, read = read_llava(tmp_path / "orbax")
    assert found == tied and "lm_head" not in read["text"]
    # But no other head, which transformers would read.
    tensors["lm_head.weight"][3, 5] += 1
    save_file(tensors, tmp_path / "hf/model.safetensors")
    with pytest.raises(ValueError, match="has a head of its own"):
        read_llava(tmp_path / "hf")


def test_plans_read_no_weights(hf, monkeypatch):
    def reading(self, name):
        raise AssertionError(name)

    monkeypatch.setattr(storage.Weights, "__getitem__", reading)
    with plan(hf, "orbax") as p:
        lines = p.destinations()
    assert ("params/text/layers_0/q_proj/kernel", (24, 40), "bfloat16") in lines


def test_what_is_said_of_the_other_kind_is_refused(hf, official):
    with pytest.raises(ValueError, match="holds a base: K, K_f and a base are said of a twig"):
        plan(hf, "orbax", K=2).__enter__()
    with pytest.raises(ValueError, match="holds a twig, which has no vision tower"):
        plan(official, "orbax", K=1, K_f=3, vision_source=hf).__enter__()


@pytest.mark.parametrize(
    ("to", "message"),
    [("twig-official", "holds a base"), ("torch", "no target format")],
)
def test_targets_that_do_not_fit(hf, to, message):
    with pytest.raises(ValueError, match=message):
        plan(hf, to).__enter__()


def test_a_twig_is_no_base(official):
    with pytest.raises(ValueError, match="holds a twig"):
        plan(official, "hf", K=1, K_f=3).__enter__()


def test_nothing_is_overwritten(tmp_path, hf):
    (tmp_path / "out").mkdir()
    with plan(hf, "orbax") as p, pytest.raises(FileExistsError, match="out is there already"):
        convert(p, tmp_path / "out")


def test_one_of_two_conversions_to_a_folder_gives_way(tmp_path, hf):
    """As when all hosts of a job start with the same one on a disk that they share."""

    def another(nbytes):
        with pytest.raises(FileExistsError, match=r"another process holds .*out\.lock"):
            convert(p, tmp_path / "out")

    with plan(hf, "hf") as p:
        convert(p, tmp_path / "out", seen=another)
        assert verify(p, tmp_path / "out") == []
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]


def test_too_little_room(tmp_path, hf, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with plan(hf, "orbax") as p, pytest.raises(OSError, match="GiB free"):
        convert(p, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_a_failure_leaves_nothing_and_a_rerun_works(tmp_path, hf, to):
    def fail(nbytes):
        raise KeyboardInterrupt

    with plan(hf, to) as p:
        with pytest.raises(KeyboardInterrupt):
            convert(p, tmp_path / "out", seen=fail)
        assert not list(tmp_path.glob("out*"))
        # A killed process cannot clean up; what it left gives way.
        (tmp_path / "out.partial" / "params").mkdir(parents=True)
        convert(p, tmp_path / "out")
        assert verify(p, tmp_path / "out") == []
    assert not list(tmp_path.glob("*.partial"))


def test_a_tokenizer_of_another_vocabulary_fails_before_the_weights(tmp_path, hf):
    source = original(tmp_path / "original", hf, tower=tmp_path / "clip")
    (source / "tokenizer.json").write_text("{}")
    with (
        plan(source, "hf", vision_source=tmp_path / "clip") as p,
        pytest.raises(ValueError, match=r"the ids \[3, 0\]; the model has 40 and 41"),
    ):
        convert(p, tmp_path / "out", tokenizer=load_tokenizer(ASSETS / "base"), seen=pytest.fail)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("unused", [0, 24])
def test_a_tokenizer_gets_the_image_and_padding_tokens(tmp_path, config, draw, llama, unused):
    """And reads all else as before, in transformers' own classes too.

    Also behind words that a padded vocabulary has and the tokenizer does not know.
    """
    words = tests.llama.SIZE + unused
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=words))
    params = draw(jax.eval_shape(lambda key: init_base(config, key), jax.random.key(0)))
    write_llava(tmp_path / "hf", params, config)
    source = original(tmp_path / "original", tmp_path / "hf", tower=tmp_path / "clip")
    for path in llama.iterdir():
        shutil.copy(path, source)
    before = load_tokenizer(source)
    with plan(source, "hf", vision_source=tmp_path / "clip") as p:
        convert(p, tmp_path / "out", tokenizer=load_tokenizer(source))
    after = load_tokenizer(tmp_path / "out")
    (tmp_path / "out" / "config.json").unlink()  # where the tokenizer alone is copied, too
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = [words, words + 1]
    for tokenizer in (after, theirs):
        assert tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == ids
        assert tokenizer.pad_token == "<pad>" and tokenizer.pad_token_id == ids[1]
        for text in ("USER: the cat  is", " cat", "  the", "a</s>USER", "</s> b", "\n12", "ü"):
            assert tokenizer.encode(text) == before.encode(text), text
    asked = after.encode("USER: <image>\nWhat")
    assert asked.count(ids[0]) == 1 and theirs.encode("USER: <image>\nWhat") == asked


def test_verification_finds_a_changed_value(tmp_path, hf):
    with plan(hf, "hf") as p:
        convert(p, tmp_path / "out")
        tensors = load_file(tmp_path / "out/model.safetensors")
        tensors["vision_tower.pre_layrnorm.bias"][3] += 1
        save_file(tensors, tmp_path / "out/model.safetensors")
        assert verify(p, tmp_path / "out") == ["vision_tower.pre_layrnorm.bias"]


def launcher(*arguments, most=None, **variables):
    """most: bytes that a file may have."""
    code = "import sys; from launch.convert import main; from launch import run; run(main)"
    if most is not None:
        limit = (most, most)
        code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, {limit}); {code}"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", **variables},
    )


def test_the_launcher(tmp_path, hf):
    arguments = "--source", hf, "--to", "orbax", "--out", tmp_path / "out", "--verify"
    # Accelerators are not asked for: this one is busy, or not there.
    done = launcher(*arguments, JAX_PLATFORMS="tpu")
    assert done.returncode == 0, done.stderr
    assert "every checksum equal" in done.stdout
    done = launcher("--source", hf, "--to", "hf", "--dry_run")
    assert done.returncode == 0, done.stderr
    leaves = len(jax.tree.leaves(read_llava(hf)[1]))
    assert done.stdout.count(" -> ") == leaves


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        # And no folder is made that is called like one.
        (["--to", "orbax", "--out", "gs://bucket/out"], "gs://bucket/out is no local folder"),
        (["--to", "hf", "--out", "out", "--mesh", "1,1,1"], "goes with --to orbax alone"),
        (["--to", "orbax", "--out", "out", "--mesh", "1,1,1,1"], "takes numbers data,fsdp,tensor"),
    ],
)
def test_flags_that_mean_nothing_here(hf, flags, message):
    done = launcher("--source", hf, *flags)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_a_full_disk(tmp_path, hf, to):
    """A limit on the size of files stands in for the disk."""
    done = launcher("--source", hf, "--to", to, "--out", tmp_path / "out", most=30000)
    assert done.returncode == 1 and "convert: cannot write" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out*"))


def test_a_hub_id_without_network(tmp_path):
    done = launcher("--source", "nobody/nothing", "--to", "orbax", "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "no folder nobody/nothing, and the hub does not give it" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_index(tmp_path, hf):
    where = dict.fromkeys(load_file(hf / "model.safetensors"), "a.safetensors")
    (hf / "model.safetensors").rename(hf / "a.safetensors")
    where["language_model.model.layers.9.mlp.up_proj.weight"] = "a.safetensors"
    (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(ValueError, match=r"puts .*layers\.9.* in a\.safetensors: not there"):
        plan(hf, "orbax").__enter__()
