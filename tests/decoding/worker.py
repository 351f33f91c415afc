"""One of two processes that decode together: python -m tests.decoding.worker ADDRESS INDEX."""

import dataclasses
import json
import sys

import jax
from jax.sharding import Mesh

from tests.decoding.models import CALL, CONFIG, generator, mixed
from twig_jax.decoding.generate import Generator
from twig_jax.sharding.mesh import make_mesh


def model(mesh: Mesh | None = None) -> Generator:
    """One whose words two devices can share."""
    text = dataclasses.replace(CONFIG.text, vocab_size=40)
    return generator(made={"mesh": mesh}, text=text)


def main(address: str, index: str) -> None:
    jax.distributed.initialize(address, num_processes=2, process_id=int(index))
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    with jax.default_matmul_precision("highest"):
        spread = model(make_mesh(2, 2, 2))
        results = spread.generate(mixed(), CALL)
        assert compiled
        compiled.clear()
        spread.generate(mixed(), CALL, watch=lambda _: None)
    print(json.dumps([[r.tokens.tolist() for r in results], compiled]))


if __name__ == "__main__":
    main(*sys.argv[1:])
