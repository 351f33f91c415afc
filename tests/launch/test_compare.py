"""The comparison with transformers, of the smallest preset, as the accelerator's suite runs it."""

import json

import pytest

from tests.launch.process import python


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(results, summary) of a run in float32: it would have failed where answers differ."""
    out = tmp_path_factory.mktemp("accelerator")
    given = ("--tiny", "--parts=transformers", "--weights=mistaken:0.2:10")
    done = python("-m", "launch.accelerator", *given, "--out", out)
    log = out / "transformers.log"
    assert done.returncode == 0, log.read_text() if log.is_file() else done.stderr
    return json.loads((out / "transformers.json").read_text()), (out / "README.md").read_text()


def test_every_way_is_measured_or_named(tiny):
    content, text = tiny
    ways = {(r["engine"], r["way"]): r for r in content["results"]}
    assert list(ways) == [
        *(("twig_jax", mode) for mode in ("plain", "ttp", "ssd", "ttp_ssd")),
        *(("transformers", way) for way in ("plain", "prompt lookup", "assisted")),
    ]
    assert [(f["engine"], f["way"]) for f in content["failed"]] == [("transformers", "early exit")]
    assert "transformers early exit does not work: AttributeError" in text
    assert all(f" {way}  " in text for _, way in ways)
    for (_, way), row in ways.items():
        assert 0 < row["first_token_ms"] < 64e3 / row["tokens_per_s"]
        assert min(row["token_ms"], row["floor_share"], row["relspd"]) > 0
        assert row["agreement"] == (None if way == "ttp" else 1)
    plain = ways["transformers", "plain"]
    assert plain["relspd"] == plain["tokens_per_step"] == 1
    assert {"jax", "torch", "transformers"} <= set(content["versions"])


def test_the_assistant_drafts_what_the_twig_drafts(tiny):
    content, _ = tiny
    steps = {(r["engine"], r["way"]): r["tokens_per_step"] for r in content["results"]}
    # But for θ, which transformers moves.
    ssd = steps["twig_jax", "ssd"]
    assert ssd > 1.3 and steps["transformers", "assisted"] == pytest.approx(ssd, rel=0.25)


def test_other_answers_are_noticed():
    """An error in float32, in lower precision the share of tokens before the first difference."""
    code = (
        "import numpy as np, sys; from absl import flags; from launch import compare\n"
        "flags.FLAGS(sys.argv)\n"
        "ways = [('transformers', 'plain'), ('twig_jax', 'plain'), ('twig_jax', 'ttp')]\n"
        "tokens = [[5, 6, 7, 8], [5, 9, 7, 8], [1, 2, 3, 4]]\n"
        "answers = {way: np.array(row) for way, row in zip(ways, tokens)}\n"
        "print(list(compare.agreements(answers).values()))\n"
    )
    done = python("-c", code, "--dtype=bfloat16")
    assert done.stdout.strip() == "[1.0, 0.25, None]", done.stderr
    done = python("-c", code)
    assert done.returncode == 1
    assert "twig_jax plain answers other than transformers plain from token 1" in done.stderr


def test_without_torch(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    done = python("-m", "launch.compare", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == (
        "compare: transformers' LLaVA needs torch; install it with pip install -e '.[test]'\n"
    )


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ("llava-1.5-8b", "no preset 'llava-1.5-8b'; there are:"),
        ("toy", "no number of kept tokens gives 1 visual tokens a layer"),  # a ninth of its nine
    ],
)
def test_what_cannot_be_compared_is_told_first(preset, message):
    done = python("-m", "launch.compare", f"--preset={preset}")
    assert done.returncode == 1 and message in done.stderr
    assert "Traceback" not in done.stderr
