"""From conversations to batches: masks, cuts, packing, bad samples, and exact positions."""

import dataclasses
import io
import itertools
import json
import logging
import multiprocessing
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.launch.process import python
from tests.llama import PIECES
from twig_jax.config import LlavaConfig, TextConfig, VisionConfig
from twig_jax.data import conversation, images
from twig_jax.data.digits import ASSETS
from twig_jax.data.instruct import Encoder, InstructBatches
from twig_jax.data.sources import BadSample, DigitsSource, InstructionFile, Sample
from twig_jax.data.tokens import Conventions, load_tokenizer, prompt_ids

TOKENIZER = load_tokenizer(ASSETS / "base")
IMAGE_ID = 3
M = 4  # visual tokens of an image of 8 x 8
CONFIG = LlavaConfig(
    vision=VisionConfig(image_size=8, patch_size=4),
    text=TextConfig(vocab_size=640),
    image_token_id=IMAGE_ID,
    pad_token_id=0,
)
DIGITS = LlavaConfig(
    vision=VisionConfig(image_size=96, patch_size=8),
    text=TextConfig(vocab_size=640),
    image_token_id=IMAGE_ID,
    pad_token_id=0,
)
PADDED = Conventions("llava", True, "vicuna_v1")
CUT_OUT = Conventions("hf", False, "llava_hf")


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (9, 12, 3), np.uint8)


def sample(name, sizes=(3,), marks=(1,), seed=0):
    """A conversation with answers of so many words and so many images in each question."""
    turns = [
        ("<image>\n" * marked + f"What is {name}?", " ".join(["seven"] * size))
        for size, marked in zip(sizes, marks, strict=True)
    ]
    return Sample(str(name), tuple(turns), tuple(picture(seed + n) for n in range(sum(marks))))


class Listed:
    """A source of samples in memory; errors among them are raised."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        if isinstance(self.samples[index], BadSample):
            raise self.samples[index]
        return self.samples[index]


def encoder(tokenizer=TOKENIZER, config=CONFIG, conventions=CUT_OUT, **limits):
    return Encoder(tokenizer, config, conventions, **{"max_tokens": 4096, "max_images": 9} | limits)


def batches(source, conventions=CUT_OUT, config=CONFIG, **options):
    source = Listed(source) if isinstance(source, list) else source
    defaults = {"batch_size": 2, "row_tokens": 128, "row_images": 3}
    return InstructBatches(source, TOKENIZER, config, conventions, **defaults | options)


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def segments_of(batch):
    """(row, slots, images) of every sample in a batch, images as slots of that row."""
    for row, segments in enumerate(batch["segments"]):
        image = 0
        for segment in range(1, segments.max() + 1):
            slots = np.flatnonzero(segments == segment)
            count = batch["is_visual"][row, slots].sum() // M
            yield row, slots, range(image, image + count)
            image += count


def names_of(drawn):
    """The names of the samples in batches, which their first questions end with."""
    for batch in drawn:
        for row, slots, _ in segments_of(batch):
            text = TOKENIZER.decode(batch["tokens"][row, slots])
            yield text.split("What is ")[1].split("?")[0].strip()


# LLaVA's own masking.


def preprocess_v1(text, tokenizer, legacy):
    """LLaVA's llava/train/train.py for one conversation, with one id per image.

    Ids and targets as there: no shift, -100 for what is not learned.
    """

    def tokenizer_image_token(prompt):
        chunks = [tokenizer(chunk).input_ids for chunk in prompt.split("<image>")]
        ids = list(chunks[0])
        for chunk in chunks[1:]:
            ids += [-200, *chunk[1:]]
        return ids

    ids = tokenizer_image_token(text)
    target = np.array(ids)
    sep = " ASSISTANT: "
    cur_len = 1
    target[:cur_len] = -100
    for i, rou in enumerate(text.split("</s>")):
        if rou == "":
            break
        parts = rou.split(sep)
        if len(parts) != 2:
            break
        parts[0] += sep
        round_len = len(tokenizer_image_token(rou))
        instruction_len = len(tokenizer_image_token(parts[0])) - 2
        if i != 0 and not legacy:
            # The tokens that "USER" has more behind a space than behind "</s>": 1 in Llama's
            # vocabulary, which is what stands there.
            more = round_len - len(tokenizer_image_token("</s>" + rou)) + 1
            round_len -= more
            instruction_len -= more
        target[cur_len : cur_len + instruction_len] = -100
        cur_len += round_len
    target[cur_len:] = -100
    return np.array(ids), target, cur_len


# LLaVA's way takes texts apart at the model's name.
SAID = [piece for piece in PIECES if piece != "ASSISTANT:"]
words = st.lists(st.sampled_from([*SAID, "é", "12", "cat"]), min_size=1, max_size=5)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    turns=st.lists(st.tuples(words.map(" ".join), words.map(" ".join)), min_size=1, max_size=4),
    marked=st.booleans(),
)
@pytest.mark.parametrize("legacy", [True, False])
def test_targets_are_llava_s(llama_tokenizers, legacy, turns, marked):
    tokenizer = llama_tokenizers[legacy]
    if marked:
        turns = [("<image>\n" + turns[0][0], turns[0][1]), *turns[1:]]
    shown = (picture(0),) if marked else ()
    found = encoder(tokenizer, conventions=PADDED)(Sample("a", tuple(turns), shown))
    text = conversation.prompt("vicuna_v1", turns)
    ids, target, learned = preprocess_v1(text, tokenizer, legacy)
    assert learned == len(ids)  # what LLaVA calls a tokenization mismatch otherwise
    # Every image's one id there is M here; a target is the next token here.
    repeats = np.where(ids == -200, M, 1)
    expected = np.repeat(np.where(target < 0, -1, target), repeats)
    np.testing.assert_array_equal(found["targets"], [*expected[1:], -1])
    np.testing.assert_array_equal(found["is_visual"], np.repeat(ids == -200, repeats))
    text_ids = found["tokens"][~found["is_visual"]]
    np.testing.assert_array_equal(text_ids, ids[ids != -200])
    assert (found["tokens"][found["is_visual"]] == IMAGE_ID).all()


@pytest.fixture(scope="module")
def llama_tokenizers(llama, tmp_path_factory):
    """LLaVA's tokenizer by the setting `legacy` in its folder."""
    tokenizers = {}
    for legacy in (True, False):
        folder = tmp_path_factory.mktemp("legacy")
        for path in llama.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"legacy": legacy}))
        tokenizers[legacy] = load_tokenizer(folder)
    return tokenizers


