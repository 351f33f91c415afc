"""The report launcher, as a user runs it."""

import json
from functools import partial

from tests.launch.process import launch
from tests.made_runs import PLAIN, TWIG, evaluation

report = partial(launch, "report")


def test_a_report_of_two_folders(tmp_path):
    for seed in (0, 1):
        evaluation(tmp_path / str(seed), {PLAIN: [1, 1], TWIG: [1, seed]}, seed=seed)
    runs, out = f"{tmp_path / '0'},{tmp_path / '1'}", tmp_path / "report"
    done = report("--runs", runs, "--out", out, "--samples_shown", 1, "--json", "-")
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert content == json.loads((out / "report.json").read_text())
    assert [row["relacc"] for row in content["results"]] == [1, 0.75]
    scores = done.stderr.partition("Scores: digits\n")[2].partition("\n\n")[0]
    # As wide as a terminal shows them: the bar of R̄ stands above its letter.
    assert len({len(line.replace("\u0304", "")) for line in scores.splitlines()}) == 1
    assert "RelAcc %" in done.stderr and "## RelAcc %" in (out / "tables.md").read_text()
    assert (out / "accuracy.png").is_file() and (out / "report.html").is_file()
    elsewhere = tmp_path / "made" / "figures.json"
    done = report("--runs", runs, "--out", out, "--samples_shown", 1, "--json", elsewhere)
    assert done.returncode == 0 and json.loads(elsewhere.read_text()) == content


def test_nothing_is_half_written(tmp_path):
    done = report("--runs", tmp_path, "--out", tmp_path / "report")
    assert done.returncode == 1 and "has no results.json of a benchmark in it" in done.stderr
    assert done.stderr.startswith("report: ") and not (tmp_path / "report").exists()
    done = report("--runs", tmp_path, "--data", "gqa", "--out", tmp_path / "report")
    assert done.returncode == 1 and "--data takes TASK=FOLDER, not gqa" in done.stderr
