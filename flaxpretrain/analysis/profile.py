"""Reads a profiler's trace: where the time of a step goes, by parts of the work.

A trace of `jax.profiler` holds the events of every device and the compiled programs they belong
to. An event names an instruction of a program; the instruction knows the functions and scopes it
was traced in, and these say which part of the work it is. Kernels that name no instruction, as
those of a CUDA graph, are told by their own names.
"""

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jax.profiler import ProfileData

from flaxpretrain.analysis.hlo import COLLECTIVES
from flaxpretrain.data.protobuf import fields, varint
from flaxpretrain.errors import UserError

STEP = "train"
"""Name of the annotations that mark steps in a trace."""

PARTS = ("attention", "matmul", "head", "optimizer", "elementwise", "collectives", "idle")
"""Parts of a step: scores and context of attention; other matrix products; everything of the
vocabulary head and its loss; the update; the rest of the arithmetic, moves of data included;
communication that no arithmetic hides; and nothing at all."""

LONGEST = 10
"""Instructions that a table names."""

_CONTROL = ("while", "conditional", "call", "async-start", "async-update", "async-done")
_ATTENTION_KERNEL = re.compile(r"fmha|flash|splash|cudnn.*(sdpa|attention)", re.IGNORECASE)
_PRODUCT_KERNEL = re.compile(r"gemm|nvjet|cutlass|cublas|xmma|matmul", re.IGNORECASE)
_COLLECTIVE_KERNEL = re.compile(
    r"nccl|" + "|".join(kind.replace("-", "[-_]?") for kind in COLLECTIVES), re.IGNORECASE
)
_SCOPES = {
    "optimizer": re.compile(r"(^|[/(])optimizer\b"),
    "attention": re.compile(r"(^|[/(])attention\b|(^|[/ ])attend( |$)"),
    "head": re.compile(
        r"(^|[/(])head\b|[. ]logits( |$)|[. ](cross_entropy|accuracy|log_likelihood)( |$)"
    ),
}


class Instruction(NamedTuple):
    """An instruction of a compiled program, as far as a table needs it.

    `opcodes` are its own and those of the computations it calls; `origin` are scopes, and the names
    of the functions it was traced in, with blanks between.
    """

    opcodes: frozenset[str]
    target: str
    origin: str


class Event(NamedTuple):
    """Something a device did, in nanoseconds of the trace's clock."""

    begin: float
    end: float
    part: str
    name: str


@dataclasses.dataclass(frozen=True)
class StepTimes:
    """What one device did in a step, on average; milliseconds.

    `by_part` sums up to `milliseconds`: an instant in which several kernels run is shared among
    them, and goes to communication only where there is nothing else. `busy` is what the kernels of
    a part took, hidden or not. `longest` are instructions and what they took in a step.
    """

    device: str
    steps: int
    milliseconds: float
    by_part: Mapping[str, float]
    busy: Mapping[str, float]
    longest: tuple[tuple[str, str, float], ...]

    def lines(self) -> list[str]:
        """A table as text."""
        found = [
            f"{self.device}: {self.milliseconds:.3f} ms a step, mean of {self.steps}",
            f"{'part':14}{'ms a step':>12}{'share':>9}{'kernels, ms':>14}",
        ]
        for part in PARTS:
            time, busy = self.by_part.get(part, 0.0), self.busy.get(part, 0.0)
            kernels = "" if part == "idle" else f"{busy:14.3f}"
            found.append(f"{part:14}{time:12.3f}{time / self.milliseconds:9.1%}{kernels}")
        found += ["", "the longest:"]
        found += [f"{time:12.3f} ms  {part:12} {name}" for name, part, time in self.longest]
        return found


def newest_trace(folder: Path) -> Path:
    """The newest trace under a folder, or the file itself.

    Raises:
        UserError: there is none.
    """
    if folder.is_file():
        return folder
    found = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(
            f"{folder} holds no trace (*.xplane.pb): name a workdir whose run had --profile-steps, "
            "or the folder that jax.profiler.start_trace wrote to"
        )
    return found[-1]


def step_times(folder: Path) -> list[StepTimes]:
    """Where the time of a step goes, for each device in the newest trace under a folder.

    Raises:
        UserError: there is no trace, it cannot be read, or no device did anything.
    """
    path = newest_trace(folder)
    try:
        content = path.read_bytes()
        programs = _programs(content)
        data = ProfileData.from_serialized_xspace(content)
        steps, events = _read(data, programs)
    except (ValueError, IndexError, RuntimeError) as error:
        raise UserError(f"{path} is no trace, or damaged: {error}") from error
    found = [_times(device, steps, events[device]) for device in sorted(events)]
    if not found:
        raise UserError(f"{path} holds no event of a device: profile steps that do some work")
    return found