# One sample.


@pytest.mark.parametrize("conventions", [PADDED, CUT_OUT])
def test_a_sample_is_the_prompt_of_its_conversation(conventions):
    given = sample("seven", (2, 3), (1, 2))
    found = encoder(conventions=conventions)(given)
    text = conversation.prompt(conventions.template, given.turns)
    ids, visual = prompt_ids(TOKENIZER, text, IMAGE_ID, M, 3, tokenize=conventions.tokenize)
    np.testing.assert_array_equal(found["tokens"], ids)
    np.testing.assert_array_equal(found["is_visual"], visual)
    # "seven seven</s>" and "seven seven seven</s>", each predicted by the token before.
    targets, at = found["targets"], np.flatnonzero(found["targets"] >= 0)
    assert TOKENIZER.decode(targets[at]).split() == "seven seven</s> seven seven seven</s>".split()
    np.testing.assert_array_equal(targets[at], ids[at + 1])
    assert targets[-1] == -1
    for pixels, image in zip(found["pixels"], given.images, strict=True):
        expected = images.preprocess(images.load_image(image), 8, pad=conventions.pad)
        shown = images.normalize(pixels, CONFIG.vision.image_mean, CONFIG.vision.image_std)
        np.testing.assert_array_equal(shown, expected)


def test_a_cut_never_goes_through_an_image():
    given = sample("a cat", (2, 5), (1, 2))
    whole = encoder()(given)
    visual = whole["is_visual"]
    (first, *_), last = np.flatnonzero(whole["targets"] >= 0), len(visual)
    for limit in range(2, last + 2):
        if limit <= first + 1:
            with pytest.raises(BadSample, match=f"a cat: no answer begins within {limit} tokens"):
                encoder(max_tokens=limit)(given)
            continue
        found = encoder(max_tokens=limit)(given)
        length = len(found["tokens"])
        kept = found["is_visual"].sum()
        assert kept % M == 0 and len(found["pixels"]) == kept // M
        # As long as can be: the next token is beyond the limit, or of an image that ends beyond.
        end = visual[:length].sum() // M
        begin = np.flatnonzero(visual)[end * M] if end < 3 else None
        assert length == min(limit, last) or (length == begin and length + M > limit)
        for name in ("tokens", "is_visual"):
            np.testing.assert_array_equal(found[name], whole[name][:length])
        np.testing.assert_array_equal(found["targets"][:-1], whole["targets"][: length - 1])
        assert found["targets"][-1] == -1
        np.testing.assert_array_equal(found["pixels"], whole["pixels"][: len(found["pixels"])])


def truncated():
    file = io.BytesIO()
    Image.fromarray(picture(0)).save(file, "JPEG")
    return file.getvalue()[:-150]


