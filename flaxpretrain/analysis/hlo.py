"""Reads a compiled TPU program: cycles, matrix products, kernels and collectives of one step.

The compiled text holds XLA's own schedule. Each fusion and copy carries the cycles that XLA's cost
model expects of it; loops are written once and counted here as often as they run.
"""

import dataclasses
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np

_HEADER = re.compile(r"^(?:ENTRY )?%(\S+) \(.*\{$")
_END = re.compile(r"\}(, |$)")
_START = re.compile(r"^\s+(?:ROOT )?%(\S+) = ")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_KERNEL_COST = re.compile(r'"cost_estimate":\{[^}]*?"flops":"?(\d+)')
_CALLED = re.compile(
    r"\b(?:calls|to_apply|branch_computations|called_computations)=(\{[^}]*\}|%[^\s,]+)"
)

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
"""Kinds of communication between devices; `send` and `recv` are not used by jitted programs."""

_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "async-start",
    "after-all",
    "opt-barrier",
    "partition-id",
    "iota",
}
"""Instructions that move no bytes themselves."""

_OFFLOADED = "custom-call-start"
"""Starts what a SparseCore does beside the matrix units, such as the reduction of gradients."""

_UPDATE = "dynamic-update-slice"

_ELEMENT = "get-tuple-element"

_SLICES = {"dynamic-slice", "slice", "gather"}
"""Instructions that read as much of their first operand as they return."""

