"""The documentation's Python runs as it stands."""

import json
import shutil

from tests.launch.process import ROOT, python
from twig_jax.data.digits import ASSETS


def code(page):
    """All Python of a page, in its order."""
    blocks = (ROOT / "docs" / page).read_text().split("```python\n")[1:]
    return "\n".join(block.split("```")[0] for block in blocks)


def test_decoding_s_examples():
    done = python("-c", code("decoding.md"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 rows x (64 text, 1 images, 32 new)" in done.stdout


def test_training_s_examples(tmp_path, monkeypatch):
    """With a small base's files for LLaVA's, and few conversations."""
    base = tmp_path / "models" / "7b"
    shutil.copytree(ASSETS / "base", base, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = json.loads((base / "config.json").read_text())
    settings["text_config"]["max_position_embeddings"] = 4096
    (base / "config.json").write_text(json.dumps(settings))
    (tmp_path / "images").symlink_to(ROOT / "docs")
    turns = [
        {"from": "human", "value": "<image>\nWhat digit is in row B, column 3?"},
        {"from": "gpt", "value": "five"},
    ]
    rows = [{"id": str(i), "image": "page.png", "conversations": turns} for i in range(40)]
    (tmp_path / "llava_v1_5_mix665k.json").write_text(json.dumps(rows))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code("training.md"), names)
    assert len(names["source"]) == 40
    assert names["batch"]["tokens"].shape == (8, 4096)
