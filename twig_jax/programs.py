"""Compiled programs, read off their text: collectives, memory traffic, copies. Nothing runs.

Programs may be compiled for machines that are not there, see `hardware.find_topology`.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
COPIES = ("copy", "copy-start", "transpose")

# These name or join what is there; what a called computation moves counts there.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call "
    "after-all partition-id replica-id".split()
)
_SLICES = ("slice", "dynamic-slice", "gather")
# Their first operand becomes the result; the operand of this number is written into it.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?(%[\w.\-]+) = (.*?) ([\w\-]+)\((.*?)\)")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+(?:e\dm\d\w*)?)\[([\d,]*)\](\{[^}]*\})?")
_CALL = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")
_LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_NAME = re.compile(r'op_name="(.*?)"')
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_ALIASED = re.compile(r'"aliasing_operands":\{"lists":\[(.*?)\]\}\}')


@dataclass(frozen=True)
class Array:
    """One array of a result. outside: whether it lies in the device's main memory, not on chip."""

    kind: str  # the element type, as bf16
    dims: tuple[int, ...]
    outside: bool

    @property
    def bytes(self) -> float:
        """Its size."""
        bits = 8 if self.kind == "pred" else int(re.findall(r"\d+", self.kind)[0])
        return bits / 8 * math.prod(self.dims)


@dataclass(frozen=True)
class Instruction:
    """One line of a program."""

    name: str
    kind: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    line: str


@dataclass(frozen=True)
class Collective:
    """How often collectives of one kind run, and their bytes on one device, together."""

    count: float
    bytes: float


