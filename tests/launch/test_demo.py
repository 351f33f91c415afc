"""The demo, as a user starts it, on few samples."""

import json
import re
from functools import partial

import numpy as np
import pytest
from PIL import Image

from tests.launch.process import launch
from twig_jax.data import digits, questions
from twig_jax.data.digits import ASSETS

demo = partial(launch, "demo")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    few = ("--samples", 4, "--timed_samples", 2, "--repeats", 1, "--batch", 4, "--gamma", 3)
    few = (*few, "--pruned", "0.889")
    result = demo(*few, "--html", folder / "made" / "demo.html", "--json", "-")
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout), result.stderr, (folder / "made" / "demo.html").read_text()


def test_the_results_follow_the_contract(run):
    content, _, _ = run
    assert {"schema", "device", "versions", "settings", "results"} <= content.keys()
    rows = content["results"]
    assert {r["pruned"] for r in rows} == {0.0, 0.889}
    assert {r["mode"] for r in rows} == {"plain", "ssd", "ttp", "ttp_ssd"}
    assert {r["selector"] for r in rows if r["pruned"]} == {"twig", "random", "base_K", "oracle"}
    assert {r["task"] for r in rows} == {"short", "long", "all"}
    keys = [(r["task"], r["pruned"], r["mode"], r["selector"]) for r in rows]
    assert len(set(keys)) == len(keys)
    for row in rows:
        assert row["retained"] == (11 if row["pruned"] else 144)
        assert 0 <= row["exact"] <= 1
    drafted = [r for r in rows if r["mode"] == "ttp_ssd" and r["selector"] == "twig"]
    for row in drafted:
        assert 0 <= row["tokar"] <= 1
        assert row["mean_accepted"] <= row["mean_drafted"] <= 3
        assert row["relspd"] > 0
        assert row["ceiling"] > 0


def test_blank_pages_give_no_answers(run):
    content, printed, _ = run
    assert content["blank_exact"] <= 0.5 and "With the pages blanked" in printed


def test_accelerated_answers_equal_plain_ones(run):
    content, printed, _ = run
    assert content["lossless"] == {"ssd = plain": True, "ttp_ssd = ttp at 88.9%": True}
    assert printed.count("equal") >= 2


def test_the_report_stands_alone(run):
    _, _, html = run
    assert html.count("data:image/png;base64,") == html.count("<symbol") == 2
    assert html.count('class="patches"') == 4
    assert not re.search(r"""(src|href)=["']?(http|//)""", html)
    assert 'class="draft"' in html


def test_one_image(tmp_path):
    page, question = questions.example("test", 0, 3, mix={"cell": 1.0})
    Image.fromarray(page.image).save(tmp_path / "page.png")
    result = demo("--image", tmp_path / "page.png", "--prompt", question.text, "--json", "-")
    assert result.returncode == 0, result.stderr[-2000:]
    content = json.loads(result.stdout)
    assert content["text"]
    assert len(content["kept"]) == 11


@pytest.mark.parametrize("broken", ["missing.png", "corrupt.png"])
def test_a_bad_image_is_named(tmp_path, broken):
    page = digits.page("test", 0, 0)
    Image.fromarray(page.image).save(tmp_path / "whole.png")
    (tmp_path / "corrupt.png").write_bytes((tmp_path / "whole.png").read_bytes()[:300])
    result = demo("--image", tmp_path / broken, "--prompt", "Find the two.")
    assert result.returncode == 1
    assert broken in result.stderr
    assert "Traceback" not in result.stderr


def test_a_bad_budget_is_no_traceback():
    for pruned in ("x", ""):
        result = demo("--pruned", pruned)
        assert result.returncode == 1 and "--pruned takes numbers above 0" in result.stderr
        assert "Traceback" not in result.stderr


def test_growing_the_twig_again(tmp_path):
    result = demo("--grow", "--grow_steps", 1, "--out", tmp_path / "run")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "tokar" in result.stdout
    assert (tmp_path / "run" / "metrics.jsonl").is_file()


def benchmark(*arguments):
    return launch("benchmark", "--checkpoint", "digits", *arguments)


def test_the_benchmark(tmp_path):
    few = "--modes=plain,ttp_ssd --batch=2 --max_new_tokens=3,4 --repeats=1 --gamma=2".split()
    few.append("--int8=twig")
    picture = tmp_path / "benchmark.png"
    profile = tmp_path / "profile.txt"
    files = ("--plot", str(picture), "--profile", str(profile))
    result = benchmark(*few, "--json", "-", *files)
    assert result.returncode == 0, result.stderr[-2000:]
    results = json.loads(result.stdout)
    rows = results["results"]
    cells = [(r["batch"], r["max_new_tokens"], r["way"]) for r in rows]
    assert cells == [(2, n, w) for n in (3, 4) for w in ("plain", "ttp_ssd 88.9%")]
    for row in rows:
        assert 0 < row["vision_ms"] < row["prefill_ms"] <= row["first_token_ms"]
        assert row["relspd"] > 0 and row["tokens_per_s"] > 0
        assert (row["relspd"] == 1) == (row["mode"] == "plain")
        assert (row["tokar"] is None) == (row["mode"] == "plain")
        # Where programs may be on disk already, the first calls load them themselves.
        warm = not results["settings"]["compiled_cold"]
        assert (row["cached_call_s"] is None) == (warm or row["max_new_tokens"] == 4)
        assert row["recompiled"] == 0
    with Image.open(picture) as image:
        assert image.size[0] > 300
    short, _, long, *_ = profile.read_text().split("\n\n")
    for told, way in ((short, "plain, 2 rows, 3"), (long, "plain, 2 rows, 4")):
        assert told.startswith(way)
        lines = [line.split() for line in told.splitlines()[2:]]
        times = [float(line[1]) for line in lines]
        assert times[:-1] == sorted(times[:-1], reverse=True) and sum(times[:-1]) <= times[-1]
        # Parts are told by their places in the model.
        assert any("proj" in line[4] for line in lines[:-1])


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--batch=1,x", "--batch takes whole numbers above 0"),
        ("--modes=ttp", "add it to --modes"),
        ("--tree=2,2", "--tree takes four numbers"),
        ("--weights=calibrated:0.8", "--weights is for a --preset"),
    ],
)
def test_the_benchmark_names_bad_flags(flag, said):
    result = benchmark(flag, "--plot", "picture.png")
    assert result.returncode == 1
    assert said in result.stderr and "Traceback" not in result.stderr


def test_the_shipped_model_reads_pages():
    """Of these pages it reads 92; 59 where pixels are not normalised."""
    from twig_jax import api
    from twig_jax.decoding.settings import Settings
    from twig_jax.evaluation import tasks

    model = api.load()
    samples = tasks.load_samples(model.tokenizer, model.config, 96, task="short")
    results = tasks.answer(
        model.generator, samples, Settings(mode="plain", max_new_tokens=8), batch=16
    )
    right = [tasks.exact(model.tokenizer, s, r) for s, r in zip(samples, results, strict=True)]
    assert np.mean(right) > 0.9
    assert sum(f.stat().st_size for f in ASSETS.rglob("*") if f.is_file()) < 20e6
