"""What the data tests share."""

import pytest

from twig_jax.data.digits import ASSETS
from twig_jax.data.tokens import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    """The embedded tokenizer of the digits data."""
    return load_tokenizer(ASSETS / "base")
