"""What is wrong with an installation, and what to do about it."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import Requirement

from flaxpretrain.hardware import FLAG_VARIABLES

GOOD, WARNING, WRONG = "good", "warning", "wrong"

GOOGLE, NVIDIA, AMD = "0x1ae0", "0x10de", "0x1002"
"""Vendors on the PCI bus."""

LITTLE_DISK = 10e9
"""Bytes: a few checkpoints of a base model and its dataset."""

LITTLE_MEMORY = 4e9
"""Bytes: the compiler of a base model's step takes about as much."""

FEW_FILES = 4096
"""Open files a process may have: the shards of a dataset are mapped, the checkpoint has many."""

PROBE = """
import json
from flaxpretrain import program
program.avoid_known_faults(); program.quiet_absent_tpu()
import jax, jax.numpy as jnp, numpy as np
from flaxpretrain.hardware import overlap_options
from flaxpretrain.training.compiler_options import accepted
x = np.arange(64 * 64, dtype=np.float32).reshape(64, 64) / 4096
apart = float(np.abs(np.asarray(jnp.dot(x, x, precision="highest")) - x @ x).max())
devices = jax.devices()
options = overlap_options(devices[0].device_kind)
known = accepted(options, jax.local_devices()[0])
print(json.dumps({"platform": devices[0].platform, "kind": devices[0].device_kind,
                  "count": len(devices), "apart": apart, "known": list(known),
                  "unknown": [name for name in options if name not in known]}))
"""
"""Runs apart: a driver that hangs or crashes takes only this process with it."""