@pytest.mark.parametrize(
    ("bad", "cause"),
    [
        (Sample("x", (("<image>", "a"),), (truncated(),)), "cannot read image of .* bytes"),
        (sample("x", (1,), (4,)), "has 4 images, a row has 3"),
        (sample("x", (1,), (40,)), "no answer begins within 128 tokens"),
    ],
)
def test_what_cannot_be_trained_on_is_bad(bad, cause):
    with pytest.raises(BadSample, match=f"sample x: {cause}"):
        encoder(max_tokens=128, max_images=3)(bad)


# Batches.


drawn_samples = st.lists(
    st.tuples(st.integers(1, 30), st.integers(0, 2)), min_size=3, max_size=24
).map(lambda sizes: [sample(n, (size,), (marks,), n) for n, (size, marks) in enumerate(sizes)])


@settings(max_examples=25, deadline=None)
@given(
    samples=drawn_samples,
    shards=st.integers(1, 3),
    epochs=st.integers(1, 2),
    by_modality=st.booleans(),
)
def test_every_sample_of_an_epoch_comes_once(samples, shards, epochs, by_modality):
    """Over all shards; and what a row holds of it is what the sample is, alone."""
    alone = {given.id: encoder()(given) for given in samples}
    drawn = []
    for index in range(shards):
        stream = batches(
            samples, shard=(index, shards), epochs=epochs, seed=5, by_modality=by_modality
        )
        drawn += list(stream)
        assert stream.counters["bad_samples"] == 0
        stream.close()
    names = list(names_of(drawn))
    assert sorted(names) == sorted([given.id for given in samples] * epochs)
    names = iter(names)
    for batch in drawn:
        assert batch["tokens"].shape == (2, 128)
        assert batch["pixels"].shape == (2, 3, 8, 8, 3)
        for row, slots, shown in segments_of(batch):
            expected = alone[next(names)]
            assert (np.diff(slots) == 1).all()
            np.testing.assert_array_equal(batch["positions"][row, slots], np.arange(len(slots)))
            for name in ("tokens", "is_visual", "targets"):
                np.testing.assert_array_equal(batch[name][row, slots], expected[name])
            np.testing.assert_array_equal(batch["pixels"][row, list(shown)], expected["pixels"])
        at = batch["targets"] >= 0
        follows = np.roll(batch["tokens"], -1, axis=1)
        np.testing.assert_array_equal(batch["targets"][at], follows[at])
        for row in range(2):
            modalities = {len(shown) > 0 for n, _, shown in segments_of(batch) if n == row}
            assert not by_modality or len(modalities) <= 1
            used = max((shown.stop for n, _, shown in segments_of(batch) if n == row), default=0)
            assert not batch["pixels"][row, used:].any()


def test_rows_without_images_leave_none_unused():
    stream = batches([sample(n, marks=(0,)) for n in range(9)], row_images=0)
    assert next(stream)["pixels"].shape == (2, 0, 8, 8, 3)
    assert stream.counters["unused_image_share"] == 0
    stream.close()


