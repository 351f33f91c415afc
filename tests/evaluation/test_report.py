"""Reports, on folders made by hand."""

import csv
import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.made_runs import DRAFTLESS, METADATA, PLAIN, RANDOM, SSD, TWIG, evaluation, key
from twig_jax.evaluation.report import evaluation as report
from twig_jax.evaluation.report import page, samples
from twig_jax.evaluation.report.drawings import one_mode, sharpest
from twig_jax.evaluation.report.pooled import by_kind, by_position, grid, kept_shares, pool
from twig_jax.evaluation.report.runs import Tally, kinds, read
from twig_jax.evaluation.report.tables import long_form, tables

FIRST = {PLAIN: [1, 1, 1, 0], TWIG: [1, 1, 0, 0], RANDOM: [0, 1, 0, 0], SSD: [1, 1, 1, 0]}
SECOND = {PLAIN: [1, 0], TWIG: [1, 0], RANDOM: [1, 0], SSD: [1, 0]}


@pytest.fixture
def two(tmp_path):
    """Pages of two seeds, six questions in all."""
    one = evaluation(tmp_path / "0", FIRST)
    return [one, evaluation(tmp_path / "1", SECOND, seed=1, timings=[[5, 30.0, 5, 40.0]])]


def rows(folders):
    return {(row.task, row.way): row for row in pool(read(folders))}


def test_folders_are_pooled(two):
    found = rows(two)
    twig = found["digits", TWIG]
    assert (twig.folders, twig.samples, twig.exact) == (2, 6, 0.5)
    # Plain is right four times, the twig three; the folders' own ratios are 2/3 and 1.
    assert twig.relacc == pytest.approx(3 / 4)
    assert twig.relacc_sd == pytest.approx(1 / 3 / 2**0.5)
    assert 0 <= twig.relacc_low < 0.75 < twig.relacc_high <= 1
    assert twig.relspd == pytest.approx((200 + 90 + 30) / (100 + 60 + 40))
    assert (twig.timed_samples, twig.tokens_per_s) == (3, pytest.approx(320 / 3))
    assert (twig.first_token_s, twig.memory_bytes) == (pytest.approx(5 / 24), 2 << 20)
    assert (twig.tokens, twig.tally.pictured) == (144, 6)
    assert (twig.tokar, twig.mean_accepted, twig.mean_drafted) == (3 / 5, 1, 5 / 3)
    plain = found["digits", PLAIN]
    assert (plain.relacc, plain.relacc_low, plain.tokar, plain.tokens) == (1, 1, None, None)


def test_questions_about_one_image_are_drawn_together(two):
    """Two of each of two pages, of which one alone is read well; or all of one page."""
    for pages, interval in (("aabb", (0, 1)), ("aaaa", (None, None))):
        for path in two[0].glob("digits/*/points.json"):
            points = json.loads(path.read_text())
            grouped = [[value, page] for (value, _), page in zip(points, pages, strict=True)]
            path.write_text(json.dumps(grouped))
        twig = rows(two[:1])["digits", TWIG]
        assert twig.relacc == pytest.approx(2 / 3)
        assert (twig.relacc_low, twig.relacc_high) == interval


def test_one_folder_has_no_spread(two):
    assert rows(two[:1])["digits", TWIG].relacc_sd is None


def test_a_question_of_two_folders_counts_once(tmp_path):
    again = {PLAIN: [1, 1, 1, 0], TWIG: [0, 1, 0, 0]}
    folders = [evaluation(tmp_path / "0", FIRST), evaluation(tmp_path / "1", again)]
    twig = rows(folders)["digits", TWIG]
    assert twig.relacc == pytest.approx((0.5 + 1) / 3)
    assert (twig.folders, twig.samples, twig.unanswered) == (2, 4, 0)
    for folder in folders:
        path = folder / "digits" / TWIG.name / "answers.jsonl"
        first, *others = path.read_text().splitlines()
        lines = [json.dumps(json.loads(first) | {"metadata": {"error": "no image"}}), *others]
        path.write_text("".join(f"{line}\n" for line in lines))
    assert rows(folders)["digits", TWIG].unanswered == 1
    with pytest.raises(ValueError, match="0 is given 2 times"):
        read([folders[0], folders[1], tmp_path / "1" / ".." / "0"])


