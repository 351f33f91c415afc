"""What is read off compiled programs, in texts of TPU programs and in real ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from twig_jax.programs import Collective, Hlo
from twig_jax.sharding.mesh import make_mesh


def test_collectives_of_a_real_program_count_as_often_as_their_loop_runs():
    mesh = make_mesh(1, 8, 1)
    rows, split = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P(None, "fsdp"))

    @jax.jit
    def program(x, w):
        def body(x, _):
            whole = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
            return jnp.tanh(x @ (whole + x.mean())), None

        x, _ = jax.lax.scan(body, x, None, length=5)
        return jax.lax.with_sharding_constraint(x.sum(0), NamedSharding(mesh, P()))

    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=rows)
    w = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=split)
    hlo = Hlo(program.lower(x, w).compile().as_text())
    found = hlo.collectives(hlo.entry)
    # The weights are put together once or in each turn; means are of one number, sums of 64.
    times = found["all-gather"].count
    assert times in (1, 5) and found["all-gather"].bytes == times * 64 * 64 * 4
    assert found["all-reduce"] == Collective(5 + 1, 5 * 4 + 64 * 4)
    assert found.keys() == {"all-gather", "all-reduce"}
    # In the loop's body alone there is no sum at the end.
    assert hlo.collectives(hlo.loop())["all-reduce"] == Collective(1, 4)


LOOP = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %ar = (f32[8]{0}, f32[64]{0}) all-gather-start(%x), dimensions={0}
  %done = f32[64]{0} all-gather-done(%ar)
  %rs = f32[8]{0} reduce-scatter(%done), to_apply=%add
}

%cond (p.1: (s32[], f32[8])) -> pred[] {
  %p.1 = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%p.1), index=0
  %n = s32[]{:T(128)} constant(LIMIT)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = (s32[], f32[8]) parameter(0)
  ROOT %w = (s32[], f32[8]) while(%a), condition=%cond, body=%body
}
"""


@pytest.mark.parametrize(("limit", "times"), [("7", 7), ("false", 3)])
def test_collectives_in_a_tpu_program(limit, times):
    """There asynchronous ones give back operands, and only conditions tell how long loops run."""
    hlo = Hlo(LOOP.replace("LIMIT", limit), trips=3)
    assert hlo.collectives(hlo.entry) == {
        "all-gather": Collective(times, times * 64 * 4),
        "reduce-scatter": Collective(times, times * 64 * 4),
    }


BRANCHES = """
%nothing (p: f32[8]) -> f32[8] {
  ROOT %p = f32[8]{0} parameter(0)
}

%something (p.1: f32[8]) -> f32[8] {
  %p.1 = f32[8]{0} parameter(0)
  ROOT %ar = f32[8]{0} all-reduce(%p.1), to_apply=%add
}

ENTRY %main (a: f32[8], c: s32[]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %c = s32[] parameter(1)
  ROOT %r = f32[8]{0} conditional(%c, %a, %a), WHICH, metadata={op_name="jit(f)/filter/cond"}
}
"""


@pytest.mark.parametrize(
    "which",
    [
        "branch_computations={%nothing, %something}",
        "true_computation=%something, false_computation=%nothing",
    ],
)
def test_one_branch_of_a_condition_counts(which):
    text = BRANCHES.replace("WHICH", which)
    for rare, count in ((None, 1), ("draft/cond$", 1), ("filter/cond$", 0)):
        hlo = Hlo(text, rare=rare)
        found = hlo.collectives(hlo.entry).get("all-reduce", Collective(0, 0))
        assert found.count == count


# A layer as XLA compiles it for TPUs: S(1) is memory on the chip. Sizes are in bytes below.
STEP = """
%gathered (table: bf16[1000,128], at: s32[8]) -> bf16[8,128] {
  %table = bf16[1000,128]{1,0} parameter(0)
  %at = s32[8]{0} parameter(1)
  ROOT %rows = bf16[8,128]{1,0} gather(%table, %at), offset_dims={1}
}

%turned (cache: bf16[8,4,16,128]) -> bf16[8,16,4,128] {
  %cache = bf16[8,4,16,128]{3,2,1,0} parameter(0)
  %turn = bf16[8,16,4,128]{3,2,1,0} transpose(%cache), dimensions={0,2,1,3}
  ROOT %same = bf16[8,16,4,128]{3,1,2,0} bitcast(%turn)
}

%written (cache.1: bf16[8,4,16,128], new: bf16[8,4,1,128]) -> bf16[8,4,16,128] {
  %cache.1 = bf16[8,4,16,128]{3,2,1,0} parameter(0)
  %new = bf16[8,4,1,128]{3,2,1,0} parameter(1)
  ROOT %scatter = bf16[8,4,16,128]{3,2,1,0} dynamic-update-slice(%cache.1, %new)
}

ENTRY %main (w: bf16[128,128], e: bf16[1000,128], i: s32[8], k: bf16[8,4,16,128]) -> bf16[8,128] {
  %w = bf16[128,128]{1,0:T(8,128)(2,1)} parameter(0)
  %e = bf16[1000,128]{1,0:T(8,128)(2,1)} parameter(1)
  %i = s32[8]{0:T(128)} parameter(2)
  %k = bf16[8,4,16,128]{3,2,1,0:T(8,128)(2,1)} parameter(3)
  INSTRUCTIONS
}
"""
CACHE = 8 * 4 * 16 * 128 * 2
NEW = 8 * 4 * 128 * 2  # one slot of it


