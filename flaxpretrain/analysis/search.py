"""Which mesh, remat policy and batch size run fastest on a slice, by compiling each combination.

All that is found stands in a record, JSON lines written one by one, so that a search may be
interrupted and goes on where it stopped.
"""

import dataclasses
import hashlib
import itertools
import json
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flaxpretrain.analysis.topology import Report, compile_step
from flaxpretrain.config import Mesh, Run, override, render
from flaxpretrain.errors import UserError
from flaxpretrain.training.assembly import REMATS

MOST_STARTS = 2
"""A compilation that was begun so often and never ended took the process with it."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One combination."""

    mesh: Mesh
    remat: str
    batch_size: int

    def applied(self, run: Run, phase: int) -> Run:
        """The run with this combination in one of its phases."""
        run = dataclasses.replace(run, mesh=self.mesh)
        run = override(run, f"phases.{phase}.batch_size", self.batch_size)
        return override(run, "remat", self.remat)

    def __str__(self) -> str:
        """As in `data=-1,fsdp=4, remat dots, 256 rows`."""
        return f"{mesh_text(self.mesh)}, remat {self.remat}, {self.batch_size:,} rows"


def mesh_text(mesh: Mesh) -> str:
    """As --mesh takes it: what differs from one device and false."""
    named = {name: str(value).lower() for name, value in dataclasses.asdict(mesh).items()}
    given = [f"{name}={text}" for name, text in named.items() if text not in ("1", "false")]
    return ",".join(given) or "data=1"


@dataclasses.dataclass(frozen=True)
class Found:
    """A combination and what compiling it showed; `refused` says why it could not be compiled."""

    candidate: Candidate
    report: Report | None = None
    refused: str | None = None

    @property
    def speed(self) -> float:
        """Estimated tokens/s a chip; 0 for what does not fit."""
        return (self.report and self.report.estimated_tokens_per_second_per_chip) or 0.0


@dataclasses.dataclass(frozen=True)
class Budget:
    """When a search begins no further compilation; None for no limit."""

    minutes: float | None = None
    compiles: int | None = None


