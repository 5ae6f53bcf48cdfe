"""Compiles the real train step for a TPU pod on a machine without one, and reads what comes out.

The libtpu package holds the compiler of TPUs. Whether a program fits is the compiler's verdict; the
step time is an estimate by XLA's own cost model, and is called an estimate wherever it is shown.
"""

import dataclasses
import importlib.util
import os
import re
import time
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jaxtyping import PyTree

from flaxpretrain.analysis import hlo
from flaxpretrain.config import Phase, Run
from flaxpretrain.errors import UserError
from flaxpretrain.hardware import peak_of
from flaxpretrain.training import sharding
from flaxpretrain.training.assembly import Assembly, assemble, stand_in_vocabulary
from flaxpretrain.training.compiler_options import compiler_options
from flaxpretrain.training.jax_settings import nothing_cached
from flaxpretrain.training.programs import lowered_step, program_hash


@dataclasses.dataclass(frozen=True)
class Generation:
    """A generation of TPUs: which slices exist, and what its cost model's cycles mean.

    flops_per_cycle: of one jax device, 2 for each cell of its matrix units; the peak of
        `flaxpretrain.hardware` divided by it is the clock.
    matrix_unit: rows of one matrix unit; a kernel whose heads are smaller fills a part of it.
    """

    axes: int
    most_chips: int
    flops_per_cycle: int
    matrix_unit: int = 128
    options: tuple[tuple[str, str], ...] = ()


GENERATIONS = {
    # Cloud TPU system architecture pages; a v4 chip is one device to jax, its two cores fused.
    "v4": Generation(3, 4096, 8 * 2 * 128**2, options=(("chip_config_name", "megacore"),)),
    "v5e": Generation(2, 256, 4 * 2 * 128**2),
    "v5p": Generation(3, 8960, 8 * 2 * 128**2),
    "v6e": Generation(2, 256, 4 * 2 * 256**2, matrix_unit=256),
    "tpu7x": Generation(3, 9216, 4 * 2 * 256**2, matrix_unit=256),
}
"""By the name that a topology begins with, as in `v5e:4x4`."""

UNREADABLE = (
    "the installed jaxlib cannot read what libtpu compiled: a newer one gives the estimates"
)
"""Of programs for tpu7x that use its SparseCores: jaxlib 0.10 cannot, 0.12 can."""

KERNEL_PEAK_SHARE = 0.5
"""Most of the peak that attention kernels are charged at: their softmax keeps the units waiting."""


