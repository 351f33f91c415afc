"""What the main programs cost, beside a snapshot: a program that has grown fails, and no clock is
asked. And no decoding loop copies a cache.

FLOPs and bytes are XLA's own analysis of the compiled programs at small shapes; loops whose length
is not known count once.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from tests.decoding.models import CALL, CONFIG
from tests.training.conftest import TINY
from twig_jax import presets
from twig_jax.config import TwigConfig
from twig_jax.decoding import accept
from twig_jax.decoding.buckets import Bucket, program_for
from twig_jax.decoding.cost import shapes, shapes_of_weights
from twig_jax.decoding.generate import jitted_prefill
from twig_jax.decoding.plan import lower_decode
from twig_jax.models.cpu import arrange
from twig_jax.programs import Hlo, abstract, device_bytes
from twig_jax.sharding.mesh import make_mesh
from twig_jax.sharding.rules import shardings
from twig_jax.training.config import DataConfig, DistillConfig, ReinforceConfig, TrainConfig
from twig_jax.training.plan import lowered

SNAPSHOT = Path(__file__).with_name("costs.json")
LIMIT = 0.02
RENEW = "python -m pytest tests/test_costs.py --renew-costs"

BUCKET = Bucket(rows=2, text=64, images=8, new=64)
DECODING = {
    "plain": {"mode": "plain"},
    "ttp": {"mode": "ttp"},
    "ssd": {"mode": "ssd"},
    "ttp_ssd": {"mode": "ttp_ssd"},
    "tree": {"children": 3, "expanded": 2, "nodes": 5},
    "adaptive": {"adaptive": True},
    "bfloat16": {"mode": "ssd"},  # whose weights are arranged for CPUs
}
TRAINING = {
    "twig": {},
    "stage 1": {
        "p_head": True,
        "distill": DistillConfig(prediction=0.1, attention=1.0, layer=1),
    },
    "stage 2": {
        "p_head": True,
        "reinforce": ReinforceConfig(actions=4, at_a_time=2, budgets=(74.0,)),
    },
}
# An adaptive program's prefill is that of ttp_ssd but for an account.
PROGRAMS = [
    *(f"decode {name}" for name in DECODING),
    *(f"prefill {name}" for name in DECODING if name != "adaptive"),
    *(f"train {name}" for name in TRAINING),
]


def one_device():
    return make_mesh(devices=jax.devices()[:1])


def decoding(name):
    """What a program of decoding is given."""
    config = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, num_layers=3))
    twig = TwigConfig(K=1, T=1, K_f=2)
    settings = dataclasses.replace(CALL, **DECODING[name])
    program = program_for(BUCKET, settings, config, twig)
    dtype = "bfloat16" if name == "bfloat16" else "float32"
    weights = jax.eval_shape(arrange, shapes_of_weights(config, twig, dtype))
    weights = abstract(weights, shardings(weights, one_device()))
    return shapes(program, BUCKET.rows, weights, one_device())


@functools.cache
def compiled(name):
    kind, _, which = name.partition(" ")
    if kind == "train":
        data = DataConfig(batch_size=2, row_tokens=276)
        config = TrainConfig("twig", "", 10, preset="tiny", data=data, **TRAINING[which])
        with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
            patch.setitem(presets.PRESETS, "tiny", TINY)
            return lowered(config, one_device())[0].compile()
    given = decoding(which)
    if kind == "decode":
        return lower_decode(given, one_device()).compile()
    with jax.set_mesh(one_device()):
        return jitted_prefill.lower(
            given.program, given.weights, given.inputs, given.controls, given.cost
        ).compile()


def costs(program):
    """FLOPs and bytes of a compiled program."""
    counted, buffers = program.cost_analysis(), program.memory_analysis()
    return {
        "FLOPs": int(counted["flops"]),
        "bytes accessed": int(counted["bytes accessed"]),
        "argument bytes": buffers.argument_size_in_bytes,
        "output bytes": buffers.output_size_in_bytes,
        "temporary bytes": buffers.temp_size_in_bytes,
        "bytes not reused": buffers.output_size_in_bytes - buffers.alias_size_in_bytes,
    }


def growth(name, before, after):
    """A line for each quantity that has grown beyond the limit."""
    return [
        f"{name}: {quantity} {before[quantity]:,} -> {now:,} ({now / before[quantity] - 1:+.1%})"
        if before[quantity]
        else f"{name}: {quantity} 0 -> {now:,}"
        for quantity, now in after.items()
        if now > before[quantity] * (1 + LIMIT)
    ]


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_program_has_grown(name, request):
    snapshot, renew = json.loads(SNAPSHOT.read_text()), request.config.getoption("--renew-costs")
    same = snapshot["jax"] == jax.__version__
    if not same and not renew:
        pytest.skip(
            f"{SNAPSHOT.name} has the programs of jax {snapshot['jax']}, which are not those of "
            f"{jax.__version__}; renew it with: {RENEW}"
        )
    found = costs(compiled(name))
    if renew:
        known = snapshot["programs"] if same else {}
        programs = {other: known[other] for other in PROGRAMS if other in known} | {name: found}
        content = {"jax": jax.__version__, "programs": programs}
        SNAPSHOT.write_text(json.dumps(content, indent=1) + "\n")
        return
    before = snapshot["programs"].get(name)
    assert before is not None, f"{SNAPSHOT.name} has no program {name!r}; add it with: {RENEW}"
    grown = growth(name, before, found)
    assert not grown, "\n".join(
        [f"more than {LIMIT:.0%} above {SNAPSHOT.name}:", *grown, f"if that is wanted: {RENEW}"]
    )


@pytest.mark.parametrize("name", DECODING)
def test_no_cache_is_copied_in_the_loop(name):
    program = compiled(f"decode {name}")
    caches = decoding(name).state.caches
    hlo = Hlo(program.as_text())
    assert hlo.copies(hlo.loop(), caches) == 0
    assert program.memory_analysis().alias_size_in_bytes >= device_bytes(caches)


def test_copied_caches_are_seen(monkeypatch):
    """Without its dependence on the chosen tokens, the compiler copies every cache."""
    before = costs(compiled("decode plain"))
    jax.clear_caches()
    real = accept.commit

    def early(cache, block, slots):
        return real(cache, block, jnp.broadcast_to(jnp.arange(slots.shape[1]), slots.shape))

    monkeypatch.setattr(accept, "commit", early)
    given = decoding("plain")
    copying = lower_decode(given, one_device()).compile()
    jax.clear_caches()
    hlo = Hlo(copying.as_text())
    assert hlo.copies(hlo.loop(), given.state.caches) > 0
    grown = growth("plain", before, costs(copying))
    assert any("bytes accessed" in line for line in grown)
    assert any("temporary bytes" in line for line in grown)


def test_growth_is_told_in_words():
    before = {"FLOPs": 1000, "bytes accessed": 1000, "temporary bytes": 0}
    after = {"FLOPs": 1020, "bytes accessed": 1031, "temporary bytes": 4096}
    assert growth("decode plain", before, after) == [
        "decode plain: bytes accessed 1,000 -> 1,031 (+3.1%)",
        "decode plain: temporary bytes 0 -> 4,096",
    ]
    assert growth("decode plain", after, before) == []
