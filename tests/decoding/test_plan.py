"""What decoding takes: counted by hand, by the compiler, and on real arrays."""

import dataclasses
import json

import jax
import pytest

from tests.decoding.models import CALL, CONFIG, TWIG, M, generator, request
from twig_jax.config import TwigConfig
from twig_jax.decoding.buckets import Bucket
from twig_jax.decoding.plan import HOP, LAUNCH, collective_seconds, plan
from twig_jax.decoding.settings import Settings
from twig_jax.hardware import CHIPS
from twig_jax.presets import preset
from twig_jax.programs import Collective, device_bytes
from twig_jax.sharding.mesh import make_mesh

BUCKET = Bucket(rows=2, text=64, images=2, new=32)


@pytest.fixture(autouse=True)
def no_compiler_for_gpus(monkeypatch):
    monkeypatch.setattr("twig_jax.hardware._gpus", lambda chip, count: None)


def tiny(topology, bucket=BUCKET, tokar=0.0, tensor=0, **changes):
    settings = dataclasses.replace(CALL, **changes)
    return plan(CONFIG, TWIG, settings, bucket, topology, tensor, "float32", tokar=tokar)


def seven_b(mode, topology="h100:1", **changes):
    config, twig = preset("llava-1.5-7b")
    settings = Settings(mode=mode, avg_retained=64, gamma=5)
    return plan(config, twig, settings, Bucket(1, 64, 1, 128), topology, **changes)


def test_bytes_and_flops_by_hand():
    """An iteration of LLaVA-1.5-7B: plain, and with five drafts of a twig of three layers."""
    d, f, V, L, K, T = 4096, 11008, 32064, 32, 2, 3
    layer, head = 4 * d * d + 3 * d * f, d * V
    norms = 2 * d  # of a layer; the last norm is one more
    slots = 64 + 576 + 129
    cache = 2 * slots * d  # of a layer
    plain = seven_b("plain").iteration
    one, last = layer + norms + cache, d + head  # passes through a layer and the head
    assert plain.floor == 2 * (L * one + last)
    # Each number takes part once, in a multiplication and an addition.
    assert plain.flops == 2 * (L * (layer + cache) + head)
    drafts = seven_b("ssd").iteration
    trunk, twig, deep = K * one, T * one + last, (L - K) * one + last
    # Trunk: the pending token and five levels. Twig: five levels.
    assert drafts.floor == 2 * (6 * trunk + 5 * twig + deep)
    # Six tokens are verified.
    once = layer + cache
    assert drafts.flops == 2 * (6 * K * once + 5 * (T * once + head) + 6 * ((L - K) * once + head))
    wide = seven_b("ssd", "h100:8").iteration
    assert wide.floor == pytest.approx(drafts.floor / 8, rel=1e-3)  # norms are on all devices


def test_a_prediction_is_the_slowest_part_and_the_collectives():
    found = seven_b("ssd", "h100:8", tokar=0.5)
    one = found.iteration
    chip, part = CHIPS["h100"], one.seconds
    assert part["memory"] == one.floor / chip.bandwidth
    assert part["arithmetic"] == one.flops / chip.flops
    # Two all-reduces a layer: six passes of the trunk, five of the twig, one of the rest.
    passes = 2 * (2 * 6 + 3 * 5 + 30)
    tokens = 2 * (2 * 6 + 3 * 6 + 30 * 6)
    assert one.collectives == {"all-reduce": Collective(passes, tokens * 4096 * 2)}
    sent = 2 * 7 / 8 * tokens * 4096 * 2 / chip.link
    assert part["collectives"] == pytest.approx(passes * 8 * HOP + sent)
    assert part["memory"] > part["arithmetic"]
    assert one.total == part["memory"] + part["collectives"]
    assert found.tokens == 1 + 0.5 * 5 and found.token == one.total / 3.5
    # Many rows of one device wait for arithmetic.
    config, twig = preset("llava-1.5-7b")
    busy = plan(config, twig, Settings(mode="plain"), Bucket(2048, 64, 0, 8), "h100:1")
    part = busy.iteration.seconds
    assert busy.iteration.total == part["arithmetic"] > part["memory"]
    assert busy.tokens == 1 and not busy.iteration.collectives


def test_a_prompt_is_arithmetic():
    """Of LLaVA-1.5-7B: all slots through all layers, or pruned, with first drafts."""
    d, f, V, L, P = 4096, 11008, 32064, 32, 64 + 576
    layer, head = 4 * d * d + 3 * d * f, d * V
    plain, pruned, drafted = (seven_b(mode, "h100:8") for mode in ("plain", "ttp", "ttp_ssd"))
    # The last token goes through the deep layers once more, with the first answer's.
    seen = [P * P / 2] * 2 + [(P + 1) * P / 2] * (L - 2)
    products = (2 * P + (L - 2) * (P + 1)) * layer + 2 * d * sum(seen) + head
    assert plain.prompt.flops == pytest.approx(2 * products / 8)
    part = plain.prompt.seconds
    assert part["arithmetic"] > part["memory"] == plain.prompt.floor / CHIPS["h100"].bandwidth
    reduced = plain.prompt.collectives["all-reduce"]
    assert reduced == Collective(2 * L, 2 * (2 * P + (L - 2) * (P + 1)) * d * 2)
    assert 2.5 < plain.prompt.seconds["arithmetic"] / pruned.prompt.seconds["arithmetic"] < 4
    assert 0 < drafted.prompt.flops - pruned.prompt.flops < 0.03 * pruned.prompt.flops
    # Trunk and twig at every level of drafts, and leaves through the trunk.
    more = drafted.prompt.collectives["all-reduce"].count
    assert more == pruned.prompt.collectives["all-reduce"].count + 2 * (5 * 2 + 5 * 3)


