"""What a run will be, before it starts: recipe, parameters, cost, and a picture of the schedule."""

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from flaxpretrain.config import Phase, Run, render
from flaxpretrain.data.buckets import BucketedPlan
from flaxpretrain.data.store import Dataset
from flaxpretrain.data.vocabulary import Vocabulary
from flaxpretrain.errors import UserError
from flaxpretrain.hardware import peak_of, rule_for
from flaxpretrain.training import sharding
from flaxpretrain.training.assembly import Assembly, assemble, stand_in_vocabulary
from flaxpretrain.training.metrics import duration
from flaxpretrain.training.session import (
    dataset_if_built,
    resolve_phases,
    row_plan,
    total_steps,
)

ASSUMED_MFU = 0.4
"""Share of the peak that the estimate of chip-hours assumes."""

ASSUMED_CPU_FLOPS_PER_SECOND = 60e9
"""Of one CPU device in the estimate: two cores of a server do about this in float32."""


def print_plan(run: Run, workdir: Path, console: Console | None = None) -> None:
    """Prints the rendered recipe, parameters, devices, cost, and the learning rate over steps."""
    console = console or Console(width=100)
    text = json.dumps(render(run), indent=2)
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    dataset = dataset_if_built(run, workdir)
    phases = _phases(run, dataset)
    mesh = sharding.mesh_of(run.mesh)
    assembly = assemble(run, mesh, total_steps(phases))
    console.print(parameter_table(assembly))
    vocabulary = dataset.vocabulary if dataset else stand_in_vocabulary(run)
    for line in cost_lines(assembly, phases, vocabulary, dataset):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(schedule_picture(run, total_steps(phases)), highlight=False, markup=False)


def _phases(run: Run, dataset: Dataset | None) -> tuple[Phase, ...]:
    if dataset is not None and all(phase.seconds is None for phase in run.phases):
        return resolve_phases(run, dataset)
    unknown = [phase for phase in run.phases if phase.steps is None]
    if unknown:
        raise UserError(
            "the plan needs the number of steps, and a phase is given in tokens, epochs or "
            "seconds: build the dataset first, or say --set steps=N"
        )
    return run.phases


def parameter_table(assembly: Assembly) -> Table:
    """Parameters by module: how many, and their share."""
    counts: dict[str, int] = defaultdict(int)
    leaves = jax.tree_util.tree_leaves_with_path(assembly.state.params)
    for path, leaf in leaves:
        names = [str(getattr(entry, "key", entry)) for entry in path]
        counts["/".join(names[:-1][:3])] += int(np.prod(leaf.shape))
    total = sum(counts.values())
    table = Table(title=f"parameters: {total:,}")
    table.add_column("module")
    table.add_column("parameters", justify="right")
    table.add_column("share", justify="right")
    for name, count in counts.items():
        table.add_row(name, f"{count:,}", f"{count / total:.1%}")
    return table


def cost_lines(
    assembly: Assembly, phases: tuple[Phase, ...], vocabulary: Vocabulary, dataset: Dataset | None
) -> list[str]:
    """Steps, tokens, epochs, disk and chip-hours, a line each."""
    run, mesh = assembly.run, assembly.mesh
    device, count = mesh.devices.flat[0], int(np.size(mesh.devices))
    axes = " x ".join(f"{n} {s}" for n, s in mesh.shape.items())
    lines = [f"devices: {count} x {device.device_kind}, mesh {axes}"]
    if rule := rule_for(run.hardware, device.device_kind, count):
        lines.append(str(rule))
    if (matmul := run.precision.matmul) != "default":
        lines.append(f"matrix products of the layers: {matmul}")
    flops = 0.0
    positions = 0
    for number, phase in enumerate(phases):
        steps = phase.steps or 0
        plan = None if dataset is None else row_plan(run, dataset, run.data, phase.length)
        each = _flops_per_step(assembly, phase, vocabulary, plan)
        flops += steps * each
        positions += steps * phase.batch_size * phase.length
        line = (
            f"phase {number}: {steps:,} steps of {phase.batch_size} rows of {phase.length} tokens"
            f" in {phase.microbatches} microbatches, {each / 1e12:.3g} TFLOP a step"
        )
        if plan is not None:
            line += (
                f", {steps * phase.batch_size / plan.rows_per_epoch:.2f} epochs of "
                f"{plan.rows_per_epoch:,} rows, {plan.padding_share:.1%} padding"
            )
        lines.append(line)
        lines += plan.notes() if isinstance(plan, BucketedPlan) else []
    lines.append(f"total: {total_steps(phases):,} steps, {positions:,} token positions")
    if dataset is None:
        lines.append("dataset: not built yet, so epochs are not known")
    peak = peak_of(device.device_kind)
    rate = peak.of_step(matmul) * ASSUMED_MFU if peak else ASSUMED_CPU_FLOPS_PER_SECOND
    kind = "peak" if matmul == "default" else f"{matmul} peak"
    basis = f"{ASSUMED_MFU:.0%} of {peak.name}'s {kind}" if peak else "60 GFLOP/s"
    seconds = flops / rate
    lines.append(
        f"compute: {flops:.3g} FLOP, about {seconds / 3600:.3g} device-hours, "
        f"{duration(seconds / count)} on {count} device{'s' if count > 1 else ''} "
        f"(an estimate, at {basis} each)"
    )
    size = sum(
        int(np.prod(leaf.shape)) * _itemsize(leaf.dtype) for leaf in jax.tree.leaves(assembly.state)
    )
    kept = run.checkpoints.keep_last + (run.checkpoints.keep_best if run.checkpoints.best else 0)
    lines.append(
        f"checkpoints: {size / 2**20:,.1f} MiB each, up to {kept} kept: "
        f"{kept * size / 2**30:.2f} GiB of disk"
    )
    return lines


def _flops_per_step(assembly: Assembly, phase: Phase, vocabulary: Vocabulary, plan: Any) -> float:
    """Of a mean step, where rows are of several lengths."""
    if not isinstance(plan, BucketedPlan):
        return assembly.flops_per_step(phase, vocabulary)
    return sum(
        share * assembly.flops_per_step(plan.shaped(phase, length), vocabulary)
        for length, share in zip(plan.plans, plan.shares.tolist(), strict=True)
    )


def _itemsize(dtype: Any) -> int:
    return 8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else np.dtype(dtype).itemsize


def schedule_picture(run: Run, steps: int, width: int = 64, height: int = 8) -> str:
    """The learning rate over the run, drawn with characters."""
    at = np.linspace(0, max(steps - 1, 0), width).astype(int)
    peak = run.optimizer.learning_rate
    rates = np.array([float(run.schedule.factor(int(s), steps)) * peak for s in at])
    top = rates.max() if rates.max() > 0 else 1.0
    heights = np.round(rates / top * (height * 8 - 1)).astype(int)
    blocks = " ▁▂▃▄▅▆▇█"
    rows = []
    for level in reversed(range(height)):
        cells = "".join(blocks[int(np.clip(h + 1 - level * 8, 0, 8))] for h in heights)
        label = f"{top * (level + 1) / height:.2e}" if level in (0, height - 1) else ""
        rows.append(f"{label:>9} |{cells}")
    name = re.sub(r"\(.*", "", type(run.schedule).__name__)
    rows.append(" " * 10 + "+" + "-" * width)
    rows.append(f"{'':>11}0{'learning rate, ' + name:^{width - 2 - len(str(steps))}}{steps}")
    return "\n".join(rows)
