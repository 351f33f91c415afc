"""What tests of several launchers share."""

import dataclasses

import pytest

from tests.shallow import first_layers
from twig_jax.checkpoints.llava import read_llava, write_llava
from twig_jax.checkpoints.twig import read_twig, write_twig
from twig_jax.data.digits import ASSETS


@pytest.fixture(scope="session")
def shallow(tmp_path_factory):
    """Flags for the embedded model without its last ten layers, which compiles in half the time.

    It reads pages as well (docs/digits.md).
    """
    base, twig = (tmp_path_factory.mktemp("shallow") / name for name in ("base", "twig"))
    config, params = read_llava(ASSETS / "base")
    grown, twig_params = read_twig(ASSETS / "twig", params, config)
    config, params = first_layers(config, params, 6)
    write_llava(base, params, config, tokenizer=ASSETS / "base")
    write_twig(twig, twig_params, dataclasses.replace(grown, K_f=4), params, config)
    return ("--checkpoint", base, "--twig", twig)
