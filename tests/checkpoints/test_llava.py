"""LLaVA folders: reading is the exact inverse of writing, and says all that is wrong at once."""

import dataclasses
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from twig_jax.checkpoints.config_files import read_config
from twig_jax.checkpoints.llava import read_llava, write_llava
from twig_jax.checkpoints.tables import flatten, llava_tensors, unflatten
from twig_jax.config import CLIP_MEAN, CLIP_STD, LlavaConfig, TextConfig, VisionConfig
from twig_jax.presets import preset

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def equal(a, b):
    """Same tree, same types, same bits."""
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for path, x in a.items():
        x, y = np.asarray(x), np.asarray(b[path])
        assert x.dtype == y.dtype and x.shape == y.shape, path
        np.testing.assert_array_equal(x.view(np.uint8), y.view(np.uint8), err_msg=path)


def rounded(tree, dtype):
    return jax.tree.map(lambda x: np.ascontiguousarray(np.asarray(x).astype(DTYPES[dtype])), tree)


def contiguous(tree):
    return jax.tree.map(np.ascontiguousarray, tree)


@pytest.fixture
def folder(tmp_path, base, config):
    """A float32 folder of `base`."""
    write_llava(tmp_path, base, config, "float32")
    return tmp_path


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(tmp_path, base, config, dtype):
    write_llava(tmp_path, base, config, dtype)
    found, params = read_llava(tmp_path)
    assert found == config
    equal(contiguous(params), rounded(base, dtype))
    # And once more: what was read writes the same file.
    write_llava(tmp_path / "again", params, found, dtype)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_reading_into_a_type(folder, base, dtype):
    _, params = read_llava(folder, dtype)
    equal(contiguous(params), rounded(base, dtype))


