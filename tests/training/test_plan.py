"""What a run takes: counted by hand, by the compiler, and on real arrays."""

import dataclasses
import json
import math
from dataclasses import replace

import jax
import pytest

from configs import llava15_7b_twig, llava15_13b_twig
from tests.training.worker import start
from twig_jax.config import TwigConfig
from twig_jax.hardware import CHIPS, chip
from twig_jax.programs import device_bytes
from twig_jax.pruning.budget import retained
from twig_jax.sharding.mesh import make_mesh
from twig_jax.sharding.placement import distribute
from twig_jax.training.config import DataConfig, DistillConfig, ReinforceConfig, TrainConfig
from twig_jax.training.flops import step_flops
from twig_jax.training.loop import stage_loss
from twig_jax.training.optim import optimizer
from twig_jax.training.plan import plan
from twig_jax.training.step import init_state, make_step


@pytest.fixture(autouse=True)
def no_compiler_for_gpus(monkeypatch):
    monkeypatch.setattr("twig_jax.hardware._gpus", lambda chip, count: None)


def tiny(stage="twig", **changes):
    data = DataConfig(batch_size=8, row_tokens=276)
    return TrainConfig(stage, "", 10, preset="tiny", data=data, **changes)


def seven_b(**changes):
    return dataclasses.replace(llava15_7b_twig.get_config(), base=None, **changes)


def test_flops_by_hand():
    """A row of 4,096 tokens and five images of LLaVA-1.5-7B, of which one is a whole batch."""
    config = seven_b()
    one = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=1))
    d, f, S = 4096, 11008, 4096
    layer = 2 * S * (4 * d * d + 3 * d * f) + 2 * S * S * d
    head = 2 * S * d * 32064
    tower = 23 * (2 * 577 * 12 * 1024**2 + 4 * 577**2 * 1024) + 2 * 576 * 3 * 14**2 * 1024
    image = tower + 2 * 576 * (1024 * d + d * d)
    assert step_flops(one) == 5 * image + 2 * layer + 3 * (3 * layer + head)
    assert step_flops(config) == 32 * step_flops(one)
    # Teaching takes the base up to the layer that is learned, or all of it and its words.
    attention, words = DistillConfig(attention=1.0), DistillConfig(prediction=0.1, attention=1.0)
    assert step_flops(replace(one, distill=attention)) == step_flops(one) + (20 - 2) * layer
    assert step_flops(replace(one, distill=words)) == step_flops(one) + 30 * layer + head
    stored = replace(words, targets="targets")
    assert step_flops(replace(one, distill=stored)) == step_flops(one)
    # Prunings: 64 text tokens, the kept ones among them up to layer 24.
    part = ReinforceConfig(actions=4, budgets=(64.0, 192.0), questions=3)
    R = retained(192.0, TwigConfig(), 32, 576)
    deep = [n * (4 * d * d + 3 * d * f) * 2 + 2 * n * n * d for n in (64 + R, 64)]
    tried = 22 * deep[0] + 8 * deep[1] + 64 * 2 * d * 32064
    assert step_flops(replace(one, reinforce=part)) == 5 * image + 5 * layer + 3 * 4 * tried
    naming = 5 * 576 * 2 * d * 32064
    assert step_flops(replace(one, stage="vision")) == 3 * (5 * image + naming)
    whole = 5 * image + naming + 32 * layer + head
    assert step_flops(replace(one, stage="base")) == 3 * whole


@pytest.mark.parametrize("stage", ["twig", "base"])
def test_flops_are_the_compilers(stage, base, twig, batch):
    """Within what norms, softmax and the loss take, and attention that is computed in full."""
    config = tiny(stage=stage)
    tx = optimizer(config.optim, config.steps)
    trained, frozen = (twig, base) if stage == "twig" else (base, {})
    step = make_step(stage_loss(config), tx)
    compiled = step.lower(init_state(trained, tx), frozen, batch).compile()
    ratio = compiled.cost_analysis()["flops"] / step_flops(config)
    assert 1 < ratio < 1.6


def test_chips_are_known_by_the_names_jax_gives_them():
    assert chip("TPU v5 lite") is CHIPS["v5e"]
    assert chip("TPU v5p") is chip("TPU v5") is CHIPS["v5p"]
    assert chip("NVIDIA H100 80GB HBM3") is CHIPS["h100"]
    assert chip("NVIDIA L4") is CHIPS["l4"] and chip("NVIDIA L40S") is None
    assert chip("cpu") is None