def test_a_sum_keeps_its_own_ratio(tmp_path):
    for name, total in (("0", 900.0), ("1", 1000.0)):
        figures = {PLAIN: 1000.0, TWIG: total, RANDOM: 0.0}
        points = {PLAIN: [1, 1, 1], TWIG: [1, 0, 0], RANDOM: [0, 0, 0]}
        evaluation(tmp_path / name, points, task="mme", figures=figures)
    found = rows([tmp_path / "0", tmp_path / "1"])
    twig, random = found["mme", TWIG], found["mme", RANDOM]
    assert (random.relacc, random.relacc_low) == (0, None)
    assert (twig.relacc, twig.figures) == (pytest.approx(0.95), {"total": 950.0})
    assert twig.relacc_sd == pytest.approx(0.1 / 2**0.5)
    assert twig.relacc_low is None and twig.relacc_high is None


def test_figures_are_those_of_all_folders(two):
    path = two[0] / "digits" / "results.json"
    content = json.loads(path.read_text())
    for row in content["results"]:
        row["figures"]["of one folder"] = 1.0
    path.write_text(json.dumps(content))
    assert rows(two)["digits", TWIG].figures == {"accuracy": 50.0}


def test_kinds_of_pieces():
    pieces = [" three", "ty", " don", "'t", "\n", "Yes", " 3", "rd", ".", "", "é", "-", "4"]
    assert kinds(["caf", "", "é"]) == ["word", "space", "rest of a word"]
    assert kinds(pieces) == [
        "word", "rest of a word", "word", "rest of a word", "space", "word", "number",
        "rest of a word", "punctuation", "space", "word", "punctuation", "number",
    ]  # fmt: skip


def test_acceptance_by_position_and_kind():
    tally = Tally()
    tally.add(METADATA | {"retained": 2, "kept": [0, 5]})
    # Drafts of 3 and 2 tokens, of which 2 and 1 were accepted, and an iteration without any.
    assert by_position(tally) == {1: 1, 2: 1 / 2, 3: 0}
    assert by_kind(tally) == {"word": 1 / 3, "rest of a word": 1, "number": 1, "punctuation": 0}
    short = Tally()
    short.add(METADATA | {"retained": 0, "drafted": [3, 1, 0], "matched": [2, 1, 0]})
    assert by_position(short) == {1: 1, 2: 1, 3: 0}
    # The same as trees, twice as wide.
    wide = Tally()
    wide.add(METADATA | {"retained": 0, "drafted": [6, 4, 0], "levels": METADATA["drafted"]})
    assert by_position(wide) == by_position(tally)
    none = Tally()
    none.add(METADATA | DRAFTLESS | {"retained": 0})
    assert by_position(none) == {} and none.pictured == 0
    assert (tally + none).kept == {0: 1, 5: 1}


def test_where_kept_tokens_lie(tmp_path):
    # 144 and more are tokens of a second image.
    evaluation(tmp_path / "0", FIRST, kept=(0, 13, 144, 150))
    evaluation(tmp_path / "1", SECOND, seed=1, kept=(13, 143))
    found = rows([tmp_path / "0", tmp_path / "1"])
    expected = np.zeros((12, 12))
    expected[0, 0], expected[1, 1], expected[11, 11] = 4 / 6, 1, 2 / 6
    np.testing.assert_allclose(kept_shares(found["digits", TWIG]), expected)
    assert kept_shares(found["digits", PLAIN]) is None
    assert (grid(576), grid(2880), grid(None)) == (24, None, None)


