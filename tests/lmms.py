"""The plug-in for lmms-eval, by its own command line, on pages of digits.

python -m pytest tests/lmms.py

Its name keeps it out of other runs: it needs twig_jax[lmms]. `.ci/lmms_eval` installs and runs it.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import datasets
import pytest
from lmms_eval.api.instance import Instance
from PIL import Image

import twig_jax
from twig_jax.data.questions import example
from twig_jax.lmms.model import TwigJax

PAGES = 8
TASKS = {
    # The usual form: one image, columns of the data set named in the task.
    "pages": """
        doc_to_visual: page
        doc_to_text: question
        generation_kwargs: {max_new_tokens: 64, temperature: 0, num_beams: 1, top_p: null}
    """,
    # Several images where the text has them, sampled; ended by a text and by a number of tokens.
    "pairs": """
        doc_to_visual: !function functions.visuals
        doc_to_text: !function functions.text
        generation_kwargs:
            {max_new_tokens: 24, temperature: 0.9, top_p: 0.95, do_sample: true, until: [" and"]}
    """,
}
FUNCTIONS = """
def visuals(doc):
    return [doc["page"], doc["page"].rotate(180)]


def text(doc):
    return "Of the pages <image>\\nand <image>\\n, look at the first. " + doc["question"]
"""


@pytest.fixture(scope="module")
def asked():
    """[(page, question)] of the data set."""
    return [example("test", 0, index) for index in range(PAGES)]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, asked):
    """A folder with the tasks and their data set."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = {
        "page": [Image.fromarray(page.image) for page, _ in asked],
        "question": [question.text for _, question in asked],
        "answer": [question.answer for _, question in asked],
    }
    features = datasets.Features(
        page=datasets.Image(), question=datasets.Value("string"), answer=datasets.Value("string")
    )
    data = folder / "data.parquet"
    datasets.Dataset.from_dict(rows, features).to_parquet(data)
    (folder / "functions.py").write_text(FUNCTIONS)
    for name, more in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"""
        task: {name}
        dataset_path: parquet
        dataset_kwargs: {{data_files: {{test: {data}}}}}
        test_split: test
        output_type: generate_until
        doc_to_target: answer
        metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
        metadata: [version: 0]
        {more.strip()}
        """)
    return folder


def lmms_eval(tasks, out, *more):
    """What the command prints and writes: (text, results, {task: answers})."""
    command = [sys.executable, "-m", "lmms_eval", "--model", "twig_jax", "--include_path", tasks]
    command += ["--output_path", out, "--log_samples", *more]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(out / "cache")}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(done.stdout)
    # lmms-eval exits with 0 whatever happened: the files tell.
    (written,) = out.glob("*_results.json")
    answers = {
        path.stem.partition("_samples_")[2]: [
            json.loads(line)["filtered_resps"] for line in path.read_text().splitlines()
        ]
        for path in out.glob("*_samples_*.jsonl")
    }
    return done.stdout, json.loads(written.read_text()), answers


def test_answers_and_accuracy_are_the_engine_s(tasks, tmp_path, asked):
    printed, results, answers = lmms_eval(
        tasks,
        tmp_path,
        *("--model_args", "checkpoint=digits,mode=ttp_ssd,avg_retained=16,seed=3"),
        *("--tasks", "pages,pairs", "--batch_size", str(PAGES)),
    )
    model = twig_jax.load("digits")
    settings = replace(model.settings, avg_retained=16, max_new_tokens=64)
    alone = [model.generate(q.text, [page.image], settings).text for page, q in asked]
    assert answers["pages"] == alone
    right = sum(answer == q.answer for answer, (_, q) in zip(alone, asked, strict=True)) / PAGES
    assert results["results"]["pages"]["exact_match,none"] == right > 0.7
    # It prints as many decimals as its figures need.
    row = re.search(r"\|pages\|none  \|     0\|exact_match\|↑  \| *([\d.]+)\|", printed)
    assert row is not None and float(row[1]) == pytest.approx(right, abs=0.005)
    assert 0.2 < results["throughput"]["avg_tokar"] <= 1

    drawn = {"temperature": 0.9, "top_p": 0.95, "seed": 3, "stop": (" and",), "max_new_tokens": 24}
    functions = {}
    exec(FUNCTIONS, functions)
    for (page, q), answer in zip(asked, answers["pairs"], strict=True):
        doc = {"page": Image.fromarray(page.image), "question": q.text}
        text, images = functions["text"](doc), functions["visuals"](doc)
        assert model.generate(text, images, settings, **drawn).text == answer


def ask(model, docs, text=None, repeats=1, **kwargs):
    """Answers of a model to questions about documents (page, question)."""
    model.task_dict["pages"] = {"test": docs}
    instances = [
        Instance(
            "generate_until",
            (
                text or q.text,
                {"max_new_tokens": 64, **kwargs},
                lambda doc: [doc[0]],
                i,
                "pages",
                "test",
            ),
            idx=0,
            metadata={"task": "pages", "doc_id": i, "repeats": repeats},
        )
        for i, (_, q) in enumerate(docs)
    ]
    return [answer.text for answer in model.generate_until(instances * repeats)]


@pytest.fixture(scope="module")
def model():
    return TwigJax(avg_retained=16)


class Damaged(list):
    """Documents of which the first cannot be read."""

    def __getitem__(self, at):
        if at == 0:
            raise OSError("image file is truncated")
        return super().__getitem__(at)


@pytest.fixture(scope="module")
def page(asked):
    return Image.fromarray(asked[0][0].image)


def test_a_question_that_cannot_be_asked_has_an_empty_answer(model, page, asked):
    q = asked[0][1]
    alone = model.model.generate(q.text, [page], model.settings, max_new_tokens=64)
    assert ask(model, [("missing.png", q), (page, q), ({"video": 1}, q)]) == ["", alone.text, ""]
    # As a data set that cannot decode an image.
    damaged = Damaged([(page, q), (page, q)])
    assert ask(model, damaged) == ["", alone.text]
    long = SimpleNamespace(text=q.text * 200)
    assert ask(model, [(page, long), (page, q)]) == ["", alone.text]
    with pytest.raises(
        ValueError, match=r"none of the questions can be asked, as pages, document 0"
    ):
        ask(model, [("missing.png", q)] * 2)
    with pytest.raises(ValueError, match="marker"):
        ask(model, [(page, q)], text="<image> or <image>?")


def test_repeats_are_drawn_anew(model, page, asked):
    """Unlike answers, and the same ones another time."""
    (first, second), again = (
        ask(model, [(page, asked[2][1])], repeats=2, temperature=5.0) for _ in range(2)
    )
    assert first != second and again == [first, second]


def test_what_is_not_there_says_so(model, page, asked, monkeypatch):
    with pytest.raises(ValueError, match=r"no model argument modus; .* selector, adaptive"):
        TwigJax(modus="ttp")
    with pytest.raises(ValueError, match="no number of kept tokens gives 3"):
        TwigJax(avg_retained=3)
    with pytest.raises(ValueError, match="no selector 'twigs'"):
        TwigJax(selector="twigs")
    with pytest.raises(ValueError, match="no beam search"):
        ask(model, [(page, asked[0][1])], num_beams=2)
    with pytest.raises(NotImplementedError, match="that generate"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="one round"):
        model.generate_until_multi_round([])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process"):
        TwigJax()
