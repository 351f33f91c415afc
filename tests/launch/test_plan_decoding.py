"""launch.plan_decoding as a user runs it."""

import json
from functools import partial

import pytest

from tests.launch.process import ROOT, launch

plan_decoding = partial(launch, "plan_decoding")


def test_the_documentation_s_command(tmp_path):
    """The one that does without a compiler of the devices."""
    page = (ROOT / "docs" / "performance.md").read_text()
    (command,) = [line for line in page.splitlines() if "plan_decoding --topology h100" in line]
    result = plan_decoding(*command.split()[3:], "--json", tmp_path / "new" / "plan.json")
    assert result.returncode == 0, result.stderr[-2000:]
    plans = json.loads((tmp_path / "new" / "plan.json").read_text())
    lines = result.stdout.splitlines()
    assert lines[0].split()[:3] == ["topology", "rows", "mode"]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    for line, plan in zip(lines[1:], plans, strict=False):
        told = line.split()
        which = [plan["topology"], str(plan["rows"]), plan["mode"]]
        assert told[:4] == [*which, "compiler" if plan["compiled"] else "shapes"]
        assert told[-2] == f"{1e3 * plan['token']:.2f}"
        # The page has the command's plans, as compiled, with the same floors.
        row, *prompt = [row for row in rows if row[:3] == which]
        assert row[4] == f"{int(told[6]):,}"
        assert all(row[3] == f"{plan['prompt']['floor'] / 1e6:,.0f}" for row in prompt)
    begin = lines.index("Prompts, without their images, with first drafts:") + 2
    for line, plan in zip(lines[begin:], plans, strict=False):
        told = line.split()
        assert told[:3] == [plan["topology"], str(plan["rows"]), plan["mode"]]
        assert told[-2] == f"{1e3 * plan['prompt']['total']:.2f}"
    assert "PREDICTED, not measured" in result.stdout


def test_a_tree(tmp_path):
    """Checking sixty drafts is arithmetic for sixty, and weights are read as for one."""
    shape = ["--gamma", 4, "--children", 10, "--expanded", 10, "--nodes", 60]
    path = tmp_path / "plan.json"
    result = plan_decoding("--topology", "h100:1", "--batch", 1, *shape, "--json", path)
    assert result.returncode == 0, result.stderr[-2000:]
    plain, tree = (one["iteration"] for one in json.loads(path.read_text()))
    assert 60 < tree["flops"] / plain["flops"] < 70
    assert 1 < tree["floor"] / plain["floor"] < 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "h100:8", "--tensor", "3"], "does not use the 8 devices"),
        (["--topology", "h100:1", "--preset", "llava"], "no preset 'llava'"),
        (["--topology", "h100:1", "--modes", "quick"], "no mode 'quick'"),
        (
            ["--topology", "h100:1", "--modes", "ttp", "--avg_retained", "0"],
            "tokens gives 0 visual",
        ),
    ],
)
def test_mistakes_are_named(arguments, message):
    result = plan_decoding(*arguments)
    assert result.returncode == 1 and message in result.stderr
    assert "Traceback" not in result.stderr