def test_tables(tmp_path):
    evaluation(tmp_path / "0", FIRST)
    evaluation(tmp_path / "0", {PLAIN: [1, 1], TWIG: [1, 0]}, task="gqa", timings=None)
    found = pool(read([tmp_path / "0"]))
    by_title = {table.title: table for table in tables(found)}
    relacc = by_title["RelAcc %"]
    assert relacc.headers[1:] == [
        "digits all", "digits R̄ 16", "gqa all", "gqa R̄ 16", "mean all", "mean R̄ 16",
    ]  # fmt: skip
    lines = {line[0]: line[1:] for line in relacc.lines}
    assert lines["plain"] == ["100.0", "", "100.0", "", "100.0", ""]
    assert lines["ttp_ssd twig"] == ["", "66.7", "", "50.0", "", "58.3"]
    assert lines["ttp_ssd random"] == ["", "33.3", "", "", "", ""]
    assert [line[0] for line in by_title["TokAR %"].lines] == [
        "ttp_ssd twig",
        "ttp_ssd random",
        "ssd",
    ]
    assert "| ttp_ssd twig |  | 0.25 " not in relacc.markdown()
    assert "| ttp_ssd twig |  | 66.7 |" in relacc.markdown()
    scores = {line[0]: line[1:] for line in by_title["Scores: digits"].lines}
    assert scores["plain"][:4] == ["all", "144", "accuracy 75.0", "100.0"]
    lines = list(csv.DictReader(io.StringIO(long_form(found))))
    assert [(x["task"], x["mode"], x["selector"]) for x in lines[:2]] == [
        ("digits", "plain", ""), ("digits", "ttp_ssd", "twig"),
    ]  # fmt: skip
    assert (lines[1]["relacc"], lines[1]["score"], lines[-1]["relspd"]) == (str(2 / 3), "50.0", "")


def test_one_row_a_selector_and_a_method(tmp_path):
    from twig_jax.evaluation.judge import Way

    ttp, wide = Way("ttp", "twig", 16.0), Way("ttp_ssd", "twig", 48.0)
    evaluation(tmp_path / "0", FIRST | {ttp: [1, 1, 0, 0], wide: [1, 1, 1, 0]})
    found = pool(read([tmp_path / "0"]))
    assert {r.way for r in one_mode(found)} == {ttp, wide, RANDOM}
    assert {r.way for r in sharpest(found)} == {PLAIN, SSD, ttp, TWIG, RANDOM}


def test_the_report(two):
    files, _, content = report.make(two, {}, 3)
    assert {"tables.md", "tables.csv", "report.json", "report.html"} <= files.keys()
    plots = [name for name in files if name.endswith(".png")]
    assert plots == ["accuracy.png", "speed.png", "positions.png", "kinds.png", "kept-digits.png"]
    for name in plots:
        with Image.open(io.BytesIO(files[name])) as image:
            assert image.size[0] > 250
    assert json.loads(files["report.json"]) == content
    assert {"schema", "device", "versions", "settings", "results"} <= content.keys()
    text = files["report.html"].decode()
    # Where they differ, both answers are there.
    assert "plain decoding says: worth 1 &lt;b&gt;" in text
    assert '<span class="draft"> three</span>' in text and '<span class="own"> is</span>' in text
    assert text.count("<h3>") == text.count("<symbol") == 3
    assert text.count('class="patches"') == 3 * 4
    assert "h3,.card p{white-space:pre-line" in text  # questions and answers may have several
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    assert "http" not in text


def test_questions_where_methods_differ_come_first(two):
    evaluations = read(two)
    ways = {"digits": [PLAIN, TWIG, RANDOM]}
    shown = samples.choose(evaluations, ways, {}, 6)
    assert {s.key for s in shown[:2]} == {key(0), key(2)}
    assert len({s.key for s in shown}) == 6
    assert shown[0].points == {PLAIN: 1, TWIG: 1, RANDOM: 0}
    assert shown[0].images[0].shape == (96, 96, 3)
    assert list(shown[0].lines) == [PLAIN, TWIG, RANDOM]