def test_collectives_over_a_ring():
    chip = CHIPS["v5e"]
    found = {
        "all-gather": Collective(3, 800.0),
        "all-reduce": Collective(5, 400.0),
        "collective-permute": Collective(1, 100.0),
    }
    hops = 3 * 4 + 5 * 8 + 1
    sent = 7 / 8 * 800 + 2 * 7 / 8 * 400 + 100
    assert collective_seconds(found, chip, 8) == pytest.approx(hops * HOP + sent / chip.link)
    assert collective_seconds({}, chip, 8) == 0


def test_memory_is_that_of_real_arrays():
    """On eight devices, of which two split rows and four split heads, where they can."""
    mesh = make_mesh(4, 1, 2)
    bucket = dataclasses.replace(BUCKET, rows=4)
    model = generator(made={"mesh": mesh})
    plain = dataclasses.replace(CALL, mode="plain")
    running = model.start([request(1, 2, 2, 5)] * 4, plain, bucket=bucket)
    found = tiny("h100:8", bucket, tensor=2, mode="plain").memory
    assert found["weights"] == device_bytes(model.weights)
    caches = running.state.caches
    assert found["caches"] == device_bytes(caches)
    assert found["rest of the state"] == device_bytes(running.state) - device_bytes(caches)


def test_rows_that_devices_do_not_split_are_held_by_each():
    bucket = dataclasses.replace(BUCKET, rows=3)
    few, many = (tiny(name, bucket, tensor=2, mode="plain") for name in ("h100:2", "h100:8"))
    assert many.mesh == (4, 1, 2) and many.memory == pytest.approx(few.memory)


def test_pruned_layers_hold_no_slots_for_pruned_tokens():
    """Layers before K_f hold text and R tokens, those after text alone, as the sizes show."""
    text = CONFIG.text
    of = 2 * 4 * text.num_kv_heads * text.head_dim * BUCKET.rows  # bytes of a slot and layer
    N, G, P = BUCKET.text, BUCKET.new + 1, BUCKET.text + BUCKET.images * M
    K, K_f, L = TWIG.K, TWIG.K_f, text.num_layers
    R = -(2 * (K * M - 4 * L) // (K_f - K))  # of two images
    slots = K * (P + G) + (K_f - K) * (N + R + G) + (L - K_f) * (N + G)
    assert tiny("h100:1", mode="ttp").memory["caches"] == of * slots
    assert tiny("h100:1", mode="plain").memory["caches"] == of * L * (P + G)


def test_a_plan_for_tpus_is_that_of_the_compiled_loop(monkeypatch):
    """With eight devices of this machine in the place of a slice."""
    monkeypatch.setattr("twig_jax.hardware._tpus", lambda name: jax.devices())
    found, shapes = tiny("v5e:2x4", tensor=2, mode="plain"), tiny("h100:8", tensor=2, mode="plain")
    assert found.compiled and found.mesh == (4, 1, 2)
    assert found.copies == 0 and shapes.copies is None
    for one, by_shape in (
        (found.iteration, shapes.iteration),
        (found.prompt, shapes.prompt),
    ):
        assert one.moved > one.floor == by_shape.floor and by_shape.kernels is None
        assert one.seconds["memory"] == one.moved / CHIPS["v5e"].bandwidth
        # The estimate's, and what putting an embedding and the best word together takes.
        expected = by_shape.collectives["all-reduce"]
        assert expected.count <= one.collectives["all-reduce"].count <= expected.count + 4
    assert json.loads(json.dumps(found.as_json()))["fits"]


def test_a_plan_for_gpus_counts_the_starts_of_kernels(monkeypatch):
    monkeypatch.setattr("twig_jax.hardware._tpus", lambda name: jax.devices())
    monkeypatch.setattr("twig_jax.hardware._gpus", lambda chip, count: jax.devices())
    gpus, tpus = (tiny(name, tensor=2, mode="plain") for name in ("h100:8", "v5e:2x4"))
    assert gpus.compiled and tpus.iteration.seconds["launches"] == 0
    for one in (gpus.iteration, gpus.prompt):
        part = one.seconds
        assert one.kernels > CONFIG.text.num_layers and part["launches"] == one.kernels * LAUNCH
        assert one.total == part["memory"] + part["collectives"] + part["launches"]
        assert part["memory"] == one.moved / CHIPS["h100"].bandwidth


def test_drafting_counts_as_often_as_there_are_levels(monkeypatch):
    monkeypatch.setattr("twig_jax.hardware._tpus", lambda name: jax.devices()[:1])
    config = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, num_layers=3))
    three, five = (
        plan(
            config,
            TwigConfig(K=1, T=1, K_f=2),
            dataclasses.replace(CALL, gamma=gamma),
            BUCKET,
            "v5e:1x1",
            dtype="float32",
        ).iteration
        for gamma in (3, 5)
    )
    # Two more levels of trunk and twig, and a little for nodes that are wider.
    added, of = five.floor - three.floor, three.moved / three.floor
    assert added < five.moved - three.moved < 1.5 * of * added


def test_what_does_not_fit_says_so():
    config, twig = preset("llava-1.5-13b")
    found = plan(config, twig, Settings(mode="plain"), Bucket(1, 64, 1, 128), "l4:1")
    assert not found.as_json()["fits"] and found.total > found.capacity


def test_meshes_that_devices_do_not_make():
    with pytest.raises(ValueError, match=r"does not use the 8 devices"):
        tiny("h100:8", tensor=3)
