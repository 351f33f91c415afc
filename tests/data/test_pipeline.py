"""Packed batches: what every slot must hold, and that positions in the data are exact."""

import itertools
import threading
import time

import jax
import numpy as np
import pytest

from twig_jax.data import conversation, digits, images, pipeline, questions
from twig_jax.data.packing import SHARED
from twig_jax.data.tokens import prompt_ids

IMAGE_ID = 3


def batches(tokenizer, **settings):
    defaults = {"seed": 0, "batch_size": 4, "row_tokens": 388, "image_token_id": IMAGE_ID}
    return pipeline.DigitsBatches(tokenizer, **defaults | settings)


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def turns_of(batch, row):
    """Slots of each turn of a row, in order."""
    segments = batch["segments"][row]
    for segment in range(1, segments.max() + 1):
        (slots,) = np.nonzero(segments == segment)
        assert (np.diff(slots) == 1).all()
        yield slots


@pytest.fixture(scope="module")
def batch(tokenizer):
    return next(batches(tokenizer))


def test_shapes_and_types(tokenizer, batch):
    expected = {
        "pixels": ((4, 1, 96, 96, 3), np.uint8),
        "tokens": ((4, 388), np.int32),
        "is_visual": ((4, 388), bool),
        "positions": ((4, 388), np.int32),
        "segments": ((4, 388), np.int32),
        "targets": ((4, 388), np.int32),
        "kinds": ((4, 388), np.int32),
        "content": ((4, 388), bool),
        "patch_words": ((4, 144, 5), np.int32),
    }
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == expected


def test_prefix_and_turn_are_the_prompt_of_that_question(tokenizer, batch):
    """Every turn behind the prefix equals the ids of the same single question in a conversation."""
    for row in range(4):
        page = digits.page("train", 0, row)
        rng = digits.generator("train", 0, row, 1)
        drawn = {question.text: question for question in questions.questions(page, rng, 40)}
        for slots in turns_of(batch, row):
            tokens = batch["tokens"][row, slots]
            text = tokenizer.decode(tokens)
            asked, answer = text.removesuffix("</s>").split(" ASSISTANT: ")
            assert drawn[asked].answer == answer
            whole = conversation.prompt("llava_hf", [(asked, answer)], images=1)
            ids, visual = prompt_ids(tokenizer, whole, IMAGE_ID, digits.VISUAL_TOKENS, images=1)
            np.testing.assert_array_equal(ids, [*batch["tokens"][row, :148], *tokens])
            assert not visual[148:].any()
            np.testing.assert_array_equal(visual[:148], batch["is_visual"][row, :148])


def test_targets_are_the_next_tokens_of_the_answer(tokenizer, batch):
    eos = tokenizer.eos_token_id
    assistant = tokenizer.convert_tokens_to_ids("ĠASSISTANT:")
    for row in range(4):
        for slots in turns_of(batch, row):
            tokens, targets, kinds, content = (
                batch[name][row, slots] for name in ("tokens", "targets", "kinds", "content")
            )
            (start,) = np.flatnonzero(tokens == assistant)
            np.testing.assert_array_equal(targets[start:-1], tokens[start + 1 :])
            assert targets[-2] == eos == tokens[-1]
            assert (targets[:start] == -1).all()
            assert targets[-1] == -1
            np.testing.assert_array_equal(kinds >= 0, targets >= 0)
            assert len(set(kinds[kinds >= 0])) == 1
            assert content[start]
            assert not content[targets < 0].any()
            assert not content[np.isin(targets, [eos, *tokenizer.encode(",.")])].any()


def test_content_follows_the_question(tokenizer, batch):
    for row in range(4):
        page = digits.page("train", 0, row)
        drawn = questions.questions(page, digits.generator("train", 0, row, 1), 40)
        flags = {question.text: question.content for question in drawn}
        for slots in turns_of(batch, row):
            text = tokenizer.decode(batch["tokens"][row, slots])
            targets = batch["targets"][row, slots]
            told = [tokenizer.decode([token]) for token in targets[targets >= 0]]
            words = [flag for flag, piece in zip(
                batch["content"][row, slots][targets >= 0], told, strict=True
            ) if piece.startswith(" ")]  # fmt: skip
            assert tuple(words) == flags[text.split(" ASSISTANT:")[0]]