PROBE_LIMIT = 2e-3
"""Largest difference of the probe's matrix product from NumPy's; its numbers go up to 21."""


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing looked at: how it is, and what to do where it is not good."""

    what: str
    verdict: str
    seen: str
    remedy: str = ""


def packages(requirements: Iterable[str] | None = None) -> list[Finding]:
    """Whether what the package requires is there, as the checkout or its metadata says."""
    if requirements is None:
        checkout = Path(__file__).resolve().parents[2] / "pyproject.toml"
        if checkout.exists():
            text = checkout.read_text(encoding="utf-8")
            requirements = tomllib.loads(text)["project"]["dependencies"]
        else:
            requirements = importlib.metadata.requires("flaxpretrain")
    wanted = [Requirement(text) for text in requirements or ()]
    missing, seen = [], 0
    for requirement in wanted:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        seen += 1
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            missing.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if missing:
        return [Finding("packages", WRONG, "; ".join(missing), "pip install --upgrade .")]
    return [Finding("packages", GOOD, f"{seen} required, all there")]


def versions() -> list[Finding]:
    """Python, and whether jax and jaxlib belong together."""
    python = platform.python_version()
    new = sys.version_info >= (3, 11)
    jax, jaxlib = (importlib.metadata.version(name) for name in ("jax", "jaxlib"))
    together = jax.split(".")[:2] == jaxlib.split(".")[:2]
    return [
        Finding("Python", GOOD if new else WRONG, python, "" if new else "install 3.11 or newer"),
        Finding(
            "jax",
            GOOD if together else WRONG,
            f"jax {jax}, jaxlib {jaxlib}",
            "" if together else f"pip install jaxlib=={jax}",
        ),
    ]


def vendors(bus: Path = Path("/sys/bus/pci/devices")) -> set[str]:
    """Who made the devices on the PCI bus."""
    return {vendor.read_text().strip() for vendor in bus.glob("*/vendor")}


def holders(patterns: Sequence[str], processes: Path = Path("/proc")) -> list[int]:
    """Processes, not this one, that have a file open whose path starts with one of these."""
    found = []
    for folder in processes.glob("[0-9]*"):
        try:
            targets = [os.readlink(link) for link in (folder / "fd").iterdir()]
        except OSError:  # it has ended, or is another user's
            continue
        if any(target.startswith(tuple(patterns)) for target in targets):
            found.append(int(folder.name))
    return sorted(set(found) - {os.getpid()})


def devices(
    present: set[str] | None = None,
    held_by: Sequence[int] | None = None,
    seconds: float = 180.0,
    probe: str = PROBE,
) -> list[Finding]:
    """What jax finds, whether it computes rightly, and whether it misses an accelerator."""
    present = vendors() if present is None else present
    tpu = GOOGLE in present
    if held_by is None:
        held_by = holders(("/dev/accel", "/dev/vfio/")) if tpu else []
    findings = []
    if tpu and held_by:
        pids = ", ".join(map(str, held_by))
        findings.append(
            Finding("TPU", WRONG, f"held by process {pids}", f"end it, then try again: kill {pids}")
        )
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    try:
        done = subprocess.run(
            [sys.executable, "-c", probe],
            capture_output=True,
            text=True,
            timeout=seconds,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        remedy = "on a slice of several hosts run this on all of them at once; else see the driver"
        return [*findings, Finding("devices", WRONG, f"no answer in {seconds:.0f} s", remedy)]
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return [*findings, Finding("devices", WRONG, last, "see the driver and the jax plugin")]
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    seen = f"{answer['count']} x {answer['kind']} ({answer['platform']})"
    if answer["apart"] > PROBE_LIMIT:
        wrong = f"{seen}: a product is off by {answer['apart']:.2g}"
        return [*findings, Finding("devices", WRONG, wrong, "see the driver's version")]
    idle = {GOOGLE: ("tpu", "TPU"), NVIDIA: ("cuda", "NVIDIA GPU")}
    for vendor, (extra, name) in idle.items():
        if vendor in present and answer["platform"] == "cpu":
            seen = f"{seen}, though the machine has a {name}"
            return [*findings, Finding("devices", WRONG, seen, f'pip install ".[{extra}]"')]
    return [*findings, Finding("devices", GOOD, seen), *compiling(answer)]


def compiling(answer: Mapping[str, Any]) -> list[Finding]:
    """The options that steps on several devices are compiled with."""
    findings = []
    if known := answer.get("known"):
        findings.append(Finding("several devices", GOOD, f"steps with {', '.join(known)}"))
    if unknown := answer.get("unknown"):
        seen = f"the compiler does not know {', '.join(unknown)}"
        remedy = "steps are compiled without; another release of jax and its plugin may know them"
        findings.append(Finding("several devices", WARNING, seen, remedy))
    return findings


def flags(environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """What the environment tells the compilers; it goes before options of ours."""
    told = {name: environment.get(name, "") for name in FLAG_VARIABLES}
    return [Finding(name, GOOD, text) for name, text in told.items() if text]


def disk(folder: Path, needed: float = LITTLE_DISK) -> list[Finding]:
    """Whether there is room where a workdir would be, and whether it can be written."""
    there = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(there).free
    seen = f"{_gigabytes(free)} free at {there}"
    if not os.access(there, os.W_OK):
        return [Finding("disk", WRONG, f"{there} cannot be written", "give another --workdir")]
    if free < needed:
        remedy = f"free {_gigabytes(needed - free)} or give another --workdir"
        return [Finding("disk", WARNING, seen, remedy)]
    return [Finding("disk", GOOD, seen)]


def memory(available: float | None = None) -> list[Finding]:
    """What processes can have: of the machine, or of the container where that is less."""
    if available is None:
        available = float(psutil.virtual_memory().available)
        limit = Path("/sys/fs/cgroup/memory.max")
        used = Path("/sys/fs/cgroup/memory.current")
        if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
            available = min(available, float(limit.read_text()) - float(used.read_text()))
    seen = f"{_gigabytes(available)} available"
    if available < LITTLE_MEMORY:
        remedy = "end other programs; --num-processes 1 for the dataset builder"
        return [Finding("memory", WARNING, seen, remedy)]
    return [Finding("memory", GOOD, seen)]


def limits() -> list[Finding]:
    """Open files, and huge pages, which training asks for."""
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = files < FEW_FILES and files != resource.RLIM_INFINITY
    reachable = most == resource.RLIM_INFINITY or most >= FEW_FILES
    remedy = f"ulimit -n {FEW_FILES}" if reachable else "raise the limit of open files as root"
    findings = [Finding("open files", WARNING if few else GOOD, str(files), remedy if few else "")]
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if pages.exists():
        never = "[never]" in pages.read_text()
        chosen = pages.read_text().split("[")[-1].split("]")[0]
        remedy = f"as root: echo madvise > {pages}" if never else ""
        findings.append(Finding("huge pages", WARNING if never else GOOD, chosen, remedy))
    return findings


def examine(folder: Path, seconds: float = 180.0) -> list[Finding]:
    """Everything above, in the order in which mistakes explain one another."""
    return [
        *versions(),
        *packages(),
        *devices(seconds=seconds),
        *flags(),
        *disk(folder),
        *memory(),
        *limits(),
    ]