_SPLASH_PRODUCTS = (("_fwd", 2), ("_dq", 3), ("_dkv", 4))
"""Matrix products over [L, S, K] of each splash attention kernel, by a part of its name.

Forward: scores, context. Gradient of the query: scores again, gradient of the weights, query.
Gradient of key and value: scores again, gradient of the weights, key, value.
"""


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array type of a program."""

    dtype: str
    dimensions: tuple[int, ...]
    on_chip: bool = False
    """In a memory other than HBM."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dimensions)

    @property
    def bytes(self) -> int:
        """Bytes without the padding of tiles."""
        digits = re.search(r"\d+", self.dtype)
        bits = 8 if digits is None else int(digits.group())  # pred is a byte
        return -(-self.size * bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: `%name = type opcode(operands), attributes`."""

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: str
    attributes: str

    @property
    def operand_names(self) -> list[str]:
        """Names of the instructions it reads."""
        return re.findall(r"%([^\s,)]+)", self.operands)

    @property
    def cycles(self) -> int:
        """What XLA's cost model expects of it; 0 where it says nothing."""
        found = _CYCLES.search(self.attributes)
        return int(found.group(1)) if found else 0

    @property
    def called(self) -> list[str]:
        """Computations that it runs."""
        return [
            name
            for group in _CALLED.findall(self.attributes)
            for name in re.findall(r"%([^\s,}]+)", group)
        ]

    def attribute(self, name: str) -> str:
        """The text of `name=...` up to the next space; empty where it is not there."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^\s,]+)", self.attributes)
        return found.group(1) if found else ""


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations of a compiled module."""

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str


@dataclasses.dataclass
class Totals:
    """What one device does in one run of the program.

    cycles: XLA's estimate, without kernels and collectives.
    flops: of the matrix products, kernels not included.
    hbm_bytes: read from and written to HBM; what the compiler keeps on the chip is left out.
    kernel_flops: of the custom kernels, by name.
    collective_bytes, collective_counts: payload of one device and number of operations, by kind.
    hidden_bytes: those of `collective_bytes` that are under way while the device computes, if only
        for a part of their time.
    notes: what could not be counted.
    """

    cycles: int = 0
    flops: int = 0
    hbm_bytes: int = 0
    kernel_flops: Counter[str] = dataclasses.field(default_factory=Counter)
    kernel_calls: Counter[str] = dataclasses.field(default_factory=Counter)
    head_sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    collective_bytes: Counter[str] = dataclasses.field(default_factory=Counter)
    collective_counts: Counter[str] = dataclasses.field(default_factory=Counter)
    hidden_bytes: Counter[str] = dataclasses.field(default_factory=Counter)
    notes: list[str] = dataclasses.field(default_factory=list)


def parse(text: str) -> Program:
    """The program of `compiled.as_text()`."""
    computations: dict[str, tuple[Instruction, ...]] = {}
    entry = name = ""
    lines: list[str] = []
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            name, lines = header.group(1), []
            if line.startswith("ENTRY"):
                entry = name
        elif _END.match(line) and name:
            computations[name] = tuple(_instruction(text) for text in lines)
            name = ""
        elif name and _START.match(line):
            lines.append(line)
        elif name and lines:
            lines[-1] += line  # the attributes of kernels run over several lines
    return Program(computations, entry)


def _instruction(line: str) -> Instruction:
    start = _START.match(line)
    if start is None:
        raise ValueError(f"not an instruction: {line[:80]}")
    rest = line[start.end() :]
    length = _closing(rest) if rest.startswith("(") else rest.index(" ")
    opcode, _, tail = rest[length:].strip().partition("(")
    end = _closing("(" + tail) - 1
    return Instruction(start.group(1), shapes(rest[:length]), opcode, tail[: end - 1], tail[end:])


def _closing(text: str) -> int:
    """The index behind the bracket that closes the one that `text` begins with."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return found.end()
    raise ValueError(f"unbalanced: {text[:80]}")


def shapes(text: str) -> tuple[Shape, ...]:
    """All array types in a text."""
    return tuple(
        Shape(dtype, tuple(int(d) for d in dimensions.split(",") if d), "S(" in layout)
        for dtype, dimensions, layout in _ARRAY.findall(text)
    )


def totals(program: Program) -> Totals:
    """Sums over the program, each loop's body taken as often as it runs."""
    sums = Totals()
    _visit(program, program.entry, 1, sums, scheduled=True, chains=set())
    return sums


def _visit(
    program: Program,
    name: str,
    times: int,
    sums: Totals,
    *,
    scheduled: bool,
    chains: set[str],
    hidden: bool = False,
) -> None:
    """Adds `times` runs of a computation; inside fusions cycles stand on the fusion itself.

    `chains` are the collectives seen that run beside several fusions, each of which shows them;
    `hidden` says that all of it runs beside other computation.
    """
    computation = program.computations[name]
    types = {instruction.name: instruction.shapes for instruction in computation}
    for instruction in computation:
        if scheduled:
            sums.cycles += times * instruction.cycles
            sums.hbm_bytes += times * _traffic(program, instruction, types)
        kind = instruction.opcode.removesuffix("-start")
        if instruction.opcode in ("convolution", "dot"):
            sums.flops += times * _product_flops(instruction, types)
        elif kind in COLLECTIVES:
            chain = _chain(instruction)
            if chain not in chains:
                payload = times * _payload(instruction, kind, types)
                sums.collective_counts[kind] += times
                sums.collective_bytes[kind] += payload
                if chain or hidden or _computes_meanwhile(computation, instruction):
                    sums.hidden_bytes[kind] += payload
            if chain:
                chains.add(chain)
        elif instruction.opcode == "custom-call":
            _add_kernel(instruction, times, sums)
        elif instruction.opcode == "while":
            trips = _trips(program, instruction)
            if trips is None:
                sums.notes.append(f"loop {instruction.name}: unknown trip count, counted once")
            body = instruction.attribute("body").removeprefix("%")
            _visit(program, body, times * (trips or 1), sums, scheduled=scheduled, chains=set())
        if instruction.opcode in ("fusion", "call", "conditional", "async-start", _OFFLOADED):
            inner = scheduled and instruction.opcode not in ("fusion", _OFFLOADED)
            beside = hidden or _computes_meanwhile(computation, instruction)
            for called in instruction.called:
                _visit(program, called, times, sums, scheduled=inner, chains=chains, hidden=beside)


def _chain(instruction: Instruction) -> str:
    """What marks a collective that is cut up and fused with what is computed beside it."""
    found = re.search(r'\bchain_id="(\d+)"', instruction.attributes)
    return f"{found.group(1)} {instruction.attribute('channel_id')}" if found else ""


def _computes_meanwhile(computation: tuple[Instruction, ...], start: Instruction) -> bool:
    """Whether the schedule has computation between the start of something and its end."""
    if not start.opcode.endswith("-start"):
        return False
    stages = {start.name}
    for instruction in computation[computation.index(start) + 1 :]:
        if stages & set(instruction.operand_names):
            if instruction.opcode.endswith("-done"):
                return False
            stages.add(instruction.name)  # an update between start and end
        elif instruction.cycles or instruction.opcode == "while" or _is_kernel(instruction):
            return True
    return False


def _is_kernel(instruction: Instruction) -> bool:
    """Whether it is a Pallas kernel, and no marker of the compiler."""
    target = _TARGET.search(instruction.attributes)
    return target is not None and target.group(1) == "tpu_custom_call"


def _traffic(
    program: Program, instruction: Instruction, types: Mapping[str, tuple[Shape, ...]]
) -> int:
    """Bytes of HBM that a scheduled instruction reads and writes, each operand and result once."""
    opcode = instruction.opcode
    marker = opcode == "custom-call" and "tpu_custom_call" not in instruction.attributes
    if opcode in _FREE or marker or opcode.endswith(("-done", "-update")):
        return 0
    operands = [types.get(name, ()) for name in instruction.operand_names]
    read, written = [_hbm(shapes) for shapes in operands], _hbm(instruction.shapes)
    if opcode.endswith("-start"):
        written = max(written - sum(read), 0)  # the result of a start repeats the operands
    if opcode.removesuffix("-start") in _SLICES:
        result = sum(shape.bytes for shape in instruction.shapes[-2:-1] or instruction.shapes)
        read = [min(read[0], result if opcode.endswith("-start") else written), *read[1:]]
    if opcode == _UPDATE:
        return 2 * read[1]
    if opcode == "fusion" and instruction.called:
        inner = program.computations[instruction.called[0]]
        read = [min(whole, _read_inside(inner, i)) for i, whole in enumerate(read)]
        written = min(written, _written_inside(inner))
    return sum(read) + written


def _hbm(shapes: tuple[Shape, ...]) -> int:
    return sum(shape.bytes for shape in shapes if not shape.on_chip)


def _read_inside(computation: tuple[Instruction, ...], number: int) -> int:
    """Bytes that a fusion reads of one operand: slices of it, where it takes nothing else."""
    name = next(
        i.name for i in computation if i.opcode == "parameter" and i.operands == str(number)
    )
    users = [i for i in computation if name in i.operand_names]
    total = 0
    for user in users:
        first = user.operand_names[0] == name
        if user.opcode in _SLICES and first:
            total += sum(shape.bytes for shape in user.shapes)
        elif not (user.opcode == _UPDATE and first):
            return sys.maxsize
    return total


def _written_inside(computation: tuple[Instruction, ...]) -> int:
    """Bytes that a fusion writes: of an array that is updated in place, the update alone."""
    by_name = {i.name: i for i in computation}
    root = computation[-1]
    results = [by_name[n] for n in root.operand_names] if root.opcode == "tuple" else [root]
    updates = {i: by_name[i.operand_names[1]] for i in results if i.opcode == _UPDATE}
    return sum(s.bytes for i in results for s in updates.get(i, i).shapes)


def _trips(program: Program, loop: Instruction) -> int | None:
    """How often a loop runs: XLA's own count, or the bound of its counter over the counter's step.

    XLA unrolls the loops of its collective products and leaves the bound as it was.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known.group(1))
    condition = loop.attribute("condition").removeprefix("%")
    bounds = {
        int(i.operands)
        for i in _within(program, condition)
        if i.opcode == "constant" and re.fullmatch(r"\d+", i.operands)
    }
    return -(-bounds.pop() // _step(program, loop)) if len(bounds) == 1 else None


def _step(program: Program, loop: Instruction) -> int:
    """By how much one run of a loop's body raises the counter that its condition looks at."""
    condition, body = (
        program.computations[loop.attribute(name).removeprefix("%")]
        for name in ("condition", "body")
    )
    place = next((i.attribute("index") for i in condition if i.opcode == _ELEMENT), "")
    by_name = {i.name: i for i in body}
    if not place or len(body[-1].operand_names) <= int(place):
        return 1
    raised = by_name.get(body[-1].operand_names[int(place)])
    while raised is not None and raised.opcode == "copy":
        raised = by_name.get(raised.operand_names[0])
    if raised is None or raised.opcode != "add":
        return 1
    added = [by_name[name] for name in raised.operand_names if name in by_name]
    steps = [int(i.operands) for i in added if i.opcode == "constant" and i.operands.isdigit()]
    counts = any(i.opcode == _ELEMENT and i.attribute("index") == place for i in added)
    return steps[0] if counts and len(steps) == 1 and steps[0] > 0 else 1


def _within(program: Program, name: str) -> Iterator[Instruction]:
    for instruction in program.computations[name]:
        yield instruction
        for called in instruction.called:
            yield from _within(program, called)


def _payload(instruction: Instruction, kind: str, types: Mapping[str, tuple[Shape, ...]]) -> int:
    """Bytes of one device's full array: the result, or what a reduce-scatter starts from."""
    result = sum(shape.bytes for shape in instruction.shapes)
    operands = sum(s.bytes for name in instruction.operand_names for s in types.get(name, ()))
    if kind == "reduce-scatter":
        return operands
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        return result - operands  # the result of a start repeats the operands
    return result


def _add_kernel(instruction: Instruction, times: int, sums: Totals) -> None:
    if not _is_kernel(instruction):
        return
    name = re.sub(r"\.\d+$", "", instruction.name)
    sums.kernel_calls[name] += times
    stated = _KERNEL_COST.search(instruction.attributes)
    constraints = instruction.attributes[
        instruction.attributes.find("operand_layout_constraints") :
    ]
    rows = [s.dimensions for s in shapes(constraints) if len(s.dimensions) >= 3 and s.dtype != "s8"]
    heads = re.search(r"heads_of_(\d+)", name)
    if heads:
        sums.head_sizes[name] = int(heads.group(1))
    if stated:
        sums.kernel_flops[name] += times * int(stated.group(1))
    elif "splash" in name and len(rows) >= 2:
        query, key = rows[0], rows[1]
        each = 2 * math.prod(query) * key[-2]
        sums.kernel_flops[name] += times * _splash_products(name, query, instruction) * each
        sums.head_sizes[name] = query[-1]
    else:
        sums.notes.append(f"kernel {name}: no cost of its own, counted as 0")


def _splash_products(name: str, query: tuple[int, ...], kernel: Instruction) -> int:
    """How many products a splash kernel makes; one whose name tells no direction shows it.

    A fused backward kernel also returns parts of the query's gradient, with one more axis.
    """
    fused = any(len(s.dimensions) > len(query) for s in kernel.shapes)
    direction = next((part for part, _ in _SPLASH_PRODUCTS if part in name), None)
    if direction is None:
        direction = "_dkv" if fused else "_fwd"
    return dict(_SPLASH_PRODUCTS)[direction] + (fused and direction == "_dkv")


def _product_flops(instruction: Instruction, types: Mapping[str, tuple[Shape, ...]]) -> int:
    """2 FLOPs a multiply-add of a `dot` or a `convolution`, positions in the padding left out."""
    left, right = (types[name][0].dimensions for name in instruction.operand_names[:2])
    output = instruction.shapes[0].dimensions
    if instruction.opcode == "dot":
        contracted = re.findall(r"\d+", instruction.attribute("lhs_contracting_dims"))
        return 2 * math.prod(output) * math.prod(left[int(d)] for d in contracted)
    lhs, rhs, out = re.split(r"_|->", instruction.attribute("dim_labels"))
    groups = int(instruction.attribute("feature_group_count") or 1)
    batch_groups = int(instruction.attribute("batch_group_count") or 1)
    count = left[lhs.index("f")] * output[out.index("f")] * left[lhs.index("b")]
    count //= groups * batch_groups
    window = _window(instruction.attributes)
    for i, label in enumerate(sorted(c for c in lhs if c.isdigit())):
        sizes = left[lhs.index(label)], right[rhs.index(label)], output[out.index(label)]
        count *= _valid_positions(*sizes, {key: values[i] for key, values in window.items()})
    return 2 * count


def _window(attributes: str) -> dict[str, list[str]]:
    found = re.search(r"\bwindow=\{([^}]*)\}", attributes)
    parts = dict(part.split("=") for part in found.group(1).split()) if found else {}
    return {name: value.split("x") for name, value in parts.items()}


def _valid_positions(inputs: int, kernel: int, outputs: int, window: Mapping[str, str]) -> int:
    """Pairs of output and kernel position that meet a real input, along one dimension."""
    low = int(window.get("pad", "0_0").split("_")[0])
    stride, dilation = int(window.get("stride", 1)), int(window.get("rhs_dilate", 1))
    base = int(window.get("lhs_dilate", 1))
    places = np.arange(outputs)[:, None] * stride - low + np.arange(kernel)[None] * dilation
    return int(np.sum((places >= 0) & (places % base == 0) & (places // base < inputs)))
