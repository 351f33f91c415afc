"""The documentation's Python runs as it stands, and its commands have flags that there are."""

import json
import re
import shlex
import shutil
from collections import defaultdict
from itertools import pairwise

import pytest

from launch.training import read_config
from tests.launch.process import ROOT, python
from twig_jax.data.digits import ASSETS
from twig_jax.training.overrides import override

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PARSE = """
import importlib, json, sys
from absl import flags
importlib.import_module(sys.argv[1])
for arguments in json.loads(sys.argv[2]):
    flags.FLAGS.unparse_flags()
    left = flags.FLAGS([sys.argv[1], *arguments])[1:]
    assert not left, left
"""


def commands():
    """module -> the arguments that pages give it, in blocks for a shell and in running text."""
    found = defaultdict(list)
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        spans = re.findall(r"`(python -m [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        for line in "\n".join([*blocks, *spans]).splitlines():
            words = shlex.split(line.replace("$seed", "0"), comments=True)
            at = words.index("-m") + 1 if "-m" in words else 0
            if at and words[at].startswith(("launch.", "tests.tools.")):
                found[words[at]].append(words[at + 1 :])
    return found


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


@pytest.mark.parametrize("module", sorted(commands()))
def test_commands_have_flags_that_there_are(module):
    asked = commands()[module]
    done = python("-c", PARSE, module, json.dumps(asked))
    assert done.returncode == 0, done.stderr[-2000:]
    for words in asked:
        if "--config" in words and words[words.index("--config") + 1] != "FILE":
            changes = [value for name, value in pairwise(words) if name == "--set"]
            override(read_config(str(ROOT / words[words.index("--config") + 1])), changes)