def test_an_estimate_has_the_bytes_that_real_arrays_take():
    config = tiny(mesh=(2, 2, 2), ema=0.9)
    mesh = make_mesh(2, 2, 2)
    grown, base = start()
    tx = optimizer(config.optim, config.steps)
    with jax.set_mesh(mesh):
        grown, base = distribute(grown, mesh), distribute(base, mesh)
        state = jax.jit(init_state, static_argnums=(1, 2))(grown, tx, True)

    def held(tree):
        first = jax.devices()[0]
        return sum(
            shard.data.nbytes
            for x in jax.tree.leaves(tree)
            for shard in x.addressable_shards
            if shard.device == first
        )

    found = plan(config, "h100:8").memory
    assert found["frozen base"] == held(base) == device_bytes(base)
    assert found["trained parameters"] == held(state.params)
    assert found["optimizer state"] == held((state.opt_state, state.step))
    assert found["moving average"] == held(state.ema)


def test_an_estimate_counts_gradients_and_what_devices_exchange():
    """In float32, by hand: of a model of one layer below and one trained."""
    alone = plan(tiny(whole_base=False), "h100:1").memory
    trained, below = alone["trained parameters"], alone["frozen base"]
    assert alone["gradients"] == trained
    # Those of a part and their sum.
    assert plan(tiny(device_rows=4), "h100:1").memory["gradients"] == 2 * trained
    found = {
        mesh: plan(tiny(mesh=mesh, device_rows=rows), f"h100:{math.prod(mesh)}").collectives
        for mesh, rows in (((8, 1, 1), None), ((1, 4, 1), 1), ((1, 1, 2), None))
    }
    states = 8 * 276 * 32 * 4
    assert found == {
        (8, 1, 1): {"all-reduce": trained},
        (1, 4, 1): {"all-gather": 2 * (below + 2 * trained), "reduce-scatter": 2 * trained},
        (1, 1, 2): {"all-reduce": 2 * (1 + 2) * states},
    }


def test_only_the_layers_below_take_memory_if_told():
    whole, below = (plan(seven_b(whole_base=w), "h100:1").memory for w in (True, False))
    assert whole["frozen base"] > 13 * 2**30
    assert below["frozen base"] < 2 * 2**30


def test_batches_hold_what_was_taught_and_only_a_p_head_has_moments():
    distill = DistillConfig(prediction=0.1, attention=1.0, layer=1, targets="there", words=32)
    taught = plan(tiny(p_head=True, whole_base=False, distill=distill), "h100:8").memory
    plain = plan(tiny(p_head=True, whole_base=False), "h100:8").memory
    # Words and logarithms at 276 tokens, and attention of 64 queries, in a row.
    assert taught["batch"] - plain["batch"] == 276 * (32 * 8 + 64 * 4)
    reinforce = ReinforceConfig(actions=4, at_a_time=2, budgets=(74.0,))
    tried = plan(tiny(p_head=True, reinforce=reinforce), "h100:8").memory
    assert tried["optimizer state"] < plain["optimizer state"] / 5
    assert tried["batch"] - plain["batch"] == 4  # the number that prunings are drawn with


def test_a_plan_says_what_it_is():
    found = plan(dataclasses.replace(llava15_13b_twig.get_config(), base=None), "a100:8")
    text = str(found)
    assert "ESTIMATED from shapes, not compiled" in text
    assert "mesh data=1 fsdp=8 tensor=1; 32 rows in 4 parts" in text
    figures = json.loads(json.dumps(found.as_json()))
    assert figures["fits"] and figures["total"] == pytest.approx(sum(figures["memory"].values()))
    assert f"{found.total / 2**30:9.2f}" in text
    assert found.seconds == pytest.approx(found.flops / 8 / 312e12 / 0.4)
    small = plan(seven_b(), "l4:1")
    assert "DOES NOT FIT" in str(small) and not small.as_json()["fits"]
    assert not small.collectives


@pytest.mark.parametrize(
    "topology", ["v5e", "h100", "h100:", "b9:8", "h100:x", "h100:0", "", "v5e:2x"]
)
def test_unknown_topologies(topology):
    with pytest.raises(ValueError, match=r"no topology .* there are: v4, v5e"):
        plan(tiny(), topology)


def test_without_the_tpus_compiler(monkeypatch):
    def absent(*_, **__):
        raise RuntimeError("no libtpu")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", absent)
    with pytest.raises(ValueError, match=r"pip install 'jax\[tpu\]'.*no libtpu"):
        plan(tiny(), "v5e:2x4")


def test_a_plan_for_tpus_is_that_of_the_compiled_step(monkeypatch):
    """With eight devices of this machine in the place of a slice."""
    monkeypatch.setattr("twig_jax.hardware._tpus", lambda topology: jax.devices())
    found = plan(tiny(mesh=(1, 0, 1)), "v5e:2x4")
    assert found.compiled and found.mesh == (1, 8, 1)
    assert "compiled ahead of time" in str(found)
    assert found.memory["working memory"] > 0
    assert found.collectives["all-gather"] > 0
