"""The models and the folders they are stored in, against transformers' LLaVA, in float32."""

import dataclasses
import functools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twig_jax.checkpoints.config_files import write_config
from twig_jax.checkpoints.llava import read_llava, write_llava
from twig_jax.checkpoints.tables import canonical, llava_tensors
from twig_jax.config import LlavaConfig, TextConfig, VisionConfig
from twig_jax.data.digits import ASSETS
from twig_jax.decoding.generate import Generator, Request, Settings
from twig_jax.models.clip import Projector, VisionTower
from twig_jax.models.llama import DecoderLayer
from twig_jax.models.llava import Llava, init_base
from twig_jax.presets import PRESETS, preset

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what torch and transformers warn of is theirs
    import torch
    import transformers

TOLERANCE = 1e-4  # of the largest value


def tiny(
    heads=4,
    kv_heads=2,
    head_dim=6,
    feature=-2,
    vision_layers=3,
    theta=10000.0,
    vocab=50,
    class_token=False,
    tied=False,
) -> LlavaConfig:
    return LlavaConfig(
        vision=VisionConfig(
            image_size=24,
            patch_size=8,
            hidden_size=16,
            intermediate_size=24,
            num_layers=vision_layers,
            num_heads=2,
            feature_layer=feature,
            class_token=class_token,
        ),
        text=TextConfig(
            vocab_size=vocab,
            hidden_size=8 * heads,
            intermediate_size=40,
            num_layers=2,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rope_theta=theta,
            tied_head=tied,
        ),
        image_token_id=3,
        pad_token_id=0,
    )


def weights(config, draw, seed=0):
    return draw(jax.eval_shape(lambda key: init_base(config, key), jax.random.key(0)), seed)


def theirs(folder):
    """transformers' model of a folder; fails unless every tensor found its place."""
    model, report = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not any(report.values()), report
    return model.eval()


def inputs(config, images, seed=0):
    """(ids [2, P], pixels [2, images, H, W, 3]): rows of one length, slots at other places."""
    rng = np.random.default_rng(seed)
    M, size = config.vision.num_tokens, config.vision.image_size
    rows = []
    for before in (1, 4):
        words = rng.integers(4, config.text.vocab_size, 8)
        slots = np.full(images * M, config.image_token_id)
        rows.append(np.concatenate([words[:before], slots, words[before:]]))
    return np.stack(rows), rng.standard_normal((2, images, size, size, 3), np.float32)


@functools.partial(jax.jit, static_argnums=0)
def our_logits(config, params, ids, pixels):
    model, variables = Llava(config), {"params": params}
    visual = model.apply(variables, pixels, method="encode")
    x = model.apply(variables, ids, ids == config.image_token_id, visual, method="merge")
    B, S = ids.shape
    positions = jnp.broadcast_to(jnp.arange(S), (B, S))
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((S, S), bool)), (B, S, S))
    x, _ = model.apply(variables, x, positions, causal, method="run")
    return model.apply(variables, x, method="logits")


def channels_first(pixels):
    """[B, I, H, W, 3] -> torch [B·I, 3, H, W]."""
    return torch.from_numpy(pixels.reshape(-1, *pixels.shape[2:]).transpose(0, 3, 1, 2).copy())


@torch.no_grad()
def their_logits(model, ids, pixels):
    images = channels_first(pixels) if pixels.size else None
    return model(input_ids=torch.from_numpy(ids), pixel_values=images).logits.numpy()


