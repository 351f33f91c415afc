"""Where time goes, from traces as an H200 leaves them: kernels of a graph, and kernels alone."""

import contextlib
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from twig_jax.evaluation.profile import profile

ATTENTION = "jit(decode)/while/body/Llava.run/layers_3/q_proj/dot_general"
SUM = "jit(decode)/while/body/text.run/layers_3/add"
TEXT = f"""\
HloModule jit_decode

ENTRY %main (p.1: f32[4], p.2: f32[4]) -> f32[4] {{
  %p.1 = f32[4]{{0}} parameter(0)
  %p.2 = f32[4]{{0}} parameter(1)
  %gemm_fusion_dot.3 = f32[4]{{0}} fusion(%p.1), calls=%a, metadata={{op_name="{ATTENTION}"}}
  %loop_add_fusion.1 = f32[4]{{0}} fusion(%p.2), calls=%b, metadata={{op_name="{SUM}"}}
  %while.7 = f32[4]{{0}} while(%p.1), condition=%c, body=%d
  ROOT %copy.2 = f32[4]{{0}} copy(%loop_add_fusion.1)
}}
"""


def event(name, op, microseconds, module="jit_decode"):
    stats = {} if op is None else {"hlo_op": op, "hlo_module": module}
    return SimpleNamespace(name=name, stats=stats.items(), duration_ns=1e3 * microseconds)


EVENTS = [
    event("gemm_fusion_dot_3", "command_buffer_8", 20),
    event("gemm_fusion_dot_3", "command_buffer_9", 22),
    event("loop_add_fusion_1", "loop_add_fusion.1", 2),
    event("MemcpyD2D", "copy.2", 1),
    event("memcpy32_post", "command_buffer_8", 3),  # nothing of the program
    event("MemcpyD2H", "while.7", 9),  # lasts as long as what it calls
    event("cuModuleLoad", None, 7),
    event("loop_add_fusion_1", "loop_add_fusion.1", 5, "jit_other"),
]


@pytest.fixture
def traced(monkeypatch):
    """Leaves a trace of EVENTS."""

    @contextlib.contextmanager
    def trace(folder):
        yield
        (Path(folder) / "host.xplane.pb").touch()

    line = SimpleNamespace(events=EVENTS)
    planes = SimpleNamespace(planes=[SimpleNamespace(lines=[line])])
    monkeypatch.setattr(jax.profiler, "trace", trace)
    monkeypatch.setattr(jax.profiler, "ProfileData", SimpleNamespace(from_file=lambda path: planes))


def test_kernels_are_told_by_their_place_in_the_model(traced):
    program = SimpleNamespace(as_text=lambda: TEXT)
    called = []
    parts = profile(lambda: called.append(1), {"decode": program})
    assert called == [1]
    found = [(p.program, p.name, p.count, round(1e6 * p.seconds)) for p in parts]
    assert found == [
        ("decode", "layers/q_proj/dot_general", 2, 42),
        ("decode", "memcpy32_post", 1, 3),
        ("decode", "text.run/layers/add", 1, 2),
        ("decode", "copy f32[4]", 1, 1),
    ]
