"""Twig folders: official names, exact inverses, and only on their own base."""

import dataclasses
import json
import warnings

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from twig_jax.checkpoints import storage
from twig_jax.checkpoints.llava import read_llava, write_llava
from twig_jax.checkpoints.tables import flatten
from twig_jax.checkpoints.twig import fingerprint, read_twig, write_twig
from twig_jax.config import GATES, TwigConfig
from twig_jax.models.twig import twig_decoder


@pytest.fixture
def folder(tmp_path, twig, twig_config, base, config):
    """A float32 twig folder."""
    write_twig(tmp_path, twig, twig_config, base, config, "float32")
    return tmp_path


def edit(folder, **changes):
    path = folder / "twig.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("gate", [None, *GATES])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_round_trip(tmp_path, draw, twig, twig_config, base, config, dtype, gate):
    if gate:
        twig_config = dataclasses.replace(twig_config, p_head=True, gate=gate)
        decoder, x = twig_decoder(config.text, twig_config), np.zeros((1, 1, 24))
        shapes = jax.eval_shape(decoder.init, jax.random.key(0), x)["params"]["p_head"]
        twig = {**twig, "p_head": draw(shapes, seed=2)}
    write_twig(tmp_path, twig, twig_config, base, config, dtype)
    found, params = read_twig(tmp_path, base, config)
    assert found == twig_config
    a, b = flatten(twig), flatten(params)
    assert a.keys() == b.keys()
    for path, x in a.items():
        assert b[path].dtype.name == dtype
        np.testing.assert_array_equal(np.asarray(x).astype(b[path].dtype), b[path], err_msg=path)
    write_twig(tmp_path / "again", params, found, base, config, dtype)
    for name in ("model.safetensors", "twig.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("before", [4000, 2**30], ids=["shards", "one file"])
def test_an_interruption_between_shards_leaves_no_mixture(
    tmp_path, twig, twig_config, base, config, monkeypatch, before
):
    """Nothing is read until all is written again; an error before the first shard costs nothing."""

    def write(params):
        write_twig(tmp_path, params, twig_config, base, config, "float32")

    def is_read(params):
        _, found = read_twig(tmp_path, base, config)
        jax.tree.map(np.testing.assert_array_equal, found, params)

    monkeypatch.setattr(storage, "SHARD_BYTES", before)
    write(twig)
    other, left = jax.tree.map(lambda x: -x, twig), 0

    def full(tensors, path, metadata):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError("No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(storage, "SHARD_BYTES", 4000)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "save_file", full)
        with pytest.raises(OSError, match="No space"):
            write(other)
        is_read(twig)
        left = 1
        with pytest.raises(OSError, match="No space"):
            write(other)
    with pytest.raises(FileNotFoundError, match="has no weights"):
        read_twig(tmp_path, base, config)
    write(other)
    is_read(other)


def test_a_full_disk_leaves_no_folder_that_seems_whole(
    tmp_path, twig, twig_config, base, config, monkeypatch
):
    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(storage, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        write_twig(tmp_path, twig, twig_config, base, config, "float32")
    assert not list(tmp_path.iterdir())


def test_official_names(folder, twig, twig_config):
    stored = load_file(folder / "model.safetensors")
    layer = (
        "input_layernorm mlp.down_proj mlp.gate_proj mlp.up_proj post_attention_layernorm "
        "self_attn.k_proj self_attn.o_proj self_attn.q_proj self_attn.v_proj"
    ).split()
    assert sorted(stored) == sorted(
        ["lm_head.weight", "model.norm.weight"]
        + [f"model.layers.{t}.{name}.weight" for t in range(twig_config.T) for name in layer]
    )
    kernel = np.asarray(twig["layers_1"]["gate_proj"]["kernel"])
    np.testing.assert_array_equal(stored["model.layers.1.mlp.gate_proj.weight"], kernel.T)


def test_notes(folder, base, config):
    notes = json.loads((folder / "twig.json").read_text())
    assert notes == {
        "version": 1,
        "K": 1,
        "T": 2,
        "K_f": 3,
        "p_head": None,
        "base_fingerprint": fingerprint(config, base, 1),
    }


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("cast", [None, "float16", "bfloat16"])
def test_copies_of_one_base_agree(tmp_path, folder, base, config, stored, cast):
    write_llava(tmp_path / "base", base, config, stored)
    _, copy = read_llava(tmp_path / "base", cast)
    assert fingerprint(config, copy, 1) == fingerprint(config, base, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_twig(folder, copy, config)


def test_a_longer_vocabulary_is_the_same_base(base, config):
    """Published copies pad theirs. How long a prompt may be is no matter either."""
    text = dict(base["text"])
    words = np.asarray(text["embed_tokens"]["embedding"])
    rows = np.concatenate([np.tile(words, (60, 1)), words])  # more than are sampled
    longer = np.concatenate([rows, np.ones((64, words.shape[1]), words.dtype)])
    prints = []
    for table in (rows, longer):
        text["embed_tokens"] = {"embedding": table}
        sized = dataclasses.replace(config.text, vocab_size=len(table), max_positions=len(table))
        prints.append(
            fingerprint(dataclasses.replace(config, text=sized), {**base, "text": text}, 1)
        )
    assert prints[0] == prints[1]


def more_words(base, config, size):
    """`base` with random rows up to a vocabulary of `size`."""
    rng = np.random.default_rng(0)
    words = np.asarray(base["text"]["embed_tokens"]["embedding"])
    head = np.asarray(base["text"]["lm_head"]["kernel"])
    rows = rng.standard_normal((size - len(words), words.shape[1]), np.float32)
    text = {
        "embed_tokens": {"embedding": np.concatenate([words, rows])},
        "lm_head": {"kernel": np.concatenate([head, rows.T], 1)},
    }
    sized = dataclasses.replace(config.text, vocab_size=size)
    return {**base, "text": {**base["text"], **text}}, dataclasses.replace(config, text=sized)


def test_a_twig_runs_on_a_base_with_a_padded_vocabulary(folder, twig, base, config):
    """Official twigs have 32,000 rows, the bases of Hugging Face 32,064; here 40 and 64."""
    params, bigger = more_words(base, config, 64)
    head = read_twig(folder, params, bigger, allow_base_mismatch=True)[1]["lm_head"]["kernel"]
    own = np.asarray(twig["lm_head"]["kernel"])
    np.testing.assert_array_equal(head[:, :40], own)
    x = np.random.default_rng(0).standard_normal((100, 24), np.float32)
    np.testing.assert_allclose((x @ head)[:, 40:].T, [(x @ own).mean(1)] * 24, atol=1e-5)


def test_a_twig_with_a_padded_vocabulary_runs_on_its_base(
    tmp_path, twig, twig_config, base, config
):
    params, bigger = more_words(base, config, 64)
    head = np.asarray(twig["lm_head"]["kernel"])
    padding = np.ones((24, 24), np.float32)
    padded = {**twig, "lm_head": {"kernel": np.concatenate([head, padding], 1)}}
    write_twig(tmp_path, padded, twig_config, params, bigger, "float32")
    _, read = read_twig(tmp_path, base, config, allow_base_mismatch=True)
    np.testing.assert_array_equal(read["lm_head"]["kernel"], head)


def test_another_vocabulary_does_not_fit(folder, base, config):
    params, bigger = more_words(base, config, 65)
    with pytest.raises(
        ValueError, match=r"lm_head\.weight has shape \[40, 24\], expected \[65, 24\]"
    ):
        read_twig(folder, params, bigger, allow_base_mismatch=True)


def other_seed(base, config, draw):
    return draw(jax.eval_shape(lambda: base), seed=5), config


def tuned(base, config, draw):
    """A little training of everything: noise of 3 % of each tensor's size."""
    noise = draw(jax.eval_shape(lambda: base), seed=5)
    return jax.tree.map(lambda x, n: x + 0.03 * n, base, noise), config


def other_trunk(base, config, draw):
    layer = jax.tree.map(lambda x: x[::-1], base["text"]["layers_0"])
    return {**base, "text": {**base["text"], "layers_0": layer}}, config


def other_projector(base, config, draw):
    return {**base, "projector": jax.tree.map(lambda x: -x, base["projector"])}, config


def other_angles(base, config, draw):
    text = dataclasses.replace(config.text, rope_theta=501.0)
    return base, dataclasses.replace(config, text=text)


OTHERS = [other_seed, tuned, other_trunk, other_projector, other_angles]


@pytest.mark.parametrize("other", OTHERS)
def test_another_base_is_refused(folder, base, config, twig_config, draw, other):
    base, config = other(base, config, draw)
    with pytest.raises(ValueError, match="grew on another base"):
        read_twig(folder, base, config)
    found, _ = read_twig(folder, base, config, allow_base_mismatch=True)
    assert found == twig_config


def test_layers_above_the_trunk_may_differ(folder, base, config, draw):
    text = draw(jax.eval_shape(lambda: base["text"]), seed=5)
    own = {name: base["text"][name] for name in ("embed_tokens", "layers_0")}
    read_twig(folder, {**base, "text": {**text, **own}}, config)


def test_a_twig_that_does_not_name_its_base(folder, base, config, twig_config):
    edit(folder, base_fingerprint=None)
    with pytest.warns(UserWarning, match="does not say what base"):
        found, _ = read_twig(folder, base, config)
    assert found == twig_config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "only version 1"),
        ({"p_head": {"gates": 2}}, "p_head null or"),
        ({"K": None}, "whole numbers for K"),
        ({"K_f": 4}, "K_f=4, L=3"),
        ({"K": 3}, "K=3"),
        ({"T": 3}, r"missing model\.layers\.2\.self_attn\.q_proj\.weight"),
        ({"T": 1}, r"unexpected model\.layers\.1\.self_attn\.q_proj\.weight"),
    ],
)
def test_notes_that_do_not_fit(folder, base, config, changes, message):
    edit(folder, **changes)
    with pytest.raises(ValueError, match=message):
        read_twig(folder, base, config, allow_base_mismatch=True)


@pytest.mark.parametrize("name", ["twig.json", "model.safetensors"])
def test_missing_files(folder, base, config, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        read_twig(folder, base, config)


def test_everything_wrong_is_listed_at_once(folder, base, config):
    stored = load_file(folder / "model.safetensors")
    stored["model.layers.2.mlp.up_proj.weight"] = np.zeros((36, 24), np.float32)
    stored["lm_head.weight"] = np.zeros((39, 24), np.float32)
    del stored["model.norm.weight"]
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing model\.norm\.weight") as error:
        read_twig(folder, base, config)
    for part in (
        "unexpected model.layers.2.mlp.up_proj.weight",
        "shape [39, 24], expected [40, 24]",
    ):
        assert part in str(error.value)


def test_a_twig_that_does_not_fit_is_not_written(tmp_path, twig, base, config):
    with pytest.raises(ValueError, match="missing layers_2"):
        write_twig(tmp_path / "out", twig, TwigConfig(K=0, T=3, K_f=3), base, config)
    with pytest.raises(ValueError, match="K_f=9"):
        write_twig(tmp_path / "out", twig, TwigConfig(K=1, T=2, K_f=9), base, config)
    assert not (tmp_path / "out").exists()
