"""A small Llama tokenizer: pieces by sentencepiece, special ids 0 to 2, bytes for all else."""

import json
import random

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

PIECES = "USER ASSISTANT: the cat is in a picture, What on earth? INST 12 345".split()
SIZE = 360


def train(folder):
    """Writes tokenizer.model and the settings of LLaVA-1.5's own folders."""
    rng = random.Random(0)
    lines = [" ".join(rng.choices([*PIECES, ""], k=12)) for _ in range(300)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=SIZE,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    # As Meta's file has them, runs of spaces come first behind the bytes, and are merged last.
    path = folder / "tokenizer.model"
    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    pieces = sorted(model.pieces, key=lambda piece: (piece.type == piece.NORMAL, not _run(piece)))
    two, more = filter(_run, pieces)
    two.score = more.score = -1e9
    more.piece = 2 * two.piece
    del model.pieces[:]
    model.pieces.extend(pieces)
    path.write_bytes(model.SerializeToString())
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_bos_token": True,
        "add_eos_token": False,
        "model_max_length": 2048,
        "pad_token": None,
        "padding_side": "right",
    }
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | special))
    special["pad_token"] = "<unk>"
    (folder / "special_tokens_map.json").write_text(json.dumps(special))


def _run(piece):
    return len(piece.piece) > 1 and set(piece.piece) == {"▁"}
