"""From a conversation's text to token ids with image slots."""

from pathlib import Path
from typing import Any

import numpy as np

from twig_jax.data.conversation import IMAGE

# A folder with one of these has a tokenizer that transformers can load.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a checkpoint folder, by transformers' AutoTokenizer.

    Raises FileNotFoundError for a missing folder or one without tokenizer files.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder} to load a tokenizer from")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise FileNotFoundError(
            f"folder {folder} has no tokenizer: neither {' nor '.join(_TOKENIZER_FILES)}"
        )
    from transformers import AutoTokenizer  # slow, and not needed where ids are given

    return AutoTokenizer.from_pretrained(folder)


def prompt_ids(
    tokenizer: Any, text: str, image_token_id: int, tokens_per_image: int, images: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of a prompt, with one slot per visual token where the text has image markers.

    LLaVA's rule: the text is split at the markers, each chunk is tokenised by itself without
    special tokens, one BOS leads (where the tokenizer has one), and slots filled with
    image_token_id lie between the chunks.

    images: how many images come with the prompt, None to go by the markers.
    Returns (ids int32 [P], is_visual bool [P]). Raises ValueError where markers and images differ
    in number.
    """
    chunks = text.split(IMAGE)
    markers = len(chunks) - 1
    if images is not None and markers != images:
        raise ValueError(f"the prompt has {markers} {IMAGE} markers but {images} images are given")
    ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    visual = [False] * len(ids)
    for index, chunk in enumerate(chunks):
        if index:
            ids += [image_token_id] * tokens_per_image
            visual += [True] * tokens_per_image
        if chunk:
            ids += tokenizer.encode(chunk, add_special_tokens=False)
            visual += [False] * (len(ids) - len(visual))
    return np.array(ids, np.int32), np.array(visual, bool)
