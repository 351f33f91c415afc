"""Recreates the embedded digits assets: the scans (from scikit-learn's copy) and the tokenizer.

    python -m twig_jax.assets.digits.make_assets

Needs scikit-learn and tokenizers; the package itself does not need scikit-learn.
"""

import json
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent
SPECIALS = ("<pad>", "<s>", "</s>", "<image>")
VOCABULARY_LIMIT = 640

# One piece per word with its leading space, so that every word of the data can become one token.
PIECES = r" ?(?:USER|ASSISTANT):| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\s"


def split_order(labels: np.ndarray) -> np.ndarray:
    """A fixed order of the scans in which every stretch has about the same share of each digit."""
    shuffled = np.random.default_rng(0).permutation(len(labels))
    place = np.empty(len(labels))
    for digit in range(10):
        members = shuffled[labels[shuffled] == digit]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return shuffled[np.argsort(place[shuffled], kind="stable")]


def make_scans() -> None:
    """Write scans.npz: images uint8 [1797, 8, 8] (0..16), labels uint8 [1797], order int16 [1797].

    The order is stored, so that the splits do not hang on a random generator's version.
    """
    from sklearn.datasets import load_digits

    source = load_digits()
    labels = source.target.astype(np.uint8)
    np.savez_compressed(
        FOLDER / "scans.npz",
        images=source.images.astype(np.uint8),
        labels=labels,
        order=split_order(labels).astype(np.int16),
    )


def make_tokenizer() -> None:
    """Write a byte-level BPE: the special tokens, each byte, and one token for every word.

    Raises ValueError where a word takes several tokens.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )

    from twig_jax.data import wordings

    words = wordings.vocabulary()
    openings = {text.split()[0] for text in wordings.asks()}
    pieces = [f" {word}" for word in (*words, "blank", "ASSISTANT:")] + ["USER:", *sorted(openings)]

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_LIMIT,
        min_frequency=1,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIALS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces, trainer)
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", start)]
    )
    for piece in pieces:
        ids = tokenizer.encode(piece, add_special_tokens=False).ids
        if len(ids) != 1:
            raise ValueError(f"{piece!r} takes {len(ids)} tokens; raise the vocabulary limit")

    tokenizer.save(str(FOLDER / "base" / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "padding_side": "right",
        "additional_special_tokens": ["<image>"],
    } | names
    special = names | {"additional_special_tokens": ["<image>"]}
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
        (FOLDER / "base" / name).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    make_scans()
    make_tokenizer()
