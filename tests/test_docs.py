"""The documentation's Python runs as it stands."""

from tests.launch.process import ROOT, python


def test_decoding_s_examples():
    blocks = (ROOT / "docs" / "decoding.md").read_text().split("```python\n")[1:]
    code = "\n".join(block.split("```")[0] for block in blocks)
    done = python("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 rows x (64 text, 1 images, 32 new)" in done.stdout
