"""Evaluation on fixed noise: every row once, the same masks each time, summed on the host.

The figures are the same at any batch size and on any number of devices: batches are padded with
rows of weight zero, and sums are added in float64.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from flaxpretrain.data.mixing import held_out
from flaxpretrain.data.pipeline import evaluation_batches
from flaxpretrain.errors import UserError
from flaxpretrain.objectives.objective import Objective, Sum
from flaxpretrain.training import sharding

HostSums = dict[str, Sum]


def add_on_host(total: Mapping[str, Sum], more: Mapping[str, Sum]) -> HostSums:
    """Adds sums that were read from the device, in float64."""
    added = {}
    for name, s in more.items():
        old = total.get(name, Sum(np.float64(0), np.float64(0)))
        added[name] = Sum(
            old.total + np.asarray(s.total, np.float64),
            old.weight + np.asarray(s.weight, np.float64),
        )
    return added


def fixed_noise_pass(
    eval_step: Callable[[PyTree, PyTree], Mapping[str, Sum]],
    params: PyTree,
    batches: Iterable[Mapping[str, Any]],
    batch_size: int,
    mesh: Mesh,
) -> HostSums:
    """Sums of all batches; the device works on one batch while the host adds the one before."""
    rows = sharding.process_rows(mesh, batch_size)
    total: HostSums = {}
    before = None
    for batch in batches:
        local = {name: array[rows] for name, array in batch.items()}
        sums = eval_step(params, sharding.to_device(local, mesh, batch_size))
        if before is not None:
            total = add_on_host(total, jax.device_get(before))
        before = sums
    if before is None:
        raise UserError("the evaluation split has no rows: give the dataset a larger share of it")
    return add_on_host(total, jax.device_get(before))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedNoise:
    """The objective's own loss and metrics on a split, with noise fixed once.

    `every_steps` None means only after the last step; `max_rows` None means the whole split;
    `length` None means the rows of the last phase. `objective` evaluates under other noise than
    that of training (15 % masks for a model trained at 30 %, say).

    Of a mixture, `split` "validation" stands for that of each part, with figures of its own
    ("wiki/perplexity"), and "wiki/validation" for that of one.
    """

    batch_size: int
    name: str = "validation"
    split: str = "validation"
    every_steps: int | None = None
    max_rows: int | None = None
    length: int | None = None
    seed: int = 0
    objective: Objective | None = None

    def run(self, session: Any) -> dict[str, float]:
        """Figures by name, such as `masked_lm`, for the session's present parameters."""
        objective = self.objective or session.run.objective
        mesh = session.assembly.mesh
        groups = mesh.shape["data"] * mesh.shape["fsdp"]
        batch_size = -(-self.batch_size // groups) * groups
        dataset, length = session.dataset, self.length or session.phases[-1].length
        step = session.eval_step(self.objective)
        total: HostSums = {}
        figures: dict[str, float] = {}
        for held in held_out(session.run.data, dataset, self.split):
            split = dataset.split(held.split)
            framed = self.objective or held.objective or objective
            batches = evaluation_batches(
                split,
                held.layout,
                framed.framing(dataset.vocabulary, length),
                batch_size,
                self.seed,
                limit_rows=self.max_rows,
            )
            sums = fixed_noise_pass(step, session.state.params, batches, batch_size, mesh)
            own = objective.summarize(sums)
            own |= objective.per_text(own, split)
            figures |= {f"{held.label}/{n}" if held.label else n: v for n, v in own.items()}
            total = add_on_host(total, sums)
        # Of several splits also the figures of all of them together.
        return objective.summarize(total) | figures


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedNoiseByEpoch(FixedNoise):
    """`FixedNoise` before the first step too, and after every so many epochs of the data.

    Reference: chapter 7 of the Hugging Face course, fine-tuning a masked language model.
    """

    at_start: bool = True
    every_epochs: float | None = 1.0


def due_evaluations(session: Any) -> list[Any]:
    """Those of a run's evaluations whose time is the present step; after the last, all are.

    One is due every `every_steps`; where it has these fields, also before the first step
    (`at_start`) and when `every_epochs` more of the data's rows have been seen.
    """
    return [evaluation for evaluation in session.run.evaluations if _is_due(evaluation, session)]


def _is_due(evaluation: Any, session: Any) -> bool:
    step = session.step
    if step == 0:
        return getattr(evaluation, "at_start", False)
    if evaluation.every_steps is not None and step % evaluation.every_steps == 0:
        return True
    epochs = getattr(evaluation, "every_epochs", None)
    if epochs is None or step >= session.total_steps:
        return False
    before, now = (session.pipeline.epoch(number) // epochs for number in (step - 1, step))
    return now > before
