"""Train steps that were compiled ahead of a run, elsewhere perhaps, and that the run loads.

A folder holds them and `manifest.json`, which says what they were compiled from and for. The run
traces its step, which takes a second or so, and loads the program where all of it agrees; else it
says what differs and compiles. So the folder decides how fast a run begins, never what it computes.

A compiled program is machine code, and its file a pickle: loading one gives its author the rights
of the user who loads it. The hash of a file's bytes tells damage, not who wrote it.

Reference: jax.experimental.serialize_executable; AI-Hypercomputer/maxtext, train_compile.py.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

import flaxpretrain
from flaxpretrain.config import Phase, flatten, render
from flaxpretrain.data.files import Files, files_of
from flaxpretrain.data.vocabulary import Vocabulary
from flaxpretrain.errors import UserError
from flaxpretrain.hardware import FLAG_VARIABLES
from flaxpretrain.locations import Location
from flaxpretrain.training.assembly import Assembly
from flaxpretrain.training.compile_cache import processor
from flaxpretrain.training.distributed import told_by_all
from flaxpretrain.training.jax_settings import nothing_cached
from flaxpretrain.training.programs import canonical_hash, lowered_step

MANIFEST = "manifest.json"
FORMAT = 1

_OF_A_STEP = (
    "model",
    "objective",
    "optimizer",
    "schedule",
    "guard",
    "mesh",
    "precision",
    "remat",
    "attention",
    "scan_layers",
)
"""Fields of a run that may change its step; they explain why a program is another one."""

_TELLING = {
    "jax": "jax",
    "jaxlib": "jaxlib",
    "compiler": "the compiler",
    "processor": "the kind of CPU",
    "device_kind": "the device",
    "devices": "the number of devices",
    "mesh": "the mesh",
    "placement": "the order or the hosts of the devices",
    "flags": "the flags of XLA",
    "compiler_options": "the options of the compiler",
}
"""Circumstances that must agree, in words; the first that does not is the one to tell."""

_UNTELLING_FLAG = re.compile(r"--xla_(force_host_platform_device_count|dump_\w+)\b")
"""Flags that do not change a program: devices are counted by themselves."""


class Unusable(Exception):
    """Why a program cannot be loaded."""


def circumstances(
    assembly: Assembly,
    total_steps: int,
    options: Mapping[str, int],
    environment: Mapping[str, str] = os.environ,
) -> dict[str, Any]:
    """What, beside the program itself, decides whether its compiled form serves; JSON data.

    `run` and `flaxpretrain` only explain why a program may be another one.
    """
    devices = assembly.mesh.devices.flatten().tolist()
    flags = {flag for name in FLAG_VARIABLES for flag in environment.get(name, "").split()}
    rendered = render(assembly.run)
    return {
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "compiler": _compiler(devices[0]),
        "processor": f"{processor():08x}" if devices[0].platform == "cpu" else None,
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "mesh": {name: int(size) for name, size in assembly.mesh.shape.items()},
        "placement": [_place(device) for device in devices],
        "flags": sorted(flag for flag in flags if not _UNTELLING_FLAG.match(flag)),
        "compiler_options": dict(options),
        "flaxpretrain": flaxpretrain.__version__,
        "run": {"steps": total_steps} | {name: rendered[name] for name in _OF_A_STEP},
    }


def _compiler(device: Any) -> str:
    """The compiler's build: libtpu's by its change list, as without its devices it says more."""
    version = device.client.platform_version
    found = re.search(r"\bcl/\d+", version)
    return found.group() if found else " ".join(version.split())


def _place(device: Any) -> str:
    """A device's number, process, slice and coordinates; the last two on TPUs."""
    place = f"{device.id} of process {device.process_index}"
    if not hasattr(device, "coords"):
        return place
    coordinates = ",".join(map(str, device.coords))
    return f"{place}, slice {getattr(device, 'slice_index', None) or 0} at {coordinates}"