@st.composite
def configs(draw):
    size = st.integers(1, 3)
    vision_heads, heads, kv = draw(size), draw(size), draw(size)
    return LlavaConfig(
        vision=VisionConfig(
            image_size=draw(size) * 4,
            patch_size=4,
            hidden_size=vision_heads * draw(size),
            intermediate_size=draw(size),
            num_layers=draw(size),
            num_heads=vision_heads,
            feature_layer=draw(st.sampled_from([-2, -1, 1])),
        ),
        text=TextConfig(
            vocab_size=draw(st.integers(5, 9)),
            hidden_size=draw(st.integers(1, 5)),
            intermediate_size=draw(size),
            num_layers=draw(size),
            num_heads=heads * kv,
            num_kv_heads=kv,
            head_dim=2 * draw(size),
        ),
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(config=configs(), seed=st.integers(0, 99), dtype=st.sampled_from(sorted(DTYPES)))
def test_any_shape_round_trips(tmp_path_factory, config, seed, dtype):
    rng = np.random.default_rng(seed)
    params = unflatten(
        {
            t.path: rng.standard_normal(t.our_shape).astype(DTYPES[dtype])
            for t in llava_tensors(config)
        }
    )
    folder = tmp_path_factory.mktemp("any")
    write_llava(folder, params, config, dtype)
    found, read = read_llava(folder)
    assert found == config
    equal(contiguous(read), params)


def test_orientation(folder, base, config):
    """By hand, without the table: torch's layouts."""
    stored = load_file(folder / "model.safetensors")
    kernel = np.asarray(base["text"]["layers_1"]["k_proj"]["kernel"])
    name = "language_model.model.layers.1.self_attn.k_proj.weight"
    np.testing.assert_array_equal(stored[name], kernel.T)
    patch = np.asarray(base["vision"]["patch_embedding"])  # [rows, columns, channels, width]
    found = stored["vision_tower.embeddings.patch_embedding.weight"]
    assert found.shape == (16, 3, 8, 8)
    assert found[5, 2, 1, 7] == patch[1, 7, 2, 5]
    assert len(stored) == len(jax.tree.leaves(base))


def rename(folder, change):
    stored = load_file(folder / "model.safetensors")
    save_file({change(name): x for name, x in stored.items()}, folder / "model.safetensors")


def published(name):
    """As in the published checkpoints, made with transformers 4."""
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def state_dict(name):
    """As the modules are called inside transformers 5."""
    for old, new in (
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head", "lm_head"),
        ("vision_tower.", "model.vision_tower.vision_model."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ):
        if name.startswith(old):
            return name.replace(old, new)
    raise AssertionError(name)


@pytest.mark.parametrize("style", [published, state_dict])
def test_other_spellings(folder, base, style):
    rename(folder, style)
    equal(contiguous(read_llava(folder)[1]), rounded(base, "float32"))


def test_constants_beside_the_weights_are_ignored(folder, base):
    stored = load_file(folder / "model.safetensors")
    stored["vision_tower.vision_model.embeddings.position_ids"] = np.zeros((1, 10), np.float32)
    stored["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(5, np.float32)
    save_file(stored, folder / "model.safetensors")
    equal(contiguous(read_llava(folder)[1]), rounded(base, "float32"))


def shard(folder, parts=3):
    """Splits the single file as transformers does; returns the shards' names."""
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {
        name: f"model-{i % parts + 1:05}-of-{parts:05}.safetensors" for i, name in enumerate(stored)
    }
    for file in set(where.values()):
        save_file({n: x for n, x in stored.items() if where[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return sorted(set(where.values()))


def test_shards(folder, base):
    shard(folder)
    equal(contiguous(read_llava(folder)[1]), rounded(base, "float32"))


def as_torch(folder, change=lambda tensors: tensors, **options):
    """Replaces the single file by torch's own format; returns it."""
    path = folder / "model.safetensors"
    tensors = {name: torch.from_numpy(x) for name, x in load_file(path).items()}
    path.unlink()
    torch.save(change(tensors), folder / "pytorch_model.bin", **options)
    return folder / "pytorch_model.bin"


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_s_format_and_its_older_one(folder, base, zipped):
    as_torch(folder, _use_new_zipfile_serialization=zipped)
    equal(contiguous(read_llava(folder)[1]), rounded(base, "float32"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_file_cut_short(folder, zipped):
    path = as_torch(folder, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(ValueError, match=rf"{path.name} is damaged or cut short"):
        read_llava(folder)


@pytest.mark.parametrize(
    "stored", [lambda tensors: {"step": 3, "state_dict": tensors}, lambda tensors: [tensors]]
)
def test_a_training_state_is_no_model(folder, stored):
    as_torch(folder, stored)
    with pytest.raises(ValueError, match="holds other things than tensors"):
        read_llava(folder)


def test_missing_shards_are_named(folder):
    names = shard(folder)
    for name in names[1:]:
        (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=", ".join(names[1:])):
        read_llava(folder)


def test_a_tensor_in_two_shards(folder):
    names = shard(folder)
    shutil.copy(folder / names[0], folder / names[1])
    with pytest.raises(ValueError, match="which another file has too"):
        read_llava(folder)


def test_a_shard_cut_short(folder):
    path = folder / shard(folder)[1]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{path.name} is damaged or cut short"):
        read_llava(folder)


def test_everything_wrong_is_listed_at_once(folder):
    stored = load_file(folder / "model.safetensors")
    prefix = "language_model.model.layers"
    stored[f"{prefix}.1.self_attn.query.weight"] = stored.pop(f"{prefix}.1.self_attn.q_proj.weight")
    stored[f"{prefix}.3.mlp.up_proj.weight"] = stored[f"{prefix}.2.mlp.up_proj.weight"]
    del stored["multi_modal_projector.linear_2.bias"]
    stored["vision_tower.pre_layrnorm.bias"] = np.zeros(17, np.float32)
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit its configuration") as error:
        read_llava(folder)
    own, wrong = f"{prefix}.1.self_attn.q_proj.weight", f"{prefix}.1.self_attn.query.weight"
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        "missing multi_modal_projector.linear_2.bias",
        f"missing {own} (nearest: {wrong})",
        f"unexpected {wrong} (nearest: {own})",
        f"unexpected {prefix}.3.mlp.up_proj.weight (nearest: {prefix}.2.mlp.up_proj.weight)",
        "vision_tower.pre_layrnorm.bias has shape [17], expected [16]",
    ]


def test_of_many_tensors_that_are_wrong_some_are_named(folder):
    """As of another model's weights."""
    stored = load_file(folder / "model.safetensors")
    stored = {f"{name}.absmax": x for name, x in stored.items()}
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"\n  and \d+ more like that\n  unexpected") as error:
        read_llava(folder)
    lines = str(error.value).splitlines()
    assert len(lines) == 23 and lines[-1] == f"  and {len(stored) - 10} more like that"


def test_one_tensor_under_two_spellings(folder):
    stored = load_file(folder / "model.safetensors")
    stored["lm_head.weight"] = stored["language_model.lm_head.weight"]
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(ValueError, match="are the same tensor"):
        read_llava(folder)


def test_integer_weights(folder):
    stored = load_file(folder / "model.safetensors")
    save_file({name: x.astype(np.int8) for name, x in stored.items()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="as I8; only float32, float16, bfloat16"):
        read_llava(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_files(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        read_llava(folder)


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config"):
        read_llava(tmp_path / "nowhere")


def test_broken_json(folder):
    (folder / "config.json").write_text('{"model_type": "llava"')
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        read_llava(folder)


def test_parameters_that_do_not_fit_are_not_written(tmp_path, base, config):
    text = dataclasses.replace(config.text, num_layers=2)
    with pytest.raises(ValueError, match="unexpected text/layers_2/q_proj/kernel"):
        write_llava(tmp_path / "out", base, dataclasses.replace(config, text=text))
    assert not (tmp_path / "out").exists()


def test_values_too_large_for_the_type(tmp_path, base, config):
    large = jax.tree.map(lambda x: x * 1e6, base)
    infinite = jax.tree.map(lambda x: np.full_like(x, np.inf), base)
    write_llava(tmp_path / "infinite", infinite, config, "float16")
    assert all(np.isinf(x).all() for x in jax.tree.leaves(read_llava(tmp_path / "infinite")[1]))
    some = jax.tree.map(lambda x: np.where(np.arange(x.shape[-1]) == 0, np.inf, x), large)
    with pytest.raises(ValueError, match="that float16 cannot hold"):
        write_llava(tmp_path / "some", some, config, "float16")
    with pytest.raises(ValueError, match="that float16 cannot hold"):
        write_llava(tmp_path / "out", large, config, "float16")
    write_llava(tmp_path / "out", large, config, "bfloat16")


def test_padding_may_be_the_first_token(tmp_path, base, config):
    config = dataclasses.replace(config, pad_token_id=0)
    write_llava(tmp_path, base, config, "float32")
    assert read_config(tmp_path) == config


def test_unknown_type(tmp_path, base, config):
    with pytest.raises(ValueError, match="float32, float16, bfloat16"):
        write_llava(tmp_path, base, config, "int8")


def test_an_interrupted_write_leaves_the_old_file(folder, base, config, monkeypatch):
    before = (folder / "model.safetensors").read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("twig_jax.checkpoints.storage.save_file", full)
    with pytest.raises(OSError, match="No space"):
        write_llava(folder, base, config, "float16")
    assert (folder / "model.safetensors").read_bytes() == before
    assert not list(folder.glob("*.partial"))


def edit(folder, change):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_older_fields_of_the_configuration(folder, config):
    """rope_theta beside the others, and the name that image_token_index has as an attribute."""

    def change(content):
        text = content["text_config"]
        text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]
        text["rope_scaling"] = None
        text["eos_token_id"] = [text["eos_token_id"]]
        (folder / "generation_config.json").unlink()
        content["pad_token_id"] = text.pop("pad_token_id")
        content["image_token_id"] = content.pop("image_token_index")

    edit(folder, change)
    assert read_llava(folder)[0] == config


def test_rotary_angles_under_their_older_name(folder, config):
    def change(content):
        content["text_config"]["rope_scaling"] = content["text_config"].pop("rope_parameters")

    edit(folder, change)
    assert read_llava(folder)[0] == config


def test_scaled_rotary_angles_are_refused_beside_others(folder):
    """Where both names are there, transformers goes by the older one."""
    scaled = {"rope_type": "linear", "factor": 4.0}
    edit(folder, lambda content: content["text_config"].update(rope_scaling=scaled))
    with pytest.raises(ValueError, match=r"rope_type is 'linear', supported is 'default'"):
        read_llava(folder)


@pytest.mark.parametrize("layout", ["original", "hf"])
@pytest.mark.parametrize(
    ("fields", "positions"),
    [({"sliding_window": 512}, 512), ({"sliding_window": None}, 32768), ({}, 4096)],
)
def test_no_prompt_is_longer_than_a_sliding_window(tmp_path, layout, fields, positions):
    """Up to there a window is no matter; what is left out is as Mistral's decoder has it."""
    content = {"max_position_embeddings": 32768, **fields}
    if layout == "original":
        content["architectures"] = ["LlavaMistralForCausalLM"]
        content["mm_vision_tower"] = "openai/clip-vit-large-patch14-336"
    else:
        content = {"model_type": "llava", "text_config": {"model_type": "mistral", **content}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    text = read_config(tmp_path).text
    assert (text.max_positions, text.num_kv_heads, text.intermediate_size) == (positions, 8, 14336)


def test_weights_that_were_quantised_are_refused_by_name(folder):
    """And not as a list of tensors."""
    method = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    edit(folder, lambda content: content.update(quantization_config=method))
    with pytest.raises(ValueError, match="quantization_config is 'bitsandbytes', supported"):
        read_llava(folder)


def test_images_are_of_whole_patches(folder):
    edit(folder, lambda content: content["vision_config"].update(image_size=13))
    with pytest.raises(ValueError, match=r"vision_config\.image_size is 13, .* multiples of patch"):
        read_llava(folder)


def test_a_configuration_that_leaves_all_to_defaults(folder):
    """llava-1.5-7b as first published says this much and no more."""
    content = {
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": 32000,
        "model_type": "llava",
        "pad_token_id": 32001,
        "text_config": {
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "rms_norm_eps": 1e-05,
            "vocab_size": 32064,
        },
        "vision_config": {
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "model_type": "clip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
        },
    }
    (folder / "config.json").write_text(json.dumps(content))
    for name in ("generation_config.json", "processor_config.json"):
        (folder / name).unlink()
    assert read_config(folder) == preset("llava-1.5-7b")[0]


def test_settings_that_are_not_supported_are_listed_at_once(folder):
    def change(content):
        content["projector_hidden_act"] = "relu"
        content["vision_feature_layer"] = [-2, -5]
        content["vision_config"]["model_type"] = "siglip_vision_model"
        content["text_config"]["attention_bias"] = True
        content["text_config"]["rope_parameters"] = {"rope_type": "llama3", "rope_theta": 5e5}
        content["text_config"]["eos_token_id"] = [2, 3]

    edit(folder, change)
    (folder / "generation_config.json").unlink()
    with pytest.raises(ValueError, match="not supported") as error:
        read_llava(folder)
    named = [line.split(" is ")[0].strip() for line in str(error.value).splitlines()[1:]]
    assert named == [
        "projector_hidden_act",
        "vision_config.model_type",
        "text_config.attention_bias",
        "text_config.rope_parameters.rope_type",
        "vision_feature_layer",
        "text_config.eos_token_id",
    ]


@pytest.mark.parametrize(("layer", "reads"), [(-4, False), (-3, True), (2, True), (3, False)])
def test_the_feature_layer_is_one_there_is(folder, layer, reads):
    edit(folder, lambda content: content.update(vision_feature_layer=layer))
    if reads:
        assert read_llava(folder)[0].vision.feature_layer == layer
    else:
        with pytest.raises(ValueError, match=f"feature_layer is {layer}, the tower has 2 layers"):
            read_llava(folder)


def test_answers_end_as_generation_config_says(folder, config):
    path = folder / "generation_config.json"
    path.write_text('{"eos_token_id": [9]}')
    assert read_llava(folder)[0] == dataclasses.replace(config, eos_token_id=9)
    path.write_text("{}")
    assert read_llava(folder)[0] == config
    # Where it says nothing, config.json's own setting comes before its text_config's.
    edit(folder, lambda content: content.update(eos_token_id=5))
    assert read_llava(folder)[0].eos_token_id == 5
    edit(folder, lambda content: content.update(eos_token_id=[5, 6]))
    with pytest.raises(ValueError, match=r"\n  eos_token_id is \[5, 6\]"):
        read_llava(folder)
    edit(folder, lambda content: content.update(eos_token_id=None))
    assert read_llava(folder)[0] == config
    edit(folder, lambda content: content["text_config"].update(eos_token_id=None))
    with pytest.raises(ValueError, match="eos_token_id is None, supported is one integer"):
        read_llava(folder)
    path.write_text('{"eos_token_id": [6, 9]}')
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id is \[6, 9\]"):
        read_llava(folder)


def test_pixel_statistics(folder, config):
    """From the processor's file, from the older preprocessor's, or CLIP's."""
    assert read_llava(folder)[0].vision.image_mean == config.vision.image_mean
    (folder / "processor_config.json").unlink()
    vision = read_llava(folder)[0].vision
    assert (vision.image_mean, vision.image_std) == (CLIP_MEAN, CLIP_STD)
    older = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}
    (folder / "preprocessor_config.json").write_text(json.dumps(older))
    assert read_llava(folder)[0].vision.image_std == (1, 2, 3)
    (folder / "preprocessor_config.json").write_text('{"image_mean": null, "image_std": null}')
    assert read_llava(folder)[0].vision == vision


def test_tokenizer_files_are_copied(tmp_path, base, config):
    source = tmp_path / "source"
    source.mkdir()
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        write_llava(tmp_path / "out", base, config, tokenizer=source)
    for name in ("tokenizer.json", "chat_template.json"):
        (source / name).write_text("{}")
    (source / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0]}')
    (source / "README.md").write_text("not copied")
    write_llava(tmp_path / "out", base, config, tokenizer=source)
    copied = {path.name for path in (tmp_path / "out").iterdir()}
    assert copied == {
        "chat_template.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
    }
    # Its own folder may be the source.
    write_llava(tmp_path / "out", base, config, tokenizer=tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
