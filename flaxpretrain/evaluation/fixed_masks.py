"""Loss and metrics of a model on a split, with noise fixed once: the same figures anywhere.

The figures do not depend on the batch size or the number of devices: a row's noise is its own,
batches are filled up with rows of weight zero, and sums are added on the host in float64.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxpretrain.conversion.init_from import check_tokenizers
from flaxpretrain.data.mixing import MixedData
from flaxpretrain.data.pipeline import evaluation_batches
from flaxpretrain.data.store import Dataset
from flaxpretrain.errors import UserError
from flaxpretrain.evaluation import ngrams
from flaxpretrain.evaluation.subject import Subject
from flaxpretrain.models.functional import Execution, model_of
from flaxpretrain.objectives.objective import Objective, perplexity
from flaxpretrain.shapes import Batch
from flaxpretrain.training import sharding
from flaxpretrain.training.assembly import attention_backend
from flaxpretrain.training.evaluate import FixedNoise, fixed_noise_pass
from flaxpretrain.training.state import TrainState
from flaxpretrain.training.step import make_eval_step

Watch = Callable[[Iterable[Batch], int], Iterable[Batch]]
"""Passes batches on, of which there are so many, and shows how far they are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedMasks:
    """Which rows of a dataset are evaluated, under which noise.

    `max_rows` None means the whole split, else so many rows picked by `seed`, which also fixes
    the noise.
    """

    objective: Objective
    layout: Any
    length: int
    split: str = "validation"
    max_rows: int | None = None
    seed: int = 0

    def batches(self, dataset: Dataset, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
        """Every row once, the last batch filled up with empty rows."""
        return evaluation_batches(
            dataset.split(self.split),
            self.layout,
            self.objective.framing(dataset.vocabulary, self.length),
            batch_size,
            self.seed,
            limit_rows=self.max_rows,
        )

    def rows(self, dataset: Dataset) -> int:
        """How many rows that is."""
        framing = self.layout.framing(self.objective.framing(dataset.vocabulary, self.length))
        plan = self.layout.fill(dataset.split(self.split), framing.room())
        return min(plan.rows_per_epoch, self.max_rows or plan.rows_per_epoch)


def settings_of(
    subject: Subject,
    *,
    split: str = "validation",
    rate: float | None = None,
    length: int | None = None,
    max_rows: int | None = None,
    seed: int | None = None,
) -> FixedMasks:
    """How a subject's own run evaluates a split, with changes.

    Where the run has no `FixedNoise` on the split, its objective, the length of its last phase,
    all rows and seed 0.

    Raises:
        UserError: a rate for an objective without token masks, or a length that the model lacks.
    """
    run = subject.run
    own = next(
        (
            e
            for e in run.evaluations
            if isinstance(e, FixedNoise) and e.split in (split, split.rpartition("/")[2])
        ),
        FixedNoise(batch_size=1),
    )
    part = run.data.part_of(split) if isinstance(run.data, MixedData) else None
    objective = own.objective or (part and part.objective) or run.objective
    length = length or own.length or run.phases[-1].length
    longest = getattr(run.model, "max_length", None)
    if longest is not None and length > longest:
        raise UserError(f"--length {length}: {subject.name} has positions for {longest} tokens")
    if rate is not None:
        masking = getattr(objective, "masking", None)
        if masking is None:
            name = type(objective).__name__
            raise UserError(f"--rate {rate}: {subject.name} was trained by {name}, without a rate")
        changed: Any = {"masking": masking.with_rate(rate)}
        objective = dataclasses.replace(objective, **changed)
    return FixedMasks(
        objective=objective,
        layout=(part and part.layout) or run.data.layout,
        length=length,
        split=split,
        max_rows=max_rows or own.max_rows,
        seed=own.seed if seed is None else seed,
    )


def check_dataset(subject: Subject, dataset: Dataset) -> None:
    """Raises UserError where the dataset was made with another tokenizer than the model's."""
    size = subject.run.model.vocab_size
    takes = getattr(subject.run.model, "takes_vocabulary", size.__eq__)
    if not takes(dataset.vocabulary.size):
        raise UserError(
            f"{dataset.folder} was made with a tokenizer of {dataset.vocabulary.size} tokens, but "
            f"{subject.name} has {size}: build the dataset with the tokenizer of that model"
        )
    check_tokenizers(subject.tokenizer, dataset.tokenizer_folder, subject.name)


def evaluate(
    subject: Subject,
    dataset: Dataset,
    settings: FixedMasks,
    mesh: jax.sharding.Mesh,
    batch_size: int,
    *,
    compute: str = "float32",
    watch: Watch = lambda batches, count: batches,
) -> dict[str, float]:
    """The objective's figures, and `loss`, its terms weighted and added.

    `compute` float32 uses full float32 products everywhere, also where the hardware would rather
    not. `batch_size` is rounded up to what the mesh divides.

    Raises:
        UserError: the dataset does not fit the model, or has no such rows.
    """
    check_dataset(subject, dataset)
    run, objective = subject.run, settings.objective
    groups = mesh.shape["data"] * mesh.shape["fsdp"]
    batch_size = -(-batch_size // groups) * groups
    model = model_of(functools.partial(objective.build, run.model))
    device = mesh.devices.flat[0]
    same = dataclasses.replace(
        run, precision=dataclasses.replace(run.precision, compute=compute), objective=objective
    )
    step = make_eval_step(
        objective,
        model,
        compute_dtype=jnp.dtype(compute),
        execution=Execution(
            attention=attention_backend(same, device),
            scan=run.scan_layers,
            platform=device.platform,
        ),
    )
    batches = watch(settings.batches(dataset, batch_size), -(-settings.rows(dataset) // batch_size))
    with jax.set_mesh(mesh), jax.default_matmul_precision(_PRODUCTS[compute]):
        params = _placed(subject, mesh)
        jitted = jax.jit(step, out_shardings=sharding.replicated(mesh))
        sums = fixed_noise_pass(jitted, params, batches, batch_size, mesh)
    figures = objective.summarize(sums)
    figures |= objective.per_text(figures, dataset.split(settings.split))
    missing = [name for name in objective.terms if name not in figures]
    if missing:
        raise UserError(
            f"split {settings.split!r} of {dataset.folder} gives nothing to predict for "
            f"{', '.join(missing)}: it has too little text"
        )
    loss = sum(c * figures[name] for name, c in objective.terms.items())
    return {"loss": loss, "perplexity": perplexity(loss)} | figures


_PRODUCTS = {"float32": "highest", "bfloat16": "default"}


def _placed(subject: Subject, mesh: jax.sharding.Mesh) -> Any:
    """The parameters on the mesh, by the rules of their architecture."""
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), subject.params)
    nothing: Any = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(step=nothing, params=abstract, opt_state=(), key=nothing)
    run = subject.run
    rules = (*run.objective.sharding, *getattr(run.model, "sharding", ()))
    shardings = sharding.state_shardings(state, rules, mesh).params
    return jax.tree.map(jax.device_put, subject.params, shardings)


def baselines(dataset: Dataset, settings: FixedMasks, train: str = "train") -> ngrams.Nats:
    """What counting the `train` split achieves at the very positions that `settings` masks."""
    counted = ngrams.fit(dataset.split(train), dataset.vocabulary)
    # Any batch size gives the same positions.
    return ngrams.score(counted, settings.batches(dataset, 256), dataset.vocabulary)