@pytest.mark.parametrize(
    ("lines", "moved", "copies"),
    [
        # A weight that is fetched in two slices and used on the chip is read once.
        (
            """
  %s = ((bf16[128,128]{1,0}), bf16[64,128]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%w)
  %t = ((bf16[128,128]{1,0}), bf16[64,128]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%w)
  %s.1 = bf16[64,128]{1,0:S(1)} slice-done(%s)
  %t.1 = bf16[64,128]{1,0:S(1)} slice-done(%t)
  %w.1 = bf16[128,128]{1,0:S(1)} custom-call(%s.1, %t.1), custom_call_target="ConcatBitcast"
  %y = bf16[8,128]{1,0:S(1)} fusion(%w.1), kind=kOutput, calls=%dot
""",
            128 * 128 * 2,
            0,
        ),
        # One that is read where it lies, for a result that lies in main memory.
        (
            "%y = bf16[8,128]{1,0} fusion(%w), kind=kOutput, calls=%dot",
            128 * 128 * 2 + 8 * 128 * 2,
            0,
        ),
        # Of an embedding the rows that are taken, and which.
        (
            "%x = bf16[8,128]{1,0:S(1)} fusion(%e, %i), kind=kLoop, calls=%gathered",
            8 * 128 * 2 + 8 * 4,
            0,
        ),
        # A cache that is written in place.
        (
            """
  %n = bf16[8,4,1,128]{3,2,1,0:S(1)} custom-call(), custom_call_target="x"
  %k.1 = bf16[8,4,16,128]{3,2,1,0} fusion(%k, %n), kind=kCustom, calls=%written, """
            'backend_config={"aliasing_operands":{"lists":[{"indices":["0","2"]}]}}',
            0,
            0,
        ),
        # Copies and transposes of caches, in main memory and to the chip, synchronous or not.
        ("%k.1 = bf16[8,4,16,128]{3,1,2,0} copy(%k)", 2 * CACHE, 1),
        ("%k.1 = bf16[8,4,16,128]{3,1,2,0:S(1)} copy(%k)", CACHE, 0),
        ("%k.1 = bf16[8,16,4,128]{3,1,2,0} fusion(%k), calls=%turned", 2 * CACHE, 1),
        (
            "%k.1 = (bf16[8,4,16,128]{3,2,1,0}, bf16[8,4,16,128]{3,2,1,0}, u32[]{:S(2)}) "
            "copy-start(%k)",
            2 * CACHE,
            1,
        ),
        (
            "%k.1 = (bf16[8,4,16,128]{3,2,1,0:S(1)}, bf16[8,4,16,128]{3,2,1,0}, u32[]{:S(2)}) "
            "copy-start(%k)",
            CACHE,
            0,
        ),
        ("%w.1 = bf16[128,128]{0,1} copy(%w)", 2 * 128 * 128 * 2, 0),
    ],
)
def test_traffic_and_copies_in_a_tpu_program(lines, moved, copies):
    hlo = Hlo(STEP.replace("INSTRUCTIONS", lines.strip()))
    caches = [jax.ShapeDtypeStruct((8, 4, 16, 128), jnp.bfloat16)]
    assert hlo.traffic(hlo.entry) == moved
    assert hlo.copies(hlo.entry, caches) == copies