def _read(
    data: Any, programs: Mapping[str, Mapping[str, Instruction]]
) -> tuple[int, dict[str, list[Event]]]:
    """The number of steps in a trace, and the events of each device."""
    known = _Known(programs)
    steps: set[Any] = set()
    events: dict[str, list[Event]] = defaultdict(list)
    for plane in data.planes:
        device = plane.name.startswith("/device:")
        if not device and plane.name != "/host:CPU":
            continue
        lines = list(plane.lines)
        if device and not (streams := [x for x in lines if x.name.startswith("Stream")]):
            lines = [line for line in lines if line.name == "XLA Ops"]
        elif device:
            lines = streams
        for line in lines:
            for event in line.events:
                stats = dict(event.stats) if not device or event.duration_ns else {}
                if not device and event.name == STEP and "step_num" in stats:
                    steps.add(stats["step_num"])
                if not event.duration_ns or not (device or "hlo_op" in stats):
                    continue
                part = known.part_of(event.name, stats)
                if part is not None:
                    name = str(stats.get("hlo_op") or event.name)
                    begin, end = event.start_ns, event.start_ns + event.duration_ns
                    place = plane.name if device else f"CPU:{stats.get('device_ordinal', 0)}"
                    events[place].append(Event(begin, end, part, name))
    # A GPU's trace also has the host's plane, whose few instructions are no device's work.
    devices = [name for name in events if name.startswith("/device:")]
    return max(len(steps), 1), {name: events[name] for name in devices or events}


class _Known:
    """The instructions of all programs, and what was found out about them."""

    def __init__(self, programs: Mapping[str, Mapping[str, Instruction]]) -> None:
        self._programs = programs
        self._by_kernel: dict[str, Instruction] = {}
        for program in programs.values():
            for name, instruction in program.items():
                self._by_kernel.setdefault(_kernel_name(name), instruction)
        self._seen: dict[tuple[str, str, str], str | None] = {}

    def part_of(self, name: str, stats: Mapping[str, Any]) -> str | None:
        """The part of an event; None where it stands for the events inside it."""
        key = (name, str(stats.get("hlo_module", "")), str(stats.get("hlo_op", "")))
        if key not in self._seen:
            self._seen[key] = part_of(name, self._find(*key))
        return self._seen[key]

    def _find(self, name: str, module: str, operation: str) -> Instruction | None:
        # A TPU's event is called `%name = type opcode(..)`.
        operation = operation or name.removeprefix("%").split(" ")[0]
        for program in (module, *self._programs):
            if operation in self._programs.get(program, ()):
                return self._programs[program][operation]
        return self._by_kernel.get(_kernel_name(operation))


def _kernel_name(instruction: str) -> str:
    return re.sub(r"\W", "_", instruction)


def part_of(kernel: str, instruction: Instruction | None) -> str | None:
    """Which part of a step a kernel is, by its instruction, where that is known, and its name.

    None for a loop or call, which is nothing beside what it runs.
    """
    opcodes = instruction.opcodes if instruction else frozenset()
    origin = instruction.origin if instruction else ""
    if len(opcodes) and opcodes <= frozenset(_CONTROL):
        return None
    starts = {opcode.removesuffix("-start").removesuffix("-done") for opcode in opcodes}
    if _COLLECTIVE_KERNEL.search(kernel) or starts & set(COLLECTIVES):
        return "collectives"
    for name in ("optimizer", "attention", "head"):
        if _SCOPES[name].search(origin):
            return name
    names = f"{kernel} {instruction.target if instruction else ''}"
    if _ATTENTION_KERNEL.search(names):
        return "attention"
    if opcodes & {"dot", "convolution"} or _PRODUCT_KERNEL.search(names):
        return "matmul"
    return "elementwise"


def _times(device: str, steps: int, events: list[Event]) -> StepTimes:
    begin, end = min(e.begin for e in events), max(e.end for e in events)
    spent = _shared_time(events)
    spent["idle"] = end - begin - sum(spent.values())
    busy: dict[str, float] = defaultdict(float)
    by_name: dict[tuple[str, str], float] = defaultdict(float)
    for event in events:
        busy[event.part] += event.end - event.begin
        by_name[event.name, event.part] += event.end - event.begin
    scale = 1e-6 / steps
    longest = sorted(by_name, key=lambda of: -by_name[of])
    return StepTimes(
        device.removeprefix("/device:"),
        steps,
        (end - begin) * scale,
        {name: time * scale for name, time in spent.items()},
        {name: time * scale for name, time in busy.items()},
        tuple((*of, by_name[of] * scale) for of in longest[:LONGEST]),
    )


