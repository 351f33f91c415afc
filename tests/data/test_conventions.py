"""How a checkpoint's folder says it reads text and images."""

import json

import pytest

from twig_jax.checkpoints.config_files import is_original
from twig_jax.data.digits import ASSETS
from twig_jax.data.tokens import Conventions, conventions


def write(folder, name, **content):
    (folder / f"{name}.json").write_text(json.dumps(content))


ORIGINAL = {"model_type": "llava_llama", "mm_vision_tower": "openai/clip-vit-large-patch14-336"}
HF = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
MISTRAL = {"model_type": "llava_mistral", "architectures": ["LlavaMistralForCausalLM"]}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ORIGINAL | {"image_aspect_ratio": "pad"}, ("llava", True, "vicuna_v1")),
        (ORIGINAL | {"model_type": "llava"}, ("llava", False, "vicuna_v1")),
        (ORIGINAL | {"image_aspect_ratio": None}, ("llava", False, "vicuna_v1")),
        (ORIGINAL | {"image_aspect_ratio": "square"}, ("llava", False, "vicuna_v1")),
        ({"architectures": ["LlavaLlamaForCausalLM"]}, ("llava", False, "vicuna_v1")),
        # A name of LLaVA's says something, one of the decoder that it was made of nothing.
        (
            ORIGINAL | {"_name_or_path": "liuhaotian/llava-llama-2-7b-chat/"},
            ("llava", False, "llava_llama_2"),
        ),
        (
            ORIGINAL | {"_name_or_path": "meta-llama/Llama-2-7b-chat-hf"},
            ("llava", False, "vicuna_v1"),
        ),
        (ORIGINAL | {"_name_or_path": "mistral-runs/llava"}, ("llava", False, "vicuna_v1")),
        (MISTRAL, ("llava", False, "vicuna_v1")),
        (
            MISTRAL | {"_name_or_path": "liuhaotian/llava-v1.6-mistral-7b"},
            ("llava", False, "mistral_instruct"),
        ),
        (ORIGINAL | {"conversation_template": "plain"}, ("llava", False, "plain")),
        (HF, ("hf", False, "llava_hf")),
        ({"model_type": "llava"}, ("hf", False, "llava_hf")),
        (HF | {"image_aspect_ratio": "pad"}, ("llava", True, "vicuna_v1")),
        (HF | {"image_aspect_ratio": "square"}, ("llava", False, "vicuna_v1")),
        (HF | {"conversation_template": "vicuna_v1"}, ("hf", False, "vicuna_v1")),
        (
            HF | {"image_aspect_ratio": "pad", "conversation_template": "llava_llama_2"},
            ("llava", True, "llava_llama_2"),
        ),
    ],
)
def test_conventions_follow_config_json(tmp_path, config, expected):
    write(tmp_path, "config", **config)
    assert conventions(tmp_path) == Conventions(*expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llava-v1.5-7b", "vicuna_v1"),
        ("llava-Llama-2-13b-chat", "llava_llama_2"),
        ("llava-v1.6-mistral-7b", "mistral_instruct"),
        ("llava-llama-2-7b/checkpoint-100", "llava_llama_2"),
        ("llava-llama-2-7b/final", "vicuna_v1"),
        ("BakLLaVA-1", "mistral_instruct"),  # where nothing else is said
        ("llava-v1.5-7b-mine", "vicuna_v1"),
    ],
)
def test_the_template_follows_an_original_folder_s_name(tmp_path, monkeypatch, name, expected):
    folder = tmp_path / name
    folder.mkdir(parents=True)
    named = "llava-v1.6-mistral-7b" if name.endswith(("1", "mine")) else "meta-llama/Llama-2-7b"
    write(folder, "config", **ORIGINAL, _name_or_path=named)
    assert conventions(folder).template == expected
    monkeypatch.chdir(folder)
    assert conventions(".").template == expected


