"""What tests of several launchers share."""

import dataclasses

import pytest

from twig_jax.checkpoints.llava import read_llava, write_llava
from twig_jax.checkpoints.twig import read_twig, write_twig
from twig_jax.data.digits import ASSETS


@pytest.fixture(scope="session")
def shallow(tmp_path_factory):
    """Flags for the embedded model without its last ten layers, which compiles in half the time.

    It reads pages as well: the ten were grown on a base of six (docs/digits.md).
    """
    base, twig = (tmp_path_factory.mktemp("shallow") / name for name in ("base", "twig"))
    config, params = read_llava(ASSETS / "base")
    grown, twig_params = read_twig(ASSETS / "twig", params, config)
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, num_layers=6))
    text = {name: part for name, part in params["text"].items() if name not in LAST}
    params = {**params, "text": text}
    write_llava(base, params, config, tokenizer=ASSETS / "base")
    grown = dataclasses.replace(grown, K_f=4)
    write_twig(twig, twig_params, grown, params, config)
    return ("--checkpoint", base, "--twig", twig)


LAST = {f"layers_{i}" for i in range(6, 16)}