def compile_ahead(
    assembly: Assembly,
    shapes: Iterable[Phase],
    vocabulary: Vocabulary,
    total_steps: int,
    options: Mapping[str, int],
    folder: Path,
    say: Callable[[str], None],
) -> None:
    """Compiles the train step of each shape for the mesh's devices, and writes them to a folder.

    What an earlier call wrote there is replaced. The devices may be those of an absent slice. jax
    must not have read the programs from its cache.

    Raises:
        UserError: the folder cannot be written.
    """
    programs = []
    for shape in {_named(shape): shape for shape in shapes}.values():
        started = time.monotonic()
        lowered = lowered_step(assembly, assembly.train_step(shape, options), shape, vocabulary)
        traced = time.monotonic()
        with jax.set_mesh(assembly.mesh), nothing_cached():
            compiled = lowered.compile()
        seconds = time.monotonic() - traced
        # The trees are not kept: the run has them from its own trace.
        payload, _, _ = serialize_executable.serialize(compiled)
        identity = _identity(lowered, shape)
        name = f"{_named(shape)}-{identity['program'][:12]}.bin"
        _write(folder, name, payload)
        digest = hashlib.sha256(payload).hexdigest()
        file = {"file": name, "bytes": len(payload), "sha256": digest}
        programs.append(identity | file | {"compile_seconds": seconds})
        say(
            f"wrote {folder / name}: {len(payload) / 1e6:,.1f} MB, traced in "
            f"{traced - started:.1f} s, compiled in {seconds:.1f} s"
        )
    made = circumstances(assembly, total_steps, options)
    manifest = {"format": FORMAT} | made | {"programs": programs}
    _write(folder, MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    kept = {program["file"] for program in programs}
    for path in folder.glob("train_step-*.bin"):
        if path.name not in kept:
            path.unlink()


def _write(folder: Path, name: str, payload: bytes) -> None:
    """Writes aside, then renames, so that no run sees half of it."""
    aside = folder / f"{name}.new"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(payload)
        aside.replace(folder / name)
    except OSError as error:
        raise UserError(
            f"cannot write {folder / name}: {error.strerror}; make room, or choose another folder"
        ) from error


def _named(shape: Phase) -> str:
    return f"train_step-{shape.length}x{shape.batch_size}-{shape.microbatches}"


def _identity(lowered: jax.stages.Lowered, shape: Phase) -> dict[str, Any]:
    """What the run must find again: the step's shape, its arguments and the program."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(lowered.args_info)
    lines = [
        f"{jax.tree_util.keystr(path)} {leaf.dtype}{leaf.shape} {leaf.donated}"
        for path, leaf in leaves
    ]
    return {
        "length": shape.length,
        "batch_size": shape.batch_size,
        "microbatches": shape.microbatches,
        "arguments": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        "program": canonical_hash(lowered),
    }


@dataclasses.dataclass(frozen=True)
class Executables:
    """A folder of compiled programs, and its manifest; None where that cannot be read."""

    files: Files
    manifest: Mapping[str, Any] | None

    @property
    def location(self) -> Location:
        """As the user calls the folder."""
        return self.files.location

    def load(
        self, lowered: jax.stages.Lowered, shape: Phase, here: Mapping[str, Any], devices: list[Any]
    ) -> jax.stages.Compiled:
        """The compiled form of a lowered step for `devices`, those of the mesh in its order.

        Raises:
            Unusable: the folder has none, another one, or a damaged one.
        """
        program = self._program(lowered, shape, here)
        payload = self._payload(program)
        try:
            return serialize_executable.deserialize_and_load(
                payload, lowered.in_tree, lowered.out_tree, devices[0].client, devices
            )
        except Exception as error:  # whatever it is, the step can be compiled
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise Unusable(f"{program['file']} cannot be loaded ({reason})") from error

    def _program(
        self, lowered: jax.stages.Lowered, shape: Phase, here: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """The entry of the manifest that fits in everything."""
        made = self.manifest
        if made is None or made.get("format") != FORMAT:
            raise Unusable(f"its {MANIFEST} is damaged or of another version")
        for name, words in _TELLING.items():
            if made.get(name) != here[name]:
                raise Unusable(_told(words, made.get(name), here[name]))
        wanted = _identity(lowered, shape)
        sizes = ("length", "batch_size", "microbatches")
        for program in made["programs"]:
            if all(program[name] == wanted[name] for name in sizes):
                break
        else:
            raise Unusable(
                f"it has no step of {shape.batch_size} rows of {shape.length} in "
                f"{shape.microbatches} microbatches"
            )
        if any(program[name] != value for name, value in wanted.items()):
            raise Unusable(_why_another(made, here))
        return program

    def _payload(self, program: Mapping[str, Any]) -> bytes:
        name, expected = program["file"], program["bytes"]
        try:
            size = self.files.sizes([name])[name]
            if size is None:
                raise Unusable(f"{name} is missing")
            if size != expected:
                raise Unusable(f"{name} is damaged: {size:,} bytes of {expected:,}")
            payload = b"".join(self.files.blocks(name, size))
        except (OSError, UserError) as error:
            raise Unusable(f"{name} cannot be read ({error})") from error
        if hashlib.sha256(payload).hexdigest() != program["sha256"]:
            raise Unusable(f"{name} is damaged: its bytes are not those that were written")
        return payload


def open_executables(location: Location) -> Executables:
    """The compiled programs of a folder or URL.

    Raises:
        UserError: it holds none, or cannot be reached.
    """
    files = files_of(location)
    try:
        text = files.text(MANIFEST)
        manifest = None if text is None else json.loads(text)
    except OSError as error:
        raise UserError(f"--compiled {location} cannot be read: {error}") from error
    except ValueError:  # neither JSON nor text
        text, manifest = "", None
    if text is None:
        raise UserError(
            f"--compiled {location}: there is no {MANIFEST} in it; tools/compile_ahead.py makes "
            "such a folder"
        )
    return Executables(files, manifest if isinstance(manifest, dict) else None)


class Loader:
    """Loads the steps of one run from a folder; all processes do, or none."""

    def __init__(
        self,
        executables: Executables,
        assembly: Assembly,
        vocabulary: Vocabulary,
        total_steps: int,
        options: Mapping[str, int],
        say: Callable[[str], None],
    ) -> None:
        self._executables, self._assembly, self._vocabulary = executables, assembly, vocabulary
        self._here = circumstances(assembly, total_steps, options)
        self._say = say

    def load(
        self, step: Any, shape: Phase
    ) -> tuple[jax.stages.Lowered, jax.stages.Compiled | None]:
        """A jitted step, lowered, and its compiled form where the folder has it; says which."""
        started = time.monotonic()
        lowered = lowered_step(self._assembly, step, shape, self._vocabulary)
        traced = time.monotonic()
        devices = self._assembly.mesh.devices.flatten().tolist()
        compiled, reason = None, ""
        try:
            compiled = self._executables.load(lowered, shape, self._here, devices)
        except Unusable as error:
            reason = str(error)
        reasons = {who: text for who, text in enumerate(told_by_all(reason)) if text}
        if reasons:
            who, text = next(iter(reasons.items()))
            process = f"process {who}: " if jax.process_count() > 1 else ""
            self._say(
                f"warning: --compiled {self._executables.location} is not used, the step is "
                f"compiled: {process}{text}; tools/compile_ahead.py makes it anew"
            )
            return lowered, None
        self._say(
            f"the step of {shape.batch_size} rows of {shape.length} was compiled ahead: traced in "
            f"{traced - started:.1f} s, loaded in {time.monotonic() - traced:.1f} s"
        )
        return lowered, compiled


def _told(words: str, made: Any, here: Any) -> str:
    """What differs, in words; of long lists only that they do."""
    if isinstance(made, list) or isinstance(here, list):
        made, here = made or [], here or []
        odd = [f"{item} is new" for item in here if item not in made]
        odd += [f"{item} is gone" for item in made if item not in here]
        return f"{words}: {odd[0] if odd else 'another order'}"
    return f"{words}: {_short(here)} here, {_short(made)} where it was compiled"


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={part}" for name, part in value.items()) or "none"
    return str(value)


def _why_another(made: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Why a program is another one: by the recipe, or else by the code that traces it."""
    lines = list(_changes(made["run"], here["run"]))
    if lines:
        more = f" and {len(lines) - 1} more" if len(lines) > 1 else ""
        return f"the recipe has changed since: {lines[0]}{more}"
    then, now = made["flaxpretrain"], here["flaxpretrain"]
    if then != now:
        return f"it was traced by flaxpretrain {then}, and this is {now}"
    return "the code that traces the step, or the dataset's vocabulary, has changed since"


def _changes(made: Any, here: Any) -> Iterator[str]:
    before, after = flatten(made), flatten(here)
    for path in sorted(before.keys() | after.keys()):
        if before.get(path) != after.get(path):
            yield f"{path}: {json.dumps(before.get(path))} -> {json.dumps(after.get(path))}"
