"""Where the time of a program goes, in words: a trace of the device, summed up by parts of a model.

The trace itself, hundreds of megabytes of it, stays in a temporary folder.
"""

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from twig_jax.programs import Hlo

_SCOPE = re.compile(r'op_name="(.*?)"')
# These last as long as what they call.
_CALLERS = ("while", "conditional", "call")
_NOISE = re.compile(r"^(jit|jvp|transpose|vmap|closed_call|checkpoint|while|body|cond|branch_\d+)")


@dataclass(frozen=True)
class Part:
    """program: of "prefill" and "decode". name: of a part of a model and its operation."""

    program: str
    name: str
    count: int
    seconds: float


def profile(call: Callable[[], Any], programs: Mapping[str, Any]) -> list[Part]:
    """The parts of one call that take longest, longest first.

    programs: what `Generator.compiled` gave for the same shapes. Seconds are those of the devices,
    or of all threads where the device is a CPU.
    """
    names = {f"jit_{program}": _names(compiled) for program, compiled in programs.items()}
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call()
        for path in Path(folder).rglob("*.xplane.pb"):
            for op, module, seconds in _events(path):
                if module in names and (name := names[module].get(_kernel(op), op)):
                    found[module.removeprefix("jit_"), name].append(seconds)
    parts = [Part(*key, len(each), sum(each)) for key, each in found.items()]
    return sorted(parts, key=lambda part: -part.seconds)


def _names(compiled: Any) -> dict[str, str]:
    """What operations do, by name: a part of the model, else their result; "" for callers."""
    found = {}
    for computation in Hlo(compiled.as_text()).computations.values():
        for one in computation.values():
            scope = _SCOPE.search(one.line)
            shape = " ".join(f"{x.kind}{list(x.dims)}" for x in one.results[:1])
            name = _readable(scope[1]) if scope else f"{one.kind} {shape}"
            found[_kernel(one.name.lstrip("%"))] = "" if one.kind in _CALLERS else name
    return found


def _kernel(operation: str) -> str:
    """What a GPU's kernel is called, after an operation or the first of several equal ones."""
    return re.sub(r"\W", "_", operation)


def _events(path: Path) -> list[tuple[str, str, float]]:
    """(operation, module, seconds) of all that ran."""
    found = []
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                told = dict(event.stats)
                if "hlo_op" in told and not event.name.startswith("end: "):
                    module = re.sub(r"\(.*", "", str(told.get("hlo_module", "")))
                    # Kernels that a GPU is given together, as a graph, have the graph's name there.
                    together = str(told["hlo_op"]).startswith("command_buffer")
                    op = event.name if together else str(told["hlo_op"])
                    found.append((op, module, event.duration_ns / 1e9))
    return found


def _readable(scope: str) -> str:
    """jit(decode)/while/body/Llava.run/text/layers_3/q_proj/dot_general -> layers/q_proj/..."""
    parts = [part for part in scope.split("/") if not _NOISE.match(part)]
    return "/".join(re.sub(r"_\d+$", "", part) for part in parts[-3:])