@pytest.mark.parametrize(
    ("settings", "pad", "edge"),
    [
        ({"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}, False, None),
        ({"size": {"shortest_edge": 384}, "crop_size": {"height": 336, "width": 336}}, False, 384),
        ({"size": 256, "crop_size": 224}, False, 256),
        ({"size": 256}, False, 256),
        ({"do_pad": True, "image_processor_type": "LlavaImageProcessor"}, True, None),
        ({"do_pad": True, "image_processor_type": "CLIPImageProcessor"}, False, None),
        ({"do_pad": False, "image_processor_type": "LlavaImageProcessor"}, False, None),
    ],
)
@pytest.mark.parametrize("newer", [True, False])
def test_conventions_follow_the_image_processor(tmp_path, settings, pad, edge, newer):
    write(tmp_path, "config", **HF)
    if newer:
        write(tmp_path, "preprocessor_config", size=1)
        write(tmp_path, "processor_config", image_processor=settings)
    else:
        write(tmp_path, "preprocessor_config", **settings)
        write(tmp_path, "processor_config", patch_size=14)
    assert conventions(tmp_path) == Conventions("hf", pad, "llava_hf", edge)


def test_the_embedded_base_has_hugging_face_s_conventions():
    assert conventions(ASSETS / "base") == Conventions("hf", False, "llava_hf")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (HF, ("llava", True, "vicuna_v1")),
        (HF | {"conversation_template": "mistral_instruct"}, ("llava", True, "mistral_instruct")),
        (HF | {"image_aspect_ratio": "square"}, ("llava", False, "vicuna_v1")),
        (ORIGINAL | {"image_aspect_ratio": None}, ("llava", False, "vicuna_v1")),
        (MISTRAL, ("llava", False, "vicuna_v1")),
    ],
)
def test_llava_s_own_conventions_may_be_asked_for(tmp_path, config, expected):
    """Of a folder that has them they are what it says."""
    write(tmp_path, "config", **config)
    assert conventions(tmp_path, "llava") == Conventions(*expected)


def test_unknown_conventions_are_refused():
    with pytest.raises(ValueError, match="no conventions 'hf'; there are: llava"):
        conventions(ASSETS / "base", "hf")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            HF | {"conversation_template": "vicuna_v2"},
            r"config\.json: unknown conversation template 'vicuna_v2'.*nearest: vicuna_v1",
        ),
        (HF | {"conversation_template": None}, "unknown conversation template 'None'"),
        (ORIGINAL | {"image_aspect_ratio": "anyres"}, r"config\.json: .*'anyres' cuts an image"),
        (ORIGINAL | {"mm_use_im_start_end": True}, r"config\.json: mm_use_im_start_end"),
    ],
)
def test_conventions_that_are_not_implemented_are_refused(tmp_path, config, message):
    write(tmp_path, "config", **config)
    with pytest.raises(ValueError, match=message):
        conventions(tmp_path)


def test_all_unsupported_settings_of_an_image_processor_are_listed(tmp_path):
    write(tmp_path, "config", **HF)
    settings = {"size": {"height": 9, "width": 9}, "crop_size": {"height": 9, "width": 8}}
    settings |= {"do_center_crop": False, "resample": 2, "rescale_factor": 1 / 127.5}
    settings |= {"do_rescale": False, "do_normalize": False}
    write(tmp_path, "preprocessor_config", **settings)
    with pytest.raises(ValueError, match=r"preprocessor_config\.json asks") as error:
        conventions(tmp_path)
    for key in settings:
        assert f"\n  {key} is " in str(error.value)
    # transformers 5 goes by these too.
    settings = {"size": {"shortest_edge": 9, "longest_edge": 12}, "pad_size": {"height": 16}}
    write(tmp_path, "preprocessor_config", **settings)
    with pytest.raises(ValueError, match=r"(?s)pad_size is .*size is .*shortest_edge alone"):
        conventions(tmp_path)
    settings = {"size": {"shortest_edge": 9, "longest_edge": None}, "pad_size": None}
    write(tmp_path, "preprocessor_config", **settings, crop_size=9)
    assert conventions(tmp_path).shortest_edge is None


@pytest.mark.parametrize(
    ("config", "original"),
    [
        ({"architectures": ["LlavaForConditionalGeneration"], "mm_vision_tower": "clip"}, False),
        ({"architectures": ["LlavaLlamaForCausalLM"]}, True),
        ({"architectures": None, "mm_projector_type": "mlp2x_gelu"}, True),
        ({"model_type": "llava"}, False),
    ],
)
def test_whose_layout_it_is(config, original):
    """The class decides, and LLaVA's own keys where there is none."""
    assert is_original(config) == original


def test_a_folder_without_a_readable_config_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        conventions(tmp_path)
    for content in ("{", "[]"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config\.json is not (a JSON object|JSON)"):
            conventions(tmp_path)