def prepare_environment() -> None:
    """Lets jax run on the CPU and libtpu compile without a TPU; before anything touches a device.

    Raises:
        UserError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu, the compiler for TPUs, is not installed: pip install libtpu")
    jax.config.update("jax_platforms", "cpu")
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # of this machine; the topology is named below
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(name, value)


def devices_of(topology: str, slices: int = 1) -> list[Any]:
    """The devices of `v5e:4x4` and the like, to compile for.

    Raises:
        UserError: there is no such topology.
    """
    name, _, layout = topology.partition(":")
    generation = GENERATIONS.get(name)
    sizes = [int(size) for size in layout.split("x")] if re.fullmatch(r"\d+(x\d+)*", layout) else []
    expected = (
        f"one of {', '.join(GENERATIONS)}, a colon and its sizes, such as v5e:4x4 or v5p:2x2x1"
    )
    if generation is None or not sizes:
        raise UserError(f"topology {topology!r} does not exist: expected {expected}")
    if len(sizes) != generation.axes:
        raise UserError(
            f"topology {topology!r} does not exist: a slice of {name} has {generation.axes} sizes"
        )
    if not 0 < int(np.prod(sizes)) <= generation.most_chips:
        raise UserError(
            f"topology {topology!r} does not exist: a slice of {name} has 1 to "
            f"{generation.most_chips:,} chips"
        )
    options: dict[str, Any] = dict(generation.options)
    if slices > 1:
        options["num_slices"] = slices
    if int(np.prod(sizes)) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)  # some releases of libtpu expect four a host
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        )
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).split(": ", 1)[-1].splitlines()[0]
        raise UserError(f"topology {topology!r} does not exist: {reason}") from error
    return list(description.devices)


@dataclasses.dataclass(frozen=True)
class Report:
    """What compiling one phase of a run for a slice showed; bytes and seconds are of one device.

    Figures that need the compiled program are None where it does not fit. `formula_flops` and
    `compiled_flops` are those of a step on all devices, kernels included; `bytes_accessed` is what
    one device reads from and writes to HBM, as the schedule has it; `cycles` is XLA's
    estimate of one step, `custom_call_seconds` what it leaves out: the kernels, charged at
    `custom_call_peak_share` of the peak. Collectives are counted, and not part of the estimate;
    `hidden_collective_bytes` are those that the schedule puts beside computation.
    `program_hash` is that of what the compiler was given, StableHLO.
    """

    recipe: str
    topology: str
    slices: int
    device_kind: str
    chips: int
    devices: int
    mesh: dict[str, int]
    phase: int
    length: int
    batch_size: int
    microbatches: int
    attention: str
    remat: str
    scan_layers: bool
    tokens_per_step_per_chip: float
    formula_flops: float
    parameter_bytes: int
    optimizer_bytes: int
    compile_seconds: float
    program_hash: str
    fits: bool
    verdict: str
    matmul: str = "default"
    needed_bytes: int | None = None
    available_bytes: int | None = None
    argument_bytes: int | None = None
    temporary_bytes: int | None = None
    output_bytes: int | None = None
    aliased_bytes: int | None = None
    compiled_flops: float | None = None
    bytes_accessed: int | None = None
    cycles: int | None = None
    custom_calls: dict[str, dict[str, float]] | None = None
    custom_call_peak_share: float | None = None
    custom_call_seconds: float | None = None
    estimated_step_seconds: float | None = None
    estimated_tokens_per_second_per_chip: float | None = None
    estimated_mfu: float | None = None
    collective_bytes: dict[str, int] | None = None
    collective_counts: dict[str, int] | None = None
    hidden_collective_bytes: dict[str, int] | None = None
    notes: tuple[str, ...] = ()


def assembled_for(run: Run, topology: str, slices: int = 1) -> Assembly:
    """The run put together on the devices of a slice.

    Raises:
        UserError: there is no such slice, or the mesh does not fit it.
    """
    devices = devices_of(topology, slices)
    mesh = sharding.mesh_of(run.mesh, devices)
    steps = sum(phase.steps or 0 for phase in run.phases) or 1
    with jax.set_mesh(mesh):
        return assemble(run, mesh, steps)


def lower_step(
    run: Run, topology: str, phase_number: int, slices: int = 1
) -> tuple[Assembly, Any, dict[str, Any]]:
    """What the compiler would be given for one phase's train step, and what is known before.

    Raises:
        UserError: there is no such slice, or the mesh or batch does not fit it.
    """
    assembly = assembled_for(run, topology, slices)
    phase = run.phases[phase_number]
    step = assembly.train_step(phase, compiler_options(assembly.mesh))
    lowered = lowered_step(assembly, step, phase, stand_in_vocabulary(run))
    known = _described(run, assembly, topology, slices, phase_number)
    return assembly, lowered, known | {"program_hash": program_hash(lowered)}


def compile_step(
    run: Run, topology: str, phase_number: int, slices: int = 1
) -> tuple[Report, str | None]:
    """The report of one phase's train step, and the compiled text where it fits.

    Raises:
        UserError: there is no such slice, or the mesh or batch does not fit it.
    """
    started = time.monotonic()
    assembly, lowered, report = lower_step(run, topology, phase_number, slices)
    with jax.set_mesh(assembly.mesh), nothing_cached():
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            compiled, verdict = None, out_of_memory(str(error))
            if verdict is None:
                raise
        else:
            verdict = "it compiles and fits"
    report |= {"compile_seconds": time.monotonic() - started, "verdict": verdict}
    if compiled is None:
        needed, available = memory_sizes(verdict)
        return Report(**report, fits=False, needed_bytes=needed, available_bytes=available), None
    memory = compiled.memory_analysis()
    try:
        text = compiled.as_text()
        report |= _estimate(text, topology, report)
    except jax.errors.JaxRuntimeError as error:
        if "RET_CHECK" not in str(error):
            raise
        text, report["notes"] = None, (UNREADABLE,)
    return Report(
        **report,
        fits=True,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        aliased_bytes=memory.alias_size_in_bytes,
    ), text


def _described(
    run: Run, assembly: Assembly, topology: str, slices: int, phase_number: int
) -> dict[str, Any]:
    """What is known without compiling."""
    phase: Phase = run.phases[phase_number]
    devices = assembly.mesh.devices.flatten().tolist()
    # Ironwood shows each chip as two devices at the same place.
    chips = len({(getattr(d, "slice_index", 0), tuple(d.coords)) for d in devices})
    return {
        "recipe": run.name,
        "topology": topology,
        "slices": slices,
        "device_kind": devices[0].device_kind,
        "chips": chips,
        "devices": len(devices),
        "mesh": {name: int(size) for name, size in assembly.mesh.shape.items()},
        "phase": phase_number,
        "length": phase.length,
        "batch_size": phase.batch_size,
        "microbatches": phase.microbatches,
        "attention": assembly.execution.attention,
        "remat": assembly.execution.remat,
        "scan_layers": assembly.execution.scan,
        "matmul": assembly.execution.matmul,
        "tokens_per_step_per_chip": phase.batch_size * phase.length / chips,
        "formula_flops": assembly.flops_per_step(phase, stand_in_vocabulary(run)),
        "parameter_bytes": device_bytes(assembly.state.params),
        "optimizer_bytes": device_bytes(assembly.state.opt_state),
    }


def device_bytes(tree: PyTree) -> int:
    """Bytes of one device's part of abstract arrays that carry shardings."""

    def size(leaf: Any) -> int:
        sharded: NamedSharding = leaf.sharding
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return 0
        return int(np.prod(sharded.shard_shape(leaf.shape))) * leaf.dtype.itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def _estimate(text: str, topology: str, known: dict[str, Any]) -> dict[str, Any]:
    """The figures that stand in the compiled text."""
    sums = hlo.totals(hlo.parse(text))
    generation = GENERATIONS[topology.partition(":")[0]]
    peak = peak_of(known["device_kind"])
    if peak is None:
        raise UserError(f"no peak is known of {known['device_kind']}")
    share = _kernel_share(generation, sums.head_sizes.values())
    kernel_flops = sum(sums.kernel_flops.values())
    kernels = kernel_flops / (peak.flops_per_second * share)
    seconds = sums.cycles * generation.flops_per_cycle / peak.flops_per_second + kernels
    flops = known["formula_flops"] / known["devices"]
    notes = list(sums.notes)
    if sums.collective_counts:
        notes.append("the estimate leaves collectives out")
    return {
        "compiled_flops": float((sums.flops + kernel_flops) * known["devices"]),
        "bytes_accessed": sums.hbm_bytes,
        "cycles": sums.cycles,
        "custom_calls": {
            name: {"calls": calls, "flops": sums.kernel_flops[name]}
            for name, calls in sums.kernel_calls.items()
        },
        "custom_call_peak_share": share if sums.kernel_calls else None,
        "custom_call_seconds": kernels,
        "estimated_step_seconds": seconds,
        "estimated_tokens_per_second_per_chip": known["tokens_per_step_per_chip"] / seconds,
        "estimated_mfu": flops / seconds / peak.of_step(known["matmul"]),
        "collective_bytes": dict(sums.collective_bytes),
        "collective_counts": dict(sums.collective_counts),
        "hidden_collective_bytes": dict(sums.hidden_bytes),
        "notes": tuple(notes),
    }


def _kernel_share(generation: Generation, head_sizes: Iterable[int]) -> float:
    """What part of the peak attention kernels are charged at: the filled part of the units."""
    smallest = min(head_sizes, default=generation.matrix_unit)
    return min(KERNEL_PEAK_SHARE, smallest / generation.matrix_unit)


def out_of_memory(message: str) -> str | None:
    """The compiler's sentence about memory in an error; None for another error."""
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    found = re.search(r"Ran out of memory(?:[^\n]*?\d[KMGT]){2}[^\n]*?(?=\.(?:\s|$))", message)
    return found.group() if found else " ".join(message.split())[:200]


def memory_sizes(verdict: str) -> tuple[int | None, int | None]:
    """Bytes needed and bytes available, as the compiler's sentence has them."""
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    sizes = [
        int(float(number) * units[unit])
        for number, unit in re.findall(r"(\d+(?:\.\d+)?)([KMGT]?)i?B?(?=[\s).,]|$)", verdict)
    ]
    return (sizes[0], sizes[1]) if len(sizes) >= 2 else (None, None)