def test_other_images_are_unknown_without_their_folder(tmp_path):
    evaluation(tmp_path / "0", FIRST, task="gqa")
    text = report.make([tmp_path / "0"], {}, 1)[0]["report.html"].decode()
    assert "No images of gqa" in text and "<symbol" not in text
    with pytest.raises(ValueError, match="folders of pope, of which there are no runs"):
        report.make([tmp_path / "0"], {"pope": tmp_path}, 1)


def test_photographs_are_shown_padded_to_a_square(tmp_path):
    evaluation(tmp_path / "0", {PLAIN: [1], TWIG: [0]}, task="gqa")
    (tmp_path / "data" / "images").mkdir(parents=True)
    Image.new("RGB", (600, 300), "red").save(tmp_path / "data" / "images" / "red.png")
    line = {"question_id": key(0).id, "text": key(0).prompt, "image": "red.png"}
    (tmp_path / "llava_gqa_testdev_balanced.jsonl").write_text(json.dumps(line) + "\n")
    (shown,) = samples.choose(read([tmp_path / "0"]), {"gqa": [PLAIN, TWIG]}, {"gqa": tmp_path}, 12)
    (image,) = shown.images
    assert image.shape == (336, 336, 3)
    assert tuple(image[168, 168]) == (255, 0, 0) and tuple(image[0, 0]) == (122, 116, 104)
    line["question_id"] = "another"
    (tmp_path / "llava_gqa_testdev_balanced.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match="has no question"):
        report.make([tmp_path / "0"], {"gqa": tmp_path}, 1)


def test_what_was_not_measured_is_left_out(tmp_path):
    evaluation(tmp_path / "0", {PLAIN: [1, 0]}, timings=None)
    files, drawn, _ = report.make([tmp_path / "0"], {}, 1)
    assert not [name for name in files if name.endswith(".png")]
    assert [table.title for table in drawn] == ["RelAcc %", "Scores: digits"]


def test_patches():
    drawn = page.patches("x", [0, 13], 12)
    assert "M0 0h1v1h-1zM1 1h1v1h-1z" in drawn and 'href="#x"' in drawn
    assert "path" not in page.patches("x", None, 12)


def change(folder, **fields):
    path = folder / "digits" / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def strip(path):
    path.write_text(path.read_text().replace("pieces", "parts"))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: shutil.rmtree(f / "digits"), "has no results.json of a benchmark in it"),
        (lambda f: (f / "digits/plain/answers.jsonl").unlink(), "plain/answers.jsonl is not there"),
        (lambda f: (f / "digits/plain/points.json").write_text("[1]"), "of 1 questions, .* of 2"),
        (lambda f: (f / "digits/plain/points.json").write_text("[1, 0]"), "the same image"),
        (lambda f: strip(f / "digits/plain/answers.jsonl"), "no pieces of question test-1-0"),
        (lambda f: (f / "digits/results.json").write_text("{"), "results.json is no JSON"),
        (lambda f: (f / "digits/results.json").write_text("{}"), "has no device, versions"),
        (lambda f: change(f, results=[{"way": "plain"}]), "has no avg_retained, mode, pruned"),
        (lambda f: change(f, settings={"checkpoint": "other"}), "checkpoint 'digits' and 'other'"),
        (
            lambda f: change(f, settings={"checkpoint": "digits", "max_new_tokens": 9}),
            "max_new_tokens None and 9",
        ),
        (lambda f: change(f, device="1 x gpu"), "speeds on 1 x cpu and 1 x gpu"),
    ],
)
def test_what_does_not_belong_is_refused(two, spoil, said):
    spoil(two[1])
    with pytest.raises((FileNotFoundError, ValueError), match=said):
        read(two)


def test_other_tasks_and_untimed_runs_belong_together(tmp_path):
    """The former with other lengths of answers, the latter from any device."""
    one = evaluation(tmp_path / "0", FIRST)
    settings = {"checkpoint": "digits", "twig": None, "max_new_tokens": 9}
    other = evaluation(
        tmp_path / "1", FIRST, task="gqa", timings=None, device="1 x gpu", settings=settings
    )
    assert [e.device for e in read([one, other])] == ["1 x cpu", "1 x gpu"]
