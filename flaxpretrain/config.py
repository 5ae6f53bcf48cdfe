"""What a run is: frozen values that a recipe states, an override changes, and a workdir records.

A recipe is a Python file with `def recipe() -> Run`. Its values are plain frozen dataclasses, so
there is no registry: the recipe imports the classes it uses.
"""

import dataclasses
import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flaxpretrain.errors import UserError
from flaxpretrain.hardware import MATMULS, HardwareRule, rule_for
from flaxpretrain.locations import Location, is_remote, located
from flaxpretrain.overrides import coerce, nearest
from flaxpretrain.rendering import completed, flatten, parse, render

__all__ = [
    "Checkpoints",
    "Data",
    "Logging",
    "Mesh",
    "Phase",
    "Precision",
    "Run",
    "Seeds",
    "Watchdog",
    "dataset_folder",
    "differences",
    "flatten",
    "load",
    "load_recipe",
    "on_hardware",
    "overridden",
    "override",
    "parse",
    "ramp",
    "render",
]


_PHASE_LENGTHS = ("steps", "tokens", "epochs", "seconds")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of training with one row length and one batch size.

    Exactly one of `steps`, `tokens` (real input tokens), `epochs` and `seconds` says how long it
    is. Seconds become steps once, before the first step, by timing a few; the workdir keeps them.
    """

    length: int
    batch_size: int
    steps: int | None = None
    tokens: int | None = None
    epochs: float | None = None
    seconds: float | None = None
    microbatches: int = 1

    def __post_init__(self) -> None:
        """Raises UserError on impossible sizes."""
        given = [n for n in _PHASE_LENGTHS if getattr(self, n) is not None]
        _require(
            len(given) == 1,
            f"a phase needs exactly one of {', '.join(_PHASE_LENGTHS)}; got {given or 'none'}",
        )
        for name in ("length", "batch_size", "microbatches", given[0]):
            value = getattr(self, name)
            _require(value > 0, f"phase.{name} must be positive; got {value}")
        _require(
            self.batch_size % self.microbatches == 0,
            f"batch_size {self.batch_size} is not divisible by microbatches {self.microbatches}",
        )


def ramp(*, length: int, start: int, end: int, stages: int, steps: int) -> tuple[Phase, ...]:
    """Phases whose batch size grows linearly from `start` to `end` over `steps` steps."""
    _require(0 < stages <= steps, f"a ramp needs 1 to steps={steps} stages; got {stages}")
    sizes = [start + (end - start) * i // max(stages - 1, 1) for i in range(stages)]
    borders = [steps * i // stages for i in range(stages + 1)]
    return tuple(
        Phase(length=length, batch_size=size, steps=b - a)
        for size, a, b in zip(sizes, borders, borders[1:], strict=False)
    )


REMOTE_WINDOW_TOKENS = 1 << 26
"""Two of them take some 300 MB of memory where a token takes two bytes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Which dataset, cut into rows how.

    `folder` None means `dataset/` in the workdir, where `Run.prepare` puts it. `duplication`
    None means new noise every epoch; n means n fixed copies of the noise, as static masking has.
    `window_tokens` None shuffles all rows of an epoch; n those of windows of about n tokens, which
    are read one after another: what a dataset at a URL gets unless another n is given.
    """

    layout: Any
    folder: str | None = None
    split: str = "train"
    duplication: int | None = None
    window_tokens: int | None = None

    def __post_init__(self) -> None:
        """Gives a remote dataset its window."""
        _require(
            self.window_tokens is None or self.window_tokens > 0,
            f"data.window_tokens must be positive or None; got {self.window_tokens}",
        )
        if self.window_tokens is None and self.is_remote:
            object.__setattr__(self, "window_tokens", REMOTE_WINDOW_TOKENS)

    @property
    def is_remote(self) -> bool:
        """Whether the dataset lies in a store that answers requests."""
        return is_remote(self.folder)

    def folder_in(self, workdir: Path) -> Location:
        """Where the dataset of a run in this workdir lies."""
        return workdir / "dataset" if self.folder is None else located(self.folder)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """Devices along each axis; -1 takes what the others leave.

    data: rows of the batch; the only axis that goes across TPU slices.
    fsdp: rows too, and slices of parameters and optimizer state.
    tensor: heads and inner features of the layers.
    context: the tokens of a row, for rows too long for one device.
    shard_optimizer: splits the optimizer's state over `data` as well, while the parameters stay as
        they are (ZeRO's first stage, https://arxiv.org/abs/1910.02054): gradients are
        reduce-scattered, updated parameters gathered.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1
    shard_optimizer: bool = False

    def __post_init__(self) -> None:
        """Raises UserError on sizes that cannot be."""
        sizes = (self.data, self.fsdp, self.tensor, self.context)
        _require(
            all(s == -1 or s > 0 for s in sizes) and sizes.count(-1) <= 1,
            "mesh sizes (data, fsdp, tensor, context) must be positive, at most one of them -1; "
            f"got {sizes}",
        )

    def groups(self, devices: int) -> int:
        """Into how many parts so many devices cut the rows of a batch."""
        if -1 in (self.data, self.fsdp):
            return max(devices // (abs(self.tensor) * abs(self.context)), 1)
        return self.data * self.fsdp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """Number formats: of the forward and backward pass, of the master weights, of sums.

    compute: float16, for devices without bfloat16 such as V100 and T4, scales the loss.
    reduce: of gradients while they are summed over devices; bfloat16 halves the bytes sent.
    matmul: of the layers' matrix products; one of `flaxpretrain.hardware.MATMULS`.
    """

    compute: str = "float32"
    params: str = "float32"
    reduce: str = "float32"
    matmul: str = "default"

    def __post_init__(self) -> None:
        """Raises UserError on an unknown format."""
        for name, known in (
            ("compute", ("float32", "bfloat16", "float16")),
            ("reduce", ("float32", "bfloat16")),
            ("params", ("float32",)),
            ("matmul", MATMULS),
        ):
            value, words = getattr(self, name), [", ".join(known[:-1]), known[-1]]
            expected = " or ".join(filter(None, words))
            _require(value in known, f"precision.{name} must be {expected}; got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seeds:
    """Independent seeds of initial weights, order of rows, noise, and dropout."""

    init: int = 0
    order: int = 0
    noise: int = 0
    dropout: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """When the state is saved, and which saves are kept.

    `temporary_every_seconds` adds saves by the clock that the next save replaces; `best` names an
    evaluation figure (`validation/loss`, say) whose lowest `keep_best` saves are kept.
    """

    every_steps: int = 1000
    keep_last: int = 3
    keep_every: int | None = None
    best: str | None = None
    keep_best: int = 1
    temporary_every_seconds: float | None = None

    def __post_init__(self) -> None:
        """Raises UserError on intervals that cannot be."""
        _require(self.every_steps > 0, "checkpoints.every_steps must be positive")
        _require(self.keep_last > 0, "checkpoints.keep_last must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logging:
    """How often figures are written, and whether TensorBoard files are."""

    every_steps: int = 100
    tensorboard: bool = True

    def __post_init__(self) -> None:
        """Raises UserError on an interval that cannot be."""
        _require(self.every_steps > 0, "logging.every_steps must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watchdog:
    """How long a run may show no sign of life before its process ends; None: as long as it likes.

    `startup_seconds` hold for the start without `prepare`, and again for a compile with its first
    step; `step_seconds` for one step and its batch, `save_seconds` for waiting on a save,
    `evaluation_seconds` for one evaluation. Another process is lost after `peer_seconds`.
    """

    startup_seconds: float | None = 3600.0
    step_seconds: float | None = 1800.0
    save_seconds: float | None = 3600.0
    evaluation_seconds: float | None = 7200.0
    peer_seconds: float = 60.0

    def __post_init__(self) -> None:
        """Raises UserError on a deadline that cannot be."""
        for name, value in dataclasses.asdict(self).items():
            _require(value is None or value > 0, f"watchdog.{name} must be positive; got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """All that says how a model is pretrained: what a recipe returns.

    `model`, `objective`, `optimizer`, `schedule`, `guard` and `rewind` are frozen values of the
    rooms that define them. `prepare`, `evaluations` and `finish` are values that the loop calls
    blind: `prepare` items have `run(run, workdir)`, the others `run(session)`. Of the rules in
    `hardware`, the first one that fits the devices at hand changes how the run computes; see
    `on_hardware`.
    """

    model: Any
    objective: Any
    data: Data
    optimizer: Any
    schedule: Any
    phases: tuple[Phase, ...]
    guard: Any = None
    rewind: Any = None
    mesh: Mesh = Mesh()
    precision: Precision = Precision()
    remat: str = "auto"
    attention: str = "auto"
    scan_layers: bool = True
    hardware: tuple[HardwareRule, ...] = ()
    seeds: Seeds = Seeds()
    evaluations: tuple[Any, ...] = ()
    checkpoints: Checkpoints = Checkpoints()
    logging: Logging = Logging()
    watchdog: Watchdog = Watchdog()
    prepare: tuple[Any, ...] = ()
    finish: tuple[Any, ...] = ()
    device: str = "any"
    name: str = "run"

    def __post_init__(self) -> None:
        """Raises UserError where the parts do not fit each other."""
        _require(len(self.phases) > 0, "a run needs at least one phase")
        _require(
            self.device in ("any", "tpu", "gpu", "tpu or gpu"),
            f"device must be any, tpu, gpu or 'tpu or gpu'; got {self.device!r}",
        )
        limit = getattr(self.model, "max_length", None)
        longest = max(phase.length for phase in self.phases)
        _require(
            limit is None or longest <= limit,
            f"phases ask for rows of {longest} tokens, but the model has positions for "
            f"{limit}: shorten the rows or enlarge the model's table",
        )


def dataset_folder(run: Run, workdir: Path) -> Location:
    """The folder of a run's dataset; by default inside its workdir."""
    return run.data.folder_in(workdir)


def load_recipe(path: str | Path) -> Run:
    """Runs `recipe()` of a recipe file and names the run after the file.

    Raises:
        UserError: the file is missing, has no `recipe`, or returns something else than a Run.
    """
    path = Path(path)
    if not path.is_file():
        named = Path("configs") / f"{path.stem}.py"
        meant = f"; did you mean {named}?" if named.is_file() else ""
        raise UserError(
            f"recipe {path} is not a file; recipes are Python files such as "
            f"configs/quickstart.py{meant}"
        )
    # What a recipe imports from beside itself must also be importable later, by class path.
    folder = str(path.parent.resolve())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"recipe {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    if not callable(getattr(module, "recipe", None)):
        raise UserError(f"{path} defines no function recipe(); a recipe is `def recipe() -> Run`")
    run = module.recipe()
    if not isinstance(run, Run):
        raise UserError(f"recipe() of {path} must return a Run; it returned {type(run).__name__}")
    return dataclasses.replace(run, name=path.stem)


def load(
    path: str | Path,
    overrides: Sequence[str] = (),
    devices: Sequence[Any] | None = None,
    mesh: Mesh | None = None,
) -> Run:
    """The recipe at `path` with overrides such as `model.hidden_size=64` applied in order.

    Where the devices are known that it will run on, its hardware rule for them applies; what is
    overridden, and a given mesh, win over the rule.
    """

    def changed(run: Run) -> Run:
        run = overridden(run, overrides)
        return run if mesh is None else dataclasses.replace(run, mesh=mesh)

    run = changed(load_recipe(path))
    return run if devices is None else changed(on_hardware(run, devices))


def on_hardware(run: Run, devices: Sequence[Any]) -> Run:
    """The run with the settings of the first hardware rule that fits these devices, if any does."""
    rule = rule_for(run.hardware, devices[0].device_kind, len(devices))
    if rule is None:
        return run
    for name, value in rule.settings.items():
        run = override(run, name, value)
    if rule.tokens_per_device is None:
        return run
    groups = run.mesh.groups(len(devices))

    def split(phase: Phase) -> Phase:
        parts = rule.microbatches(max(phase.batch_size // groups, 1), phase.length)
        fits = phase.batch_size % (parts * groups) == 0  # else the step says what is wrong
        return dataclasses.replace(phase, microbatches=parts) if fits else phase

    return dataclasses.replace(run, phases=tuple(split(phase) for phase in run.phases))


def overridden(run: Run, overrides: Sequence[str]) -> Run:
    """The run with overrides such as `model.hidden_size=64` applied in order."""
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text}: expected FIELD=VALUE, such as --set steps=100")
        run = override(run, name.strip(), value.strip())
    return run


_PHASE_FIELDS = (*_PHASE_LENGTHS, "length", "batch_size", "microbatches")


def override(run: Run, name: str, value: Any) -> Run:
    """`run` with one field changed, named by a dotted path; text is read by the field's type.

    The fields of the only phase of a one-phase run need no prefix (`steps`, `batch_size`).

    Raises:
        UserError: no such field (the nearest is offered), or a value of another type.
    """
    path = name.split(".")
    if path[0] in _PHASE_FIELDS and len(path) == 1:
        if len(run.phases) != 1:
            raise UserError(
                f"--set {name}: this recipe has {len(run.phases)} phases; "
                f"write phases.0.{name} to phases.{len(run.phases) - 1}.{name}"
            )
        path = ["phases", "0", name]
    return _replaced(run, path, value, name)


def _replaced(owner: Any, path: list[str], value: Any, full: str) -> Any:
    head, rest = path[0], path[1:]
    if dataclasses.is_dataclass(owner) and not isinstance(owner, type):
        names = [f.name for f in dataclasses.fields(owner) if f.init]
        if head not in names:
            # Of a run, its only phase's fields may be meant, which need no prefix.
            phase = [f.name for f in dataclasses.fields(Phase)] if isinstance(owner, Run) else []
            raise UserError(
                f"--set {full}: {type(owner).__name__} has no field {head!r}"
                f"{nearest(head, [*names, *phase])}"
            )
        if rest:
            return dataclasses.replace(
                owner, **{head: _replaced(getattr(owner, head), rest, value, full)}
            )
        changes = {head: coerce(owner, head, value, f"--set {full}")}
        if isinstance(owner, Phase) and head in _PHASE_LENGTHS:
            changes |= {n: None for n in _PHASE_LENGTHS if n != head}
        return dataclasses.replace(owner, **changes)
    if isinstance(owner, tuple):
        if not head.isdigit() or int(head) >= len(owner):
            raise UserError(f"--set {full}: {head} is not an index below {len(owner)}")
        index = int(head)
        new = _replaced(owner[index], rest, value, full) if rest else value
        return (*owner[:index], new, *owner[index + 1 :])
    if isinstance(owner, Mapping):
        if head not in owner:
            raise UserError(f"--set {full}: no entry {head!r}{nearest(head, list(owner))}")
        new = _replaced(owner[head], rest, value, full) if rest else type(owner[head])(value)
        return {**owner, head: new}
    raise UserError(f"--set {full}: {'.'.join(path)} leads nowhere: {owner!r} has no fields")


MAY_CHANGE = (
    "name",
    "evaluations",
    "checkpoints",
    "logging",
    "watchdog",
    "rewind",
    "mesh",
    "prepare",
    "finish",
    "remat",
    "attention",
    "scan_layers",
    "hardware",
    "device",
    "data.folder",
    "data.limit",
    "data.temperature",
)
"""Fields that a resumed run may change: none of them changes what the model learns from."""

_PHASE_MAY_CHANGE = (*_PHASE_LENGTHS, "microbatches")

_PART_MAY_CHANGE = re.compile(r"data\.parts\.\d+\.(weight|scale|folder)")
"""Of the parts of a mixture: the weights decide which rows come next, not what a row is."""


def differences(old: Any, new: Any) -> list[str]:
    """What forbids resuming the run rendered as `old` with `new`, a line a field."""

    def allowed(path: str) -> bool:
        parts = path.split(".")
        if parts[0] == "phases" and parts[-1] in _PHASE_MAY_CHANGE:
            return True
        if _PART_MAY_CHANGE.fullmatch(path):
            return True
        return any(path == p or path.startswith(p + ".") for p in MAY_CHANGE)

    before, after = flatten(completed(old)), flatten(new)
    lines = []
    for path in sorted(before.keys() | after.keys()):
        a, b = before.get(path), after.get(path)
        if a != b and not allowed(path):
            lines.append(f"{path}: {json.dumps(a)} -> {json.dumps(b)}")
    return lines