def test_all_turns_share_the_page(batch):
    assert (batch["segments"][:, :148] == SHARED).all()
    assert (batch["segments"][:, 148:] != SHARED).all()
    assert (batch["positions"][:, :148] == np.arange(148)).all()
    assert (batch["targets"][:, :148] == -1).all()
    assert not batch["is_visual"][:, 148:].any()


def test_positions_restart_in_every_turn(batch):
    for row in range(4):
        for slots in turns_of(batch, row):
            positions = batch["positions"][row, slots]
            np.testing.assert_array_equal(positions, 148 + np.arange(len(slots)))


def test_padding_holds_nothing(batch):
    padding = batch["segments"] == 0
    assert padding.any()
    assert (batch["tokens"][padding] == 0).all()
    assert (batch["targets"][padding] == -1).all()
    assert (batch["kinds"][padding] == -1).all()
    assert not batch["content"][padding].any()
    # Padding is at the end of each row.
    assert (np.diff(padding.astype(int), axis=1) >= 0).all()


def test_pixels_are_those_of_inference(batch):
    for row in range(4):
        page = digits.page("train", 0, row)
        pixels = images.preprocess(images.load_image(page.image), 96)
        found = images.normalize(batch["pixels"][row, 0], images.CLIP_MEAN, images.CLIP_STD)
        np.testing.assert_array_equal(found, pixels)


def test_patch_words_name_what_is_there(tokenizer, batch):
    for row in range(4):
        page = digits.page("train", 0, row)
        inked = {patch: digit for digit in page.digits for patch in digit.patches}
        for patch, ids in enumerate(batch["patch_words"][row]):
            down, across = divmod(patch, 12)
            words = [tokenizer.decode([token]) if token >= 0 else None for token in ids]
            assert words[1:3] == [f" {'ABCD'[down // 3]}", f" {across // 3 + 1}"]
            if patch in inked:
                digit = inked[patch]
                assert words[0] == f" {questions.number(digit.value)}"
                assert words[3:] == [
                    f" {digits.SHADES[digit.shade]}",
                    f" {digits.SIZES[digit.size]}",
                ]
            else:
                assert words[0] == " blank"
                assert words[3:] == [None, None]


def test_a_saved_position_goes_on_exactly(tokenizer):
    whole = batches(tokenizer)
    drawn = [next(whole) for _ in range(4)]
    size = len(drawn[0]["tokens"])
    assert whole.get_state() == {"row": 4 * size}
    later = batches(tokenizer)
    next(later)
    later.set_state({"row": 2 * size})
    assert later.get_state() == {"row": 2 * size}
    for expected in drawn[2:]:
        assert_same(next(later), expected)
    # In batches of another size, too: no row twice, none left out.
    whole.set_state({"row": 2 * size})
    twice = batches(tokenizer, batch_size=2 * size)
    twice.set_state({"row": 2 * size})
    both = jax.tree.map(lambda *x: np.concatenate(x), *drawn[2:])
    assert_same(next(twice), both)
    assert twice.get_state() == {"row": 4 * size}


def test_batches_differ(tokenizer):
    stream = batches(tokenizer)
    first, second = next(stream), next(stream)
    other = next(batches(tokenizer, seed=1))
    assert not np.array_equal(first["pixels"], second["pixels"])
    assert not np.array_equal(first["pixels"], other["pixels"])


def test_shards_are_parts_of_the_global_batch(tokenizer):
    whole = list(itertools.islice(batches(tokenizer), 2))
    parts = [batches(tokenizer, batch_size=2, shard=(index, 2)) for index in range(2)]
    for expected in whole:
        pieces = [next(part) for part in parts]
        joined = {name: np.concatenate([p[name] for p in pieces]) for name in expected}
        assert_same(joined, expected)


def test_rows_do_not_depend_on_the_batch_size(tokenizer):
    large = next(batches(tokenizer, batch_size=4))
    small = next(batches(tokenizer, batch_size=1))
    assert_same({name: array[:1] for name, array in large.items()}, small)


