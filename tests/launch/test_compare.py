"""The comparison with transformers, of the smallest preset."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOY = ["--preset=toy", "--avg_retained=4", "--repeats=1"]


def launch(module, *arguments, **variables):
    return subprocess.run(
        [sys.executable, "-m", f"launch.{module}", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The accelerator's folder after its part with transformers."""
    out = tmp_path_factory.mktemp("accelerator")
    done = launch("accelerator", "--tiny", "--parts", "transformers", "--out", out)
    log = out / "transformers.log"
    assert done.returncode == 0, log.read_text() if log.is_file() else done.stderr
    return out


def test_every_way_is_measured_or_named(tiny):
    """And in float32 all have answered alike, or the run would have failed."""
    content = json.loads((tiny / "transformers.json").read_text())
    ways = {(r["engine"], r["way"]): r for r in content["results"]}
    failed = {(f["engine"], f["way"]) for f in content["failed"]}
    expected = [("twig_jax", mode) for mode in ("plain", "ttp", "ssd", "ttp_ssd")]
    # What transformers' further ways do is transformers' affair.
    expected += [("transformers", way) for way in ("plain", "prompt lookup", "assisted")]
    assert [*ways, *failed] == [*expected, ("transformers", "early exit")]
    for way, row in ways.items():
        assert 0 < row["first_token_ms"] < 64e3 / row["tokens_per_s"]
        assert row["token_ms"] > 0 < row["floor_share"]
        assert row["agreement"] == (None if way[1] == "ttp" else 1)
    plain = ways["transformers", "plain"]
    assert plain["relspd"] == plain["tokens_per_step"] == 1
    assert {"jax", "torch", "transformers"} <= set(content["versions"])
    text = (tiny / "README.md").read_text()
    assert "prompt lookup" in text and "transformers early exit does not work: Attr" in text


def test_the_assistant_drafts_what_the_twig_drafts(tiny):
    content = json.loads((tiny / "transformers.json").read_text())
    assert abs(content["calibration"]["tokar"] - 0.574) <= 0.01
    steps = {(r["engine"], r["way"]): r["tokens_per_step"] for r in content["results"]}
    assisted, ssd = steps["transformers", "assisted"], steps["twig_jax", "ssd"]
    # But for θ, which transformers moves.
    assert ssd > 1.3 and assisted == pytest.approx(ssd, rel=0.25)


def test_lower_precision_reports_agreement():
    few = ["--dtype=bfloat16", "--text_tokens=8", "--max_new_tokens=4", "--threads=1"]
    done = launch("compare", *TOY, *few, "--json", "-")
    assert done.returncode == 0, done.stderr[-2000:]
    content = json.loads(done.stdout)
    assert (
        content["settings"] | {"dtype": "bfloat16", "text_tokens": 8, "threads": 1}
        == (content["settings"])
    )
    assert all(0 <= row["agreement"] <= 1 for row in content["results"] if row["way"] != "ttp")


def test_without_torch(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    done = launch("compare", *TOY, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.strip().endswith("needs torch; install it with pip install -e '.[test]'")


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--preset=llava-1.5-8b", "no preset 'llava-1.5-8b'"),
        ("--weights=calibrated:often", "calibrated takes TOKAR:DRAFTS"),
        ("--weights=trained", "weights are random or calibrated"),
        ("--avg_retained=1", "R̄"),
        ("--max_new_tokens=1", "2"),
    ],
)
def test_bad_flags_are_named(flag, said):
    done = launch("compare", *TOY, flag)
    assert done.returncode == 1
    assert said in done.stderr and "Traceback" not in done.stderr
