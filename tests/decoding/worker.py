"""One of two processes that decode together: python -m tests.decoding.worker ADDRESS INDEX."""

import json
import sys

import jax

from tests.decoding.models import CALL, generator, mixed
from twig_jax.sharding.mesh import make_mesh


def main(address: str, index: str) -> None:
    jax.distributed.initialize(address, num_processes=2, process_id=int(index))
    with jax.default_matmul_precision("highest"):
        results = generator(made={"mesh": make_mesh(2, 2, 2)}).generate(mixed(), CALL)
    print(json.dumps([r.tokens.tolist() for r in results]))


if __name__ == "__main__":
    main(*sys.argv[1:])