def default_batch_sizes(batch_size: int) -> tuple[int, ...]:
    """The recipe's own first, then more, then less."""
    return (batch_size, 2 * batch_size, 4 * batch_size, max(batch_size // 2, 1))


def default_remats(run: Run) -> tuple[str, ...]:
    """From the fastest to what needs the least memory."""
    return ("save_all" if run.scan_layers else "none", "dots", "full")


def default_meshes(slices: int) -> tuple[Mesh, ...]:
    """Rows over all devices, with the optimizer whole or split; or the whole state split."""
    fsdp = Mesh(data=slices, fsdp=-1)
    return (Mesh(), Mesh(shard_optimizer=True), fsdp)


def grid(
    batch_sizes: Sequence[int], remats: Sequence[str], meshes: Sequence[Mesh]
) -> tuple[Candidate, ...]:
    """All combinations, batch by batch, so that one that does not fit rules out larger ones.

    Raises:
        UserError: an unknown policy, or a batch size that is not positive.
    """
    for remat in remats:
        if remat not in REMATS:
            raise UserError(f"--remats: expected some of {', '.join(REMATS)}; got {remat!r}")
    for size in batch_sizes:
        if size < 1:
            raise UserError(f"--batch-sizes: expected positive numbers; got {size}")
    combinations = itertools.product(batch_sizes, meshes, remats)
    return tuple(Candidate(mesh, remat, size) for size, mesh, remat in combinations)


class Record:
    """What earlier searches found, by what was compiled; `code` stands for the sources."""

    def __init__(self, path: Path, code: str) -> None:
        self._path, self._code = path, code
        self._results: dict[str, dict[str, Any]] = {}
        self._starts: dict[str, int] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # cut off by a kill: compiled again
            if "result" in entry:
                self._results[entry["key"]] = entry["result"]
            else:
                self._starts[entry["key"]] = self._starts.get(entry["key"], 0) + entry["starts"]

    def key(self, run: Run, topology: str, slices: int, phase: int) -> str:
        """Of one compilation: all that decides its outcome."""
        facts = [render(run), topology, slices, phase, self._code]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def known(self, key: str, candidate: Candidate) -> Found | None:
        """What is known of it already."""
        result = self._results.get(key)
        if result is not None:
            report = result["report"]
            if report is not None:
                report = Report(**report | {"notes": tuple(report["notes"])})
            return Found(candidate, report, result["refused"])
        if self._starts.get(key, 0) >= MOST_STARTS:
            return Found(candidate, refused="the compiler ended the process, twice")
        return None

    def start(self, key: str) -> None:
        """Notes that a compilation begins."""
        self._append({"key": key, "starts": 1})

    def stop(self, key: str) -> None:
        """Notes that the user stopped it: no fault of the compiler's."""
        self._append({"key": key, "starts": -1})

    def keep(self, key: str, found: Found) -> None:
        """Notes how it ended."""
        report = found.report and dataclasses.asdict(found.report)
        self._append({"key": key, "result": {"report": report, "refused": found.refused}})

    def _append(self, entry: Mapping[str, Any]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        before = self._path.read_bytes() if self._path.exists() else b""
        cut_off = before and not before.endswith(b"\n")
        with self._path.open("a", encoding="utf-8") as file:
            file.write(("\n" if cut_off else "") + json.dumps(entry) + "\n")


def search(
    run: Run,
    topology: str,
    slices: int,
    phase: int,
    candidates: Iterable[Candidate],
    record: Record,
    budget: Budget,
    say: Callable[[str], None],
) -> Iterator[Found]:
    """Each candidate with what is known of it, from the record or by compiling it.

    Where a batch does not fit, larger ones of the same mesh and policy are left out.
    """
    candidates = tuple(candidates)
    found: list[Found] = []
    started, compiles = time.monotonic(), 0
    for number, candidate in enumerate(candidates, start=1):
        place = f"[{number}/{len(candidates)}] {candidate}"
        smaller = _too_large(candidate, found)
        if smaller is not None:
            say(f"{place}: left out, {smaller:,} rows do not fit")
            continue
        changed = candidate.applied(run, phase)
        key = record.key(changed, topology, slices, phase)
        known = record.known(key, candidate)
        if known is None:
            minutes = (time.monotonic() - started) / 60
            if compiles == budget.compiles or (budget.minutes and minutes >= budget.minutes):
                say(f"{place}: left for the next search, the budget is used up")
                continue
            compiles += 1
            say(f"{place}: compiling ...")
            record.start(key)
            try:
                known = _compiled(changed, topology, slices, phase, candidate)
            except KeyboardInterrupt:
                record.stop(key)
                raise
            record.keep(key, known)
        say(f"{place}: {outcome(known)}")
        found.append(known)
        yield known


def _too_large(candidate: Candidate, found: Iterable[Found]) -> int | None:
    """A smaller batch of the same mesh and policy that does not fit."""
    for other in found:
        same = (other.candidate.mesh, other.candidate.remat) == (candidate.mesh, candidate.remat)
        misfit = other.report is not None and not other.report.fits
        if same and misfit and other.candidate.batch_size <= candidate.batch_size:
            return other.candidate.batch_size
    return None


def _compiled(run: Run, topology: str, slices: int, phase: int, candidate: Candidate) -> Found:
    try:
        report, _ = compile_step(run, topology, phase, slices)
    except UserError as error:
        return Found(candidate, refused=str(error))
    return Found(candidate, report)


def outcome(found: Found) -> str:
    """What compiling showed, in a few words."""
    if found.report is None:
        return f"refused: {found.refused}"
    if not found.report.fits:
        return f"does not fit: {found.report.verdict}"
    return f"fits, estimate {found.speed:,.0f} tokens/s a chip"


def best(found: Iterable[Found], count: int) -> list[Found]:
    """Those that fit, the fastest by the estimate first."""
    fitting = [each for each in found if each.speed > 0]
    return sorted(fitting, key=lambda each: -each.speed)[:count]


def command(found: Found, recipe: str, overrides: Sequence[str], run: Run, phase: int) -> str:
    """The command that trains this combination."""
    report, prefix = found.report, "" if len(run.phases) == 1 else f"phases.{phase}."
    sizes = report.mesh if report is not None else {}
    settings = [
        *overrides,
        *(f"mesh.{axis}={size}" for axis, size in sizes.items()),
        f"mesh.shard_optimizer={str(found.candidate.mesh.shard_optimizer).lower()}",
        f"remat={found.candidate.remat}",
        f"{prefix}batch_size={found.candidate.batch_size}",
        f"{prefix}microbatches={run.phases[phase].microbatches}",
    ]
    flags = [part for setting in settings for part in ("--set", setting)]
    return "python run_pretraining.py " + shlex.join([recipe, *flags])