class Hlo:
    """The text of a compiled program (XLA's HLO) as computations of instructions.

    What runs is followed through calls: loops as often as the compiler or their condition says,
    else `trips` times; of a condition the longest branch, but the shortest where its name matches
    `rare`.
    """

    def __init__(self, text: str, trips: float = 1, rare: str | None = None) -> None:
        self.trips = trips
        self.rare = rare
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        within: dict[str, Instruction] = {}
        for line in text.splitlines():
            if found := _COMPUTATION.match(line):
                within = self.computations[found[1]] = {}
                self.entry = found[1] if line.startswith("ENTRY") else self.entry
            elif found := _INSTRUCTION.match(line):
                name, shape, kind, given = found.groups()
                arrays = tuple(
                    Array(t, tuple(int(d) for d in dims.split(",") if d), "S(" not in layout)
                    for t, dims, layout in _ARRAY.findall(shape)
                )
                operands = tuple(re.findall(r"%[\w.\-]+", given))
                if kind == "constant":
                    operands = (given,)
                within[name] = Instruction(name, kind, arrays, operands, line)

    def loop(self) -> str:
        """The body of the entry's longest loop."""
        bodies = [
            loop[2]
            for one in self.computations[self.entry].values()
            if one.kind == "while" and (loop := _LOOP.search(one.line))
        ]
        return max(bodies, key=lambda name: len(self.computations[name]))

    def run(self, computation: str, times: float = 1) -> Iterator[tuple[str, Instruction, float]]:
        """(computation, instruction, how often) of all that a computation runs, but in fusions."""
        for one in self.computations.get(computation, {}).values():
            yield computation, one, times
            if one.kind == "fusion":
                continue
            again = times * (self._trips(one) if one.kind == "while" else 1)
            for name in self._called(one):
                yield from self.run(name, again)

    def _called(self, one: Instruction) -> list[str]:
        called = _CALL.findall(one.line)
        if one.kind != "conditional":
            return called
        if branches := _BRANCHES.search(one.line):
            called = [name.strip(" %") for name in branches[1].split(",")]
        name = _NAME.search(one.line)
        rare = self.rare and name and re.search(self.rare, name[1])
        pick = min if rare else max
        return [pick(called, key=lambda branch: len(self.computations.get(branch, {})))]

    def _trips(self, loop: Instruction) -> float:
        if told := _TRIPS.search(loop.line):
            return int(told[1])
        found = _LOOP.search(loop.line)
        assert found is not None
        condition = self.computations.get(found[1], {}).values()
        limits = [int(x.operands[0]) for x in condition if x.kind == "constant" and _number(x)]
        return max(limits, default=self.trips)

    def collectives(self, computation: str) -> dict[str, Collective]:
        """By kind, of all that a computation runs.

        Bytes are of the larger of what goes in and what comes out.
        """
        found: dict[str, Collective] = {}
        for name, one, times in self.run(computation):
            kind = one.kind.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            given = sum(array.bytes for array in self._given(name, one))
            made = sum(array.bytes for array in one.results)
            # The beginning of an asynchronous one gives back its operands too.
            made -= given if one.kind.endswith("-start") else 0
            before = found.get(kind, Collective(0, 0))
            found[kind] = Collective(before.count + times, before.bytes + times * max(given, made))
        return dict(sorted(found.items()))

    def traffic(self, computation: str) -> float:
        """Bytes between main memory and what computes, of all that a computation runs.

        Counted are operands and results of every instruction that lie in main memory, and of what
        is updated in place the update. Compilers for TPUs say what lies on the chip; others keep
        all in main memory.
        """
        return sum(times * self._moved(name, x) for name, x, times in self.run(computation))

    def kernels(self, computation: str) -> float:
        """How many instructions a device is given, of all that a computation runs."""
        return sum(
            times
            for _, one, times in self.run(computation)
            if one.kind not in _FREE and not one.kind.endswith("-done")
        )

    def copies(self, computation: str, like: Any) -> float:
        """Copies and transposes into main memory of whole arrays of the shapes of a tree `like`.

        like: of arrays or abstract arrays, as they are placed on the devices.
        """
        wanted = set()
        for x in jax.tree.leaves(like):
            shape = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
            kind = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[x.dtype.name]
            wanted.add((kind, tuple(sorted(shape))))
        count = 0.0
        for _, one, times in self.run(computation):
            if one.kind == "copy-start":
                whole = all(x.outside for x in one.results[:2])
            else:
                whole = self._root(one) in COPIES and one.results[0].outside
            if whole and (one.results[0].kind, tuple(sorted(one.results[0].dims))) in wanted:
                count += times
        return count

    def widened(self, computation: str, like: Any) -> float:
        """Float arrays in main memory that are the int8 kernels [out, in] of a tree `like`.

        like: as for `copies`. Compilers should widen kernels where a product reads them instead.
        """
        kernels = [x for x in jax.tree.leaves(like) if x.dtype == "int8"]
        wanted = {tuple(sorted(x.sharding.shard_shape(x.shape))) for x in kernels}
        return sum(
            times
            for _, one, times in self.run(computation)
            if one.kind in ("convert", "fusion", "multiply")
            and any(
                array.outside and array.kind[0] in "bf" and tuple(sorted(array.dims)) in wanted
                for array in one.results
            )
        )

    def _root(self, one: Instruction) -> str:
        """The kind of an instruction; of a fusion, that of its last one but bitcasts."""
        if one.kind != "fusion":
            return one.kind
        inner = [x.kind for x in self._fused(one).values() if x.kind != "bitcast"]
        return inner[-1] if inner else one.kind

    def _fused(self, fusion: Instruction) -> dict[str, Instruction]:
        called = _CALL.search(fusion.line)
        return {} if called is None else self.computations.get(called[1], {})

    def _given(self, computation: str, one: Instruction) -> list[Array]:
        there = self.computations[computation]
        return [x for name in one.operands if name in there for x in there[name].results]

    def _moved(self, computation: str, one: Instruction) -> float:
        if one.kind in _FREE or one.kind.endswith("-done"):
            return 0
        if one.kind in ("copy-start", "slice-start"):
            # Source and destination, of which a slice's source is larger.
            ends = one.results[:2]
            return min(x.bytes for x in ends) * sum(x.outside for x in ends)
        there = self.computations[computation]
        read = [there[name].results if name in there else () for name in one.operands]
        places = [*read, *((x,) for x in one.results)]
        aliased = _ALIASED.search(one.line)
        in_place = re.findall(r"\d+", aliased[1]) if aliased else ()
        known = self._sliced(one) | self._updated(there, one) | {int(i): 0.0 for i in in_place}
        return sum(
            known.get(i, sum(x.bytes for x in arrays if x.outside))
            for i, arrays in enumerate(places)
        )

    def _updated(self, there: dict[str, Instruction], one: Instruction) -> dict[int, float]:
        """Bytes of operands, and after them of results, by place, that are updated in place."""
        inner = there if one.kind in _UPDATES else self._fused(one) if one.kind == "fusion" else {}
        if not inner:
            return {}

        def source(name: str) -> Instruction:
            found = inner[name]
            return source(found.operands[0]) if found.kind == "bitcast" else found

        root = list(inner.values())[-1] if one.kind == "fusion" else one
        found = {}
        for i, name in enumerate(root.operands if root.kind == "tuple" else [root.name]):
            update = source(name)
            if update.kind not in _UPDATES:
                continue
            written = inner[update.operands[_UPDATES[update.kind]]]
            found[len(one.operands) + i] = sum(array.bytes for array in written.results)
            target, number = source(update.operands[0]), 0
            if one.kind == "fusion":
                readers = [
                    x
                    for x in inner.values()
                    if x.kind != "bitcast"
                    and x != update
                    and any(source(name) == target for name in x.operands if name in inner)
                ]
                if target.kind != "parameter" or any(x.kind not in _SLICES for x in readers):
                    continue
                number = _position(target)
            found[number] = 0.0
        return found

    def _sliced(self, one: Instruction) -> dict[int, float]:
        """Bytes read of operands, by number, of which an instruction takes slices alone."""
        if one.kind in _SLICES:
            return {0: sum(x.bytes for x in one.results)}
        if one.kind != "fusion":
            return {}
        inner = self._fused(one).values()
        found = {}
        for parameter in inner:
            if parameter.kind != "parameter":
                continue
            users = [x for x in inner if parameter.name in x.operands]
            if users and all(x.kind in _SLICES and x.operands[0] == parameter.name for x in users):
                found[_position(parameter)] = sum(x.bytes for user in users for x in user.results)
        return found


def _number(constant: Instruction) -> bool:
    return constant.operands[0].isdigit()


def _position(parameter: Instruction) -> int:
    return int(parameter.line.split("parameter(")[1].split(")")[0])


def working_memory(compiled: Any) -> float:
    """Bytes that a compiled program takes on a device beside its arguments.

    Outputs that are written over arguments take none.
    """
    found = compiled.memory_analysis()
    return (
        found.temp_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
        + found.generated_code_size_in_bytes
    )


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of arrays or abstract arrays: all of those without a sharding."""

    def held(x: Any) -> tuple[int, ...]:
        sharding = getattr(x, "sharding", None)
        return sharding.shard_shape(x.shape) if sharding else x.shape

    return sum(math.prod(held(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def abstract(tree: Any, placed: Any) -> Any:
    """A tree of shapes, each in its sharding from a like tree."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, placed
    )