def error(found, expected):
    """Largest difference relative to the largest value."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / np.abs(expected).max()


def drawn(seed):
    """A random configuration, and 1 or 2 images."""
    rng = np.random.default_rng(seed)
    kv_heads, group, vision_layers = rng.integers(1, 4), rng.choice([1, 2, 4]), rng.integers(1, 4)
    # transformers takes 0 for "not given" and fails.
    features = [i for i in range(-vision_layers - 1, vision_layers + 1) if i]
    config = tiny(
        heads=int(kv_heads * group),
        kv_heads=int(kv_heads),
        head_dim=int(rng.choice([2, 6, 8, 16])),
        feature=int(rng.choice(features)),
        vision_layers=int(vision_layers),
        theta=float(rng.choice([100.0, 10000.0, 500000.0])),
        vocab=int(rng.integers(20, 61)),
        class_token=bool(rng.integers(2)),
        tied=bool(rng.integers(2)),
    )
    return config, int(rng.integers(1, 3))


@pytest.mark.parametrize("seed", range(8))
def test_whole_model(tmp_path, draw, seed):
    config, images = drawn(seed)
    params = weights(config, draw, seed)
    write_llava(tmp_path, params, config, "float32")
    ids, pixels = inputs(config, images, seed)
    expected = their_logits(theirs(tmp_path), ids, pixels)
    assert expected.std() > 0.1
    assert error(our_logits(config, params, ids, pixels), expected) <= TOLERANCE


@pytest.fixture(scope="module")
def pair(tmp_path_factory, draw):
    """(configuration, our parameters, their model) of the same weights."""
    config = tiny()
    params = weights(config, draw)
    folder = tmp_path_factory.mktemp("pair")
    write_llava(folder, params, config, "float32")
    return config, params, theirs(folder)


def test_text_alone(pair):
    config, params, model = pair
    ids, pixels = inputs(config, 0)
    found = our_logits(config, params, ids, jnp.zeros((2, 1, *pixels.shape[2:])))
    assert error(found, their_logits(model, ids, pixels)) <= TOLERANCE


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("text", "rope_theta", 9000.0),
        ("text", "rms_norm_eps", 2e-3),
        ("vision", "feature_layer", -1),
        ("vision", "layer_norm_eps", 1e-2),
    ],
)
def test_the_comparison_notices_a_wrong_setting(pair, part, field, value):
    config, params, model = pair
    changed = dataclasses.replace(getattr(config, part), **{field: value})
    wrong = dataclasses.replace(config, **{part: changed})
    ids, pixels = inputs(config, 1)
    assert error(our_logits(wrong, params, ids, pixels), their_logits(model, ids, pixels)) > (
        3 * TOLERANCE
    )


def test_folders_that_transformers_writes(pair, tmp_path):
    """Their save_pretrained is read back to the same configuration and the same bits."""
    config, params, model = pair
    model.save_pretrained(tmp_path)
    found, read = read_llava(tmp_path)
    assert found == config
    jax.tree.map(np.testing.assert_array_equal, read, jax.device_get(params))


def test_a_mistral_decoder(tmp_path, draw):
    """Of LLaVA's recipe on Mistral, as transformers' own conversions of BakLLaVA."""
    config = tiny(heads=4, kv_heads=2)
    write_llava(tmp_path, weights(config, draw), config, "float32")
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    content["text_config"]["model_type"] = "mistral"
    path.write_text(json.dumps(content))
    model = theirs(tmp_path)
    assert type(model.model.language_model).__name__ == "MistralModel"
    found, params = read_llava(tmp_path)
    ids, pixels = inputs(config, 1)
    assert error(our_logits(found, params, ids, pixels), their_logits(model, ids, pixels)) <= (
        TOLERANCE
    )


@torch.no_grad()
def test_vision_tower(pair):
    config, params, model = pair
    _, pixels = inputs(config, 1)
    states = model.model.vision_tower(channels_first(pixels), output_hidden_states=True)
    expected = states.hidden_states[config.vision.feature_layer][:, 1:].numpy()
    tower = VisionTower(config.vision)
    assert error(tower.apply({"params": params["vision"]}, pixels[:, 0]), expected) <= TOLERANCE


@torch.no_grad()
def test_projector(pair):
    config, params, model = pair
    x = np.random.default_rng(0).standard_normal((2, 9, 16), np.float32)
    expected = model.model.multi_modal_projector(torch.from_numpy(x)).numpy()
    projector = Projector(config.text.hidden_size)
    assert error(projector.apply({"params": params["projector"]}, x), expected) <= TOLERANCE


@torch.no_grad()
def test_decoder_layer(pair):
    config, params, model = pair
    S, decoder = 11, model.model.language_model
    x = np.random.default_rng(0).standard_normal((2, S, config.text.hidden_size), np.float32)
    # Positions with gaps, as after pruning.
    positions = np.stack([np.arange(S) * 2, np.arange(S) + np.arange(S) // 4])
    rope = decoder.rotary_emb(torch.from_numpy(x), torch.from_numpy(positions))
    hidden = torch.full((S, S), -torch.inf).triu(1)[None, None]
    expected = decoder.layers[1](
        torch.from_numpy(x), attention_mask=hidden, position_embeddings=rope
    )
    ours = tuple(jnp.asarray(angles.numpy()) for angles in rope)
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((S, S), bool)), (2, S, S))
    layer = {"params": params["text"]["layers_1"]}
    found, _ = DecoderLayer(config.text).apply(layer, x, ours, causal)
    assert error(found, expected.numpy()) <= TOLERANCE


@torch.no_grad()
def test_greedy_generation(pair):
    """Prompts of unlike lengths in one batch: text alone, one image, two images."""
    config, params, model = pair
    rng = np.random.default_rng(0)
    M, size = config.vision.num_tokens, config.vision.image_size
    requests = []
    for images, words in ((0, 3), (1, 9), (2, 5), (1, 2)):
        text = rng.integers(4, config.text.vocab_size, words)
        ids = np.concatenate([[1], np.full(images * M, config.image_token_id), text])
        pixels = rng.standard_normal((images, size, size, 3), np.float32) if images else None
        ids = ids.astype(np.int32)
        requests.append(Request(ids, ids == config.image_token_id, pixels))
    results = Generator(config, params).generate(requests, Settings("plain", max_new_tokens=12))
    for request, result in zip(requests, results, strict=True):
        ids = torch.from_numpy(request.ids[None].astype(np.int64))
        shown = {}
        if request.pixels is not None:
            shown["pixel_values"] = channels_first(request.pixels[None])
        answer = model.generate(
            **shown,
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
        )[0, ids.shape[1] :].tolist()
        ended = [config.eos_token_id] if result.stopped_by == "eos" else []
        assert answer == result.tokens.tolist() + ended


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_folders(pair, tmp_path, dtype):
    """Stored in half precision, computed in float32: both sides see the same rounded weights."""
    config, params, _ = pair
    write_llava(tmp_path, params, config, dtype)
    _, read = read_llava(tmp_path, "float32")
    ids, pixels = inputs(config, 1)
    expected = their_logits(theirs(tmp_path), ids, pixels)
    assert error(our_logits(config, read, ids, pixels), expected) <= TOLERANCE


def test_tokenizer_and_processor_of_a_folder(draw, tmp_path):
    """What is needed to use a folder without this package comes with it."""
    config, _ = preset("digits")
    vision = dataclasses.replace(config.vision, hidden_size=16, intermediate_size=16, num_layers=1)
    text = dataclasses.replace(config.text, hidden_size=16, intermediate_size=16, num_layers=1)
    config = dataclasses.replace(config, vision=vision, text=text)
    write_llava(tmp_path, weights(config, draw), config, "float32", ASSETS / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    page = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    batch = processor(
        images=page, text="USER: <image>\nWhere is seven? ASSISTANT:", return_tensors="pt"
    )
    assert (batch["input_ids"] == config.image_token_id).sum() == config.vision.num_tokens
    normal = (page / 255 - vision.image_mean) / np.array(vision.image_std)
    np.testing.assert_allclose(
        batch["pixel_values"][0].numpy().transpose(1, 2, 0), normal, atol=1e-5
    )
    model = theirs(tmp_path)
    settings = model.generation_config
    assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (1, 2, 0)
    ids, pixels = batch["input_ids"].numpy(), np.asarray(normal, np.float32)[None, None]
    expected = their_logits(model, ids, pixels)
    found = our_logits(config, read_llava(tmp_path)[1], ids, pixels)
    assert error(found, expected) <= TOLERANCE


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_transformers_tensors(name, tmp_path):
    """Names and shapes at full size, without memory."""
    config, _ = preset(name)
    write_config(tmp_path, config, "float16")
    settings = transformers.LlavaConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(settings)
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    found = {name: shapes[spelled] for name, spelled in canonical(shapes)[0].items()}
    assert found == {tensor.name: tensor.shape for tensor in llava_tensors(config)}