@pytest.mark.parametrize("row_tokens", [228, 308, 404])
def test_rows_are_well_filled(tokenizer, row_tokens):
    stream = batches(tokenizer, batch_size=32, row_tokens=row_tokens)
    filled = [(next(stream)["segments"] != 0).mean() for _ in range(2)]
    assert np.mean(filled) >= 0.92


def test_no_turn_is_longer_than_64_tokens(tokenizer):
    encoder = pipeline.WordEncoder(tokenizer)
    longest = 0
    for index in range(400):
        _, question = questions.example("train", 6, index, "long")
        text = conversation.turn("llava_hf", question.text, question.answer)
        longest = max(longest, sum(map(len, encoder.words(text))))
    assert 50 < longest <= 64


@pytest.mark.parametrize("kind", ["cell", "sum"])
def test_a_mix_is_followed(tokenizer, kind):
    """One page of five has no two digits to add up: another one stands in for it."""
    stream = batches(tokenizer, mix={kind: 1.0, "find": 0.0}, batch_size=16)
    batch = next(stream)
    kinds = batch["kinds"]
    assert set(kinds[kinds >= 0].tolist()) == {questions.KINDS.index(kind)}
    assert (kinds >= 0).any(1).all()
    again = batches(tokenizer, mix={kind: 1.0}, batch_size=8, shard=(1, 2))
    assert_same(next(again), {name: x[8:] for name, x in batch.items()})


def test_word_encoder_equals_the_tokenizer(tokenizer):
    encoder = pipeline.WordEncoder(tokenizer)
    for index in range(150):
        _, question = questions.example("train", 8, index)
        text = conversation.turn("llava_hf", question.text, question.answer)
        ids = [token for word in encoder.words(text) for token in word]
        assert ids == tokenizer.encode(text, add_special_tokens=False)


def test_a_batch_is_quick(tokenizer):
    stream = batches(tokenizer, batch_size=32, row_tokens=404)
    next(stream)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        next(stream)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5  # about 0.06; the bound leaves room for busy machines


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shard": (2, 2)}, r"shard \(2, 2\)"),
        ({"shard": (-1, 2)}, r"shard \(-1, 2\)"),
        ({"batch_size": 0}, "must be positive"),
    ],
)
def test_bad_settings_are_refused(tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        batches(tokenizer, **settings)


@pytest.mark.parametrize(
    ("row_tokens", "message"), [(154, "row of 154 tokens is too short"), (148, "not even hold")]
)
def test_rows_too_short_for_any_turn_are_refused(tokenizer, row_tokens, message):
    with pytest.raises(ValueError, match=message):
        next(batches(tokenizer, row_tokens=row_tokens))


def test_a_tokenizer_for_other_data_is_refused(tokenizer):
    class Other:
        bos_token_id = 1

        def encode(self, text, add_special_tokens):
            return list(text.encode())

    with pytest.raises(ValueError, match="needs 5 tokens for ' zero'"):
        batches(Other())


def test_prefetch_keeps_the_order(tokenizer):
    direct = batches(tokenizer)
    for ahead in itertools.islice(pipeline.prefetch(batches(tokenizer)), 3):
        assert_same(ahead, next(direct))


def test_prefetch_ends_with_its_iterator():
    assert list(pipeline.prefetch(iter(range(7)))) == list(range(7))


def test_prefetch_raises_the_error_in_its_place():
    def failing():
        yield 1
        yield 2
        raise RuntimeError("no more")

    ahead = pipeline.prefetch(failing())
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(RuntimeError, match="no more"):
        next(ahead)


def test_prefetch_draws_no_further_than_asked():
    drawn = []

    def counted():
        for number in itertools.count():
            drawn.append(number)
            yield number

    ahead = pipeline.prefetch(counted())
    assert next(ahead) == 0
    time.sleep(0.3)
    # One given, two waiting, one in the thread's hand.
    assert len(drawn) <= 4


def test_closing_prefetch_ends_its_thread():
    before = set(threading.enumerate())
    ahead = pipeline.prefetch(itertools.count())
    next(ahead)
    (thread,) = set(threading.enumerate()) - before
    ahead.close()
    thread.join(timeout=5)
    assert not thread.is_alive()
