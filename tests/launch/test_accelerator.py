"""The accelerator's suite, as small as it goes, and what becomes of parts that fail."""

import json
import re
import sys
import time
from functools import partial

import pytest

from launch.parts import Part, run_parts
from tests.launch.process import ROOT, launch

accelerator = partial(launch, "accelerator")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The suite's folder after a run of its benchmark, and what was printed."""
    out = tmp_path_factory.mktemp("accelerator")
    weights = "--weights=calibrated:0.574"
    done = accelerator("--tiny", "--parts", "benchmark", "--out", out, weights)
    log = out / "benchmark.log"
    assert done.returncode == 0, log.read_text() if log.is_file() else done.stderr
    return out, done.stdout


def test_the_summary_holds_everything(tiny):
    out, printed = tiny
    text = (out / "README.md").read_text()
    assert text.strip() == printed.strip()
    assert text.count("| passed |") == 1 and '"jaxlib"' in text
    for part in ("calibrated: of random weights, for TokAR 0.574", "predicted", "Vision tower"):
        assert part in text


def test_a_calibrated_benchmark(tiny):
    content = json.loads((tiny[0] / "benchmark.json").read_text())
    reached = content["calibration"]
    assert abs(reached["tokar"] - 0.574) <= 0.01 and abs(reached["mean_drafted"] - 1.4) <= 0.05
    assert content["settings"]["weights"] == "calibrated" and content["settings"]["compiled_cold"]
    assert content["memory_bytes"] > 0 < content["product_tflops"]
    plain, ssd = content["results"]
    assert (plain["way"], ssd["way"]) == ("plain", "ssd")
    # The calibrating batch itself.
    assert (ssd["tokar"], ssd["mean_drafted"]) == (reached["tokar"], reached["mean_drafted"])
    assert ssd["agreement"] == 1 and plain["agreement"] is None
    for row in (plain, ssd):
        assert row["predicted_relspd"] > 0 and row["cached_call_s"] > 0
        assert min(row["floor_share"], row["prefill_share"], row["vision_share"]) > 0
    assert plain["predicted_relspd"] == 1
    assert ssd["peak_bytes"] > plain["peak_bytes"] > 0


def test_what_it_runs_is_there():
    named = re.findall(r"tests/[\w/]+\.py", (ROOT / "launch" / "accelerator.py").read_text())
    assert named and all((ROOT / path).is_file() for path in named)


def test_an_unknown_part_is_named():
    done = accelerator("--parts", "parity,speed")
    assert done.returncode == 1
    assert (
        "no part 'speed'; there are: parity, equality, benchmark, matrix, int8, transformers"
        in done.stderr
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modes", "plain,fast"], "no mode 'fast'; there are: plain, ttp, ssd, ttp_ssd, tree"),
        (["--modes", "plain,ttp", "--avg_retained", "4,1"], "no number of kept tokens gives 1 "),
        (
            ["--max_new_tokens", "9,500"],
            "tokens and answers of 500 are more than the 512 positions",
        ),
        (["--text_tokens", "2"], "text_tokens"),  # there is text before and behind the image
        (["--plot", "x.foo"], "--plot draws .png, .svg or .pdf, not x.foo"),
        (["--json", "docs"], "Is a directory: 'docs'"),
        (["--profile", "README.md/x"], "File exists: 'README.md'"),
    ],
)
def test_a_benchmark_refuses_what_cannot_be_before_anything_is_timed(arguments, message):
    done = launch("benchmark", "--preset", "toy", "--verbosity", 0, *arguments)
    assert done.returncode == 1 and message in done.stderr
    assert "Traceback" not in done.stderr and "compiling for" not in done.stderr


def test_full_sizes_are_not_for_cpus(tmp_path):
    done = accelerator("--out", tmp_path / "out")
    assert done.returncode == 1 and "--tiny tries this on one" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(tmp_path):
    """And a hanging part's own processes end with it."""
    late = tmp_path / "late"
    child = f"import time, pathlib; time.sleep(1.5); pathlib.Path({str(late)!r}).touch()"
    hang = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    code = {
        "good": "print('well')",
        "bad": "import sys; print('ill'); sys.exit(3)",
        "hanging": hang,
        "last": "import os; print(os.environ['GIVEN'])",
    }
    # The hanging part gets a hundredth of the time, less than its child sleeps.
    share = {"good": 1, "bad": 1, "hanging": 0.5, "last": 49.5}
    given = {"last": {"GIVEN": "a variable"}}
    parts = [
        Part(name, [sys.executable, "-c", text], share[name], given.get(name, {}))
        for name, text in code.items()
    ]
    began = time.monotonic()
    outcomes = run_parts(parts, 60, tmp_path, tmp_path)
    assert time.monotonic() - began < 30
    assert [o.outcome for o in outcomes] == ["passed", "failed", "out of time", "passed"]
    logs = [o.log.read_text().strip() for o in outcomes]
    assert (logs[0], logs[1], logs[3]) == ("well", "ill", "a variable")
    time.sleep(1.5)
    assert not late.exists()


def test_parts_beside_each_other(tmp_path):
    """Each waits for the other; both may take the larger share."""
    code = (
        "import pathlib, sys, time\n"
        "pathlib.Path(sys.argv[1]).touch()\n"
        "while not pathlib.Path(sys.argv[2]).exists(): time.sleep(0.02)"
    )
    one, other = (
        Part(name, [sys.executable, "-c", code, name, waits], share, beside=beside)
        for name, waits, share, beside in (("a", "b", 1, False), ("b", "a", 3, True))
    )
    last = Part("last", [sys.executable, "-c", ""], 1)
    outcomes = run_parts([one, other, last], 40, tmp_path, tmp_path)
    assert [o.outcome for o in outcomes] == ["passed"] * 3
    assert outcomes[0].limit == outcomes[1].limit == pytest.approx(30, abs=0.5)