def _shared_time(events: Iterable[Event]) -> dict[str, float]:
    """Nanoseconds by part, every instant given away once."""
    changes: list[tuple[float, int, str]] = []
    for event in events:
        changes += [(event.begin, 1, event.part), (event.end, -1, event.part)]
    changes.sort()
    running: Counter[str] = Counter()
    spent: dict[str, float] = defaultdict(float)
    before = changes[0][0] if changes else 0.0
    for now, change, name in changes:
        computing = sum(n for part, n in running.items() if part != "collectives")
        if computing:
            for part, count in running.items():
                if part != "collectives" and count:
                    spent[part] += (now - before) * count / computing
        elif running["collectives"]:
            spent["collectives"] += now - before
        running[name] += change
        before = now
    return spent


# Numbers of fields. Reference: xplane.proto of openxla/xprof; hlo.proto of openxla/xla.


def _programs(xspace: bytes) -> dict[str, dict[str, Instruction]]:
    """The instructions of the programs that a trace keeps, by the programs' and their own names."""
    found = {}
    for number, plane in fields(xspace):
        if number != 1:
            continue
        parts = list(fields(plane))
        if (2, b"/host:metadata") not in parts:
            continue
        for number, entry in parts:
            if number == 4:
                for program in _hlo_protos(entry):
                    found |= _program(program)
    return found


def _hlo_protos(entry: bytes) -> Iterator[bytes]:
    """The programs in an entry of a plane's metadata of events."""
    for metadata in _all(entry, 2):
        for stat in _all(metadata, 5):
            yield from _all(stat, 6)


def _program(hlo_proto: bytes) -> dict[str, dict[str, Instruction]]:
    found = {}
    for module in _all(hlo_proto, 1):
        parts = list(fields(module))
        name = next(v for n, v in parts if n == 1).decode()
        frames = _Frames(next((v for n, v in parts if n == 17), b""))
        computations = [list(fields(v)) for n, v in parts if n == 3]
        opcodes = {
            next(v for n, v in c if n == 5): {
                _text(v, 2) for n, v in c if n == 2
            } for c in computations
        }  # fmt: skip
        found[name] = {
            _text(value, 1): _instruction(value, opcodes, frames)
            for computation in computations
            for number, value in computation
            if number == 2
        }
    return found


def _instruction(message: bytes, opcodes: Mapping[int, set[str]], frames: "_Frames") -> Instruction:
    parts = list(fields(message))
    own = {v.decode() for n, v in parts if n == 2}
    called = (number for n, v in parts if n == 38 for number in _numbers(v))
    if own & {"fusion", "async-start"}:
        own = own.union(*(opcodes.get(number, set()) for number in called)) - {"fusion"}
    target = next((v.decode() for n, v in parts if n == 28), "")
    origin = ""
    for number, metadata in parts:
        if number == 7:
            described = dict(fields(metadata))
            origin = described.get(2, b"").decode() + frames.functions(described.get(15, 0))
    return Instruction(frozenset(own - {"parameter", "constant", "tuple"}), target, origin)


class _Frames:
    """The stacks of Python functions in which instructions were traced."""

    def __init__(self, index: bytes) -> None:
        parts = list(fields(index))
        self._names = [v.decode() for n, v in parts if n == 2]
        self._places = [dict(fields(v)) for n, v in parts if n == 3]
        self._frames = [dict(fields(v)) for n, v in parts if n == 4]

    def functions(self, frame: int) -> str:
        """Names of the functions on a stack, innermost first, a blank before each."""
        found = ""
        while 0 < frame <= len(self._frames):
            place = self._frames[frame - 1].get(1, 0)
            name = self._places[place - 1].get(2, 0) if place else 0
            found += f" {self._names[name - 1]}" if name else ""
            frame = self._frames[frame - 1].get(2, 0)
        return found


def _all(message: bytes, number: int) -> Iterator[bytes]:
    return (v for n, v in fields(message) if n == number and isinstance(v, bytes))


def _text(message: bytes, number: int) -> str:
    return next(_all(message, number), b"").decode()


def _numbers(value: Any) -> list[int]:
    """A repeated number, packed or not."""
    if isinstance(value, int):
        return [value]
    found, at = [], 0
    while at < len(value):
        number, at = varint(value, at)
        found.append(number)
    return found