# Compilers for GPUs and CPUs say nothing of what is written in place, and nothing is on chip.
WRITES = """
%written (cache: bf16[8,4,16,128], at: s32[8,1], new: bf16[8,1,4,128]) -> bf16[8,4,16,128] {
  %cache = bf16[8,4,16,128]{3,2,1,0} parameter(0)
  %at = s32[8,1]{1,0} parameter(1)
  %new = bf16[8,1,4,128]{3,2,1,0} parameter(2)
  ROOT %scatter = bf16[8,4,16,128]{3,2,1,0} scatter(%cache, %at, %new), to_apply=%second
}

%some (cache.1: bf16[8,4,16,128], new.1: bf16[8,4,1,128]) -> (f32[8,8], bf16[8,4,16,128]) {
  %cache.1 = bf16[8,4,16,128]{3,2,1,0} parameter(0)
  %new.1 = bf16[8,4,1,128]{3,2,1,0} parameter(1)
  %flat = bf16[32,16,128]{2,1,0} bitcast(%cache.1)
  %rows = bf16[32,1,128]{2,1,0} bitcast(%new.1)
  %update = bf16[32,16,128]{2,1,0} dynamic-update-slice(%flat, %rows)
  %shaped = bf16[8,4,16,128]{3,2,1,0} bitcast(%update)
  %other = f32[8,8]{1,0} iota(), iota_dimension=0
  ROOT %both = (f32[8,8]{1,0}, bf16[8,4,16,128]{3,2,1,0}) tuple(%other, %shaped)
}

%read (cache.2: bf16[8,4,16,128], new.2: bf16[8,4,1,128]) -> bf16[8,4,16,128] {
  %cache.2 = bf16[8,4,16,128]{3,2,1,0} parameter(0)
  %new.2 = bf16[8,4,1,128]{3,2,1,0} parameter(1)
  %sum = bf16[8,4,1,128]{3,2,1,0} reduce(%cache.2, %new.2), dimensions={2}, to_apply=%add
  ROOT %update.1 = bf16[8,4,16,128]{3,2,1,0} dynamic-update-slice(%cache.2, %sum)
}

%fresh (new.3: bf16[8,4,1,128]) -> bf16[8,4,16,128] {
  %new.3 = bf16[8,4,1,128]{3,2,1,0} parameter(0)
  %zero = bf16[8,4,16,128]{3,2,1,0} broadcast(%new.3), dimensions={}
  ROOT %update.2 = bf16[8,4,16,128]{3,2,1,0} dynamic-update-slice(%zero, %new.3)
}

ENTRY %main (k: bf16[8,4,16,128], i: s32[8,1], n: bf16[8,1,4,128], m: bf16[8,4,1,128]) -> bf16[8] {
  %k = bf16[8,4,16,128]{3,2,1,0} parameter(0)
  %i = s32[8,1]{1,0} parameter(1)
  %n = bf16[8,1,4,128]{3,2,1,0} parameter(2)
  %m = bf16[8,4,1,128]{3,2,1,0} parameter(3)
  INSTRUCTIONS
}
"""


@pytest.mark.parametrize(
    ("line", "moved"),
    [
        # The update is read and written, and where it goes is read.
        ("%r = bf16[8,4,16,128]{3,2,1,0} scatter(%k, %i, %n), to_apply=%second", 2 * NEW + 32),
        ("%r = bf16[8,4,16,128]{3,2,1,0} fusion(%k, %i, %n), calls=%written", 2 * NEW + 32),
        ("%r = bf16[8,4,16,128]{3,2,1,0} dynamic-update-slice(%k, %m)", 2 * NEW),
        # One of two results, behind other names of the same array.
        (
            "%r = (f32[8,8]{1,0}, bf16[8,4,16,128]{3,2,1,0}) fusion(%k, %m), calls=%some",
            2 * NEW + 256,
        ),
        # What is written is computed from all that is there.
        ("%r = bf16[8,4,16,128]{3,2,1,0} fusion(%k, %m), calls=%read", CACHE + 2 * NEW),
        # Nothing was there: only what is written into it is known.
        ("%r = bf16[8,4,16,128]{3,2,1,0} fusion(%m), calls=%fresh", 2 * NEW),
    ],
)
def test_traffic_of_writes_in_place(line, moved):
    hlo = Hlo(WRITES.replace("INSTRUCTIONS", line))
    assert hlo.traffic(hlo.entry) == moved
    assert hlo.kernels(hlo.entry) == 1


def test_kernels_are_what_a_device_is_given():
    """Each turn of a loop counts; names of arrays and ends of copies do not."""
    hlo = Hlo(LOOP.replace("LIMIT", "7"))
    assert hlo.kernels(hlo.loop()) == 2
    assert hlo.kernels(hlo.entry) == 7 * (2 + 1)


def test_copies_are_those_of_the_device_s_part():
    sharding = NamedSharding(make_mesh(2, 1, 4), P("data", "tensor"))
    whole = jax.ShapeDtypeStruct((16, 16, 16, 128), jnp.bfloat16, sharding=sharding)
    text = STEP.replace("INSTRUCTIONS", "%k.1 = bf16[8,4,16,128]{3,1,2,0} copy(%k)")
    hlo = Hlo(text)
    assert hlo.copies(hlo.entry, [whole]) == 1
    apart = jax.ShapeDtypeStruct(whole.shape, whole.dtype)
    assert hlo.copies(hlo.entry, [apart]) == 0


def test_traffic_of_a_real_program():
    """Where nothing is on chip, at least what goes in and comes out."""

    def program(w, x):
        return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(w @ x), x)

    w, x = np.zeros((64, 64), np.float32), np.zeros((64, 4), np.float32)
    hlo = Hlo(jax.jit(program).lower(w, x).compile().as_text())
    once = hlo.traffic(hlo.loop())
    assert w.nbytes + x.nbytes <= once <= 2 * (w.nbytes + 4 * x.nbytes)
    assert hlo.traffic(hlo.entry) >= 3 * once