def test_order_follows_seed_and_epoch():
    samples = [sample(n) for n in range(20)]
    first, again, other = (
        list(names_of(batches(samples, seed=seed, epochs=2))) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other
    assert first[:20] != first[20:]


def write(folder, count, bad=()):
    """A file of conversations, with and without images, some of them missing theirs."""
    Image.fromarray(picture(1)).save(folder / "a.png")
    rows = []
    for n in range(count):
        given = sample(n, (1 + n * 7 % 23, 2), (n % 2, 0))
        turns = [part for turn in given.turns for part in zip(("human", "gpt"), turn, strict=True)]
        row = {"id": f"id{n}", "conversations": [{"from": a, "value": b} for a, b in turns]}
        if n % 2:
            row["image"] = "none.png" if n in bad else "a.png"
        rows.append(row)
    path = folder / "data.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize("workers", [(0, 0), (2, 2), (2, 0)])
def test_a_saved_position_goes_on_exactly(tmp_path, workers):
    """Also across epochs, with bad samples, and with another number of workers."""
    source = InstructionFile(write(tmp_path, 60, bad=(7, 31)))
    options = {"max_bad_fraction": 0.2, "shard": (1, 2), "row_tokens": 256}
    stream = batches(source, workers=workers[0], **options)
    for _ in range(7):
        next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    counters = stream.counters
    following = [next(stream) for _ in range(6)]
    assert counters["samples"] > 30  # its second epoch
    assert counters["bad_samples"] >= 1
    at_end = stream.counters
    stream.close()

    later = batches(source, workers=workers[1], **options)
    later.set_state(state)
    assert later.counters == counters
    assert later.get_state() == state
    for expected in following:
        assert_same(next(later), expected)
    assert later.counters == at_end
    # Back again, with the same iterator.
    later.set_state(state)
    assert_same(next(later), following[0])
    later.close()


def test_workers_end_with_their_parent_and_not_before():
    """A notice to stop goes to them too, when they are still needed; what kills the parent not."""
    program = """
import multiprocessing, os, signal
from tests.data.test_instruct import batches, sample

stream = batches([sample(n) for n in range(50)], workers=1)
next(stream)
(worker,) = multiprocessing.active_children()
for notice in (signal.SIGTERM, signal.SIGINT):
    os.kill(worker.pid, notice)
for _ in range(30):
    next(stream)
print("goes on", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    # The output that is waited for is the worker's too.
    ended = python("-c", program, timeout=120)
    assert (ended.returncode, ended.stdout) == (-9, "goes on\n"), ended.stderr


def test_what_has_become_bad_while_it_waited_is_left_out(caplog):
    """Its image is gone, or it no longer fits into a row."""
    samples = [sample(n, marks=(2 if n % 10 == 5 else 1,)) for n in range(60)]
    stream = batches(samples, epochs=1)
    drawn = list(names_of([next(stream)]))
    state = stream.get_state()
    assert state["read"] == 60
    stream.close()

    gone = next(n for n in range(60) if str(n) not in drawn and n % 10 != 5)
    samples[gone] = BadSample(str(gone), "image is missing")
    lost = {str(n) for n in (gone, *range(5, 60, 10))} - set(drawn)
    later = batches(samples, epochs=1, row_images=1, max_bad_fraction=0.5)
    with caplog.at_level(logging.WARNING):
        later.set_state(state)
        drawn += names_of(later)
    assert sorted(drawn) == sorted({str(n) for n in range(60)} - lost)
    assert later.counters["bad_samples"] == len(lost) > 3
    told = sorted(record.getMessage() for record in caplog.records)
    assert f"left out: sample {gone}: image is missing" in told and len(told) == len(lost)
    later.close()


@pytest.mark.parametrize(("before", "after"), [(1, 3), (2, 3), (3, 2), (3, 1)])
def test_other_numbers_of_shards_go_on_with_what_is_left(before, after):
    """Nothing is lost and nothing comes twice, though some shards had read further than others."""
    sizes = np.random.default_rng(0).integers(1, 30, 700)
    samples = [sample(n, (int(size),), (n % 2,), n) for n, size in enumerate(sizes)]
    drawn, states = [], []
    for index in range(before):
        stream = batches(samples, shard=(index, before), epochs=1)
        drawn += [next(stream) for _ in range(3)]
        states.append(json.loads(json.dumps(stream.get_state())))
        stream.close()
    if before > 1:
        assert len({state["read"] for state in states}) > 1
    read, others = 0, InstructBatches.reshard(states, after)
    for name in ("bad", "rows", "tokens", "images"):
        assert sum(state[name] for state in others) == sum(state[name] for state in states)
    for index, state in enumerate(others):
        stream = batches(samples, shard=(index, after), epochs=1)
        stream.set_state(state)
        read += stream.counters["samples"]
        drawn += list(stream)
        stream.close()
    assert max(state["read"] for state in states) * before == read
    assert sorted(names_of(drawn)) == sorted(given.id for given in samples)


def test_a_worker_that_is_killed_ends_the_run():
    """As where memory is short; images are larger than what a pipe holds."""
    large = dataclasses.replace(CONFIG, vision=VisionConfig(image_size=160, patch_size=40))
    before = set(multiprocessing.active_children())
    stream = batches([sample(n) for n in range(90)], config=large, workers=1, row_images=1)
    next(stream)
    (worker,) = set(multiprocessing.active_children()) - before
    worker.kill()
    with pytest.raises(RuntimeError, match="terminated unexpectedly"):
        list(itertools.islice(stream, 200))
    stream.close()


def test_other_numbers_of_shards_finish_what_one_has_read_to_its_end():
    samples = [sample(n) for n in range(7)]
    streams = [batches(samples, shard=(index, 2), epochs=1) for index in range(2)]
    drawn = [next(streams[0])]
    states = [stream.get_state() for stream in streams]
    assert [state["read"] for state in states] == [4, 0]
    for index, state in enumerate(InstructBatches.reshard(states, 3)):
        stream = batches(samples, shard=(index, 3), epochs=1)
        stream.set_state(state)
        drawn += list(stream)
    assert sorted(map(int, names_of(drawn))) == [*range(7)]


def test_positions_do_not_fit_other_data():
    samples = [sample(n) for n in range(8)]
    state = batches(samples).get_state()
    for other in (batches(samples[:7]), batches(samples, seed=1)):
        with pytest.raises(ValueError, match="the same data and seed"):
            other.set_state(state)
    with pytest.raises(ValueError, match="reshard"):
        batches(samples, shard=(0, 2)).set_state(state)


def test_bad_samples_are_logged_counted_and_left_out(tmp_path, caplog):
    source = InstructionFile(write(tmp_path, 60, bad=(7, 31)))
    stream = batches(source, epochs=1, max_bad_fraction=0.04)
    with caplog.at_level(logging.WARNING):
        names = list(names_of(stream))
    assert sorted(map(int, names)) == sorted({*range(60)} - {7, 31})
    assert stream.counters["samples"] == 60
    assert stream.counters["bad_samples"] == 2
    told = sorted(record.getMessage() for record in caplog.records)
    missing = f"image {tmp_path / 'none.png'} is missing"
    assert told == [f"left out: sample id{n}: {missing}" for n in (31, 7)]


@pytest.mark.parametrize(("count", "read", "workers"), [(60, 19, 0), (150, 46, 0), (150, 46, 1)])
def test_too_many_bad_samples_stop_training(count, read, workers):
    """As soon as there are more than are put up with in an epoch."""
    samples = [BadSample(str(n), "is bad") for n in range(count)]
    stream = batches(samples, workers=workers, max_bad_fraction=0.3)
    with pytest.raises(ValueError, match=rf"{read} of the first {read} .* 0\.3 allows of {count}"):
        next(stream)
    stream.close()


def test_bad_samples_that_come_together_are_put_up_with():
    """The first that are read are bad, but no more than may be of an epoch."""

    class FirstBad(Listed):
        reads = itertools.count()

        def __getitem__(self, index):
            if next(self.reads) < 8:
                raise BadSample(str(index), "is bad")
            return super().__getitem__(index)

    stream = batches(FirstBad([sample(n) for n in range(400)]), epochs=1, max_bad_fraction=0.02)
    assert len(list(names_of(stream))) == 392
    stream.close()


# In parts of LLaVA-1.5's mixture: words of an answer, low and high, and how many images.
MIXTURE = [(0.42, 20, 150, 1), (0.3, 60, 250, 1), (0.2, 100, 700, 1), (0.08, 100, 2000, 0)]


@pytest.mark.parametrize("by_modality", [False, True])
def test_little_of_rows_is_padding(by_modality):
    rng = np.random.default_rng(0)
    samples = []
    for n in range(700):
        _, low, high, marks = MIXTURE[rng.choice(4, p=[part[0] for part in MIXTURE])]
        samples.append(sample(n, (int(rng.integers(low, high)),), (marks,)))
    config = LlavaConfig(
        vision=VisionConfig(image_size=24, patch_size=1),  # 576 tokens
        text=TextConfig(vocab_size=640),
        image_token_id=IMAGE_ID,
        pad_token_id=0,
    )
    stream = batches(
        samples,
        config=config,
        row_tokens=4096,
        row_images=5,
        max_tokens=2048,
        by_modality=by_modality,
    )
    filled = np.mean([(batch["segments"] > 0).mean() for batch in itertools.islice(stream, 40)])
    assert stream.counters["padding_share"] == pytest.approx(1 - filled)
    assert stream.counters["padding_share"] <= 0.1
    assert 0 < stream.counters["unused_image_share"] <= 0.25


def test_pages_of_digits_can_be_trained_on():
    stream = batches(DigitsSource(), config=DIGITS, row_tokens=1024, row_images=4)
    batch = next(stream)
    assert batch["pixels"].shape == (2, 4, 96, 96, 3)
    assert batch["is_visual"].sum() % 144 == 0
    said = TOKENIZER.decode(batch["targets"][0][batch["targets"][0] >= 0])
    assert said.count("</s>") == 4 * batch["segments"][0].max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size 0 must be positive"),
        ({"row_images": -1}, "row_images -1 not negative"),
        ({"max_tokens": 129}, "max_tokens 129 must be 2 to row_tokens 128"),
        ({"row_tokens": 9000}, "max_tokens 9000 is more than the 4096 of the model"),
        ({"shard": (2, 2)}, r"shard \(2, 2\)"),
        ({"shard": (0, 9)}, "8 samples, which are too few for 9 shards"),
        ({"max_bad_fraction": 1.0}, r"max_bad_fraction is 1\.0"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        batches([sample(n) for n in range(8)], **options)


def test_missing_grain_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[data\]'"):
        batches([sample(0)])
