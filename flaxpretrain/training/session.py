"""A run opened in its workdir: what evaluations, finishing steps and tools work with."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer

import flaxpretrain
from flaxpretrain.config import Data, Phase, Run, dataset_folder, render
from flaxpretrain.data.buckets import BucketedPlan, BucketPipeline, LengthBuckets
from flaxpretrain.data.mixed_pipeline import MixedPipeline, MixedPlan, mixed_plan
from flaxpretrain.data.mixing import MixedData, MixedDataset, Mixing, Stretch, open_mixed, prolonged
from flaxpretrain.data.pipeline import Batches, Pipeline, resolve
from flaxpretrain.data.rows import RowPlan
from flaxpretrain.data.sections import plan_rows
from flaxpretrain.data.store import METADATA_FILE, TOKENIZER_FOLDER, Dataset, open_dataset
from flaxpretrain.errors import UserError
from flaxpretrain.locations import is_remote
from flaxpretrain.training.assembly import Assembly
from flaxpretrain.training.state import TrainState

CONFIG = "config.json"
METRICS = "metrics.jsonl"


@dataclasses.dataclass
class Session:
    """A run with its dataset, its parts on a mesh, and its present state."""

    run: Run
    workdir: Path
    dataset: Dataset
    phases: tuple[Phase, ...]
    """Resolved: each has `steps`."""
    assembly: Assembly
    state: TrainState
    step: int
    say: Callable[[str], None]
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    """The newest evaluation figures, such as `validation/masked_lm`."""
    command: str = ""
    history: tuple[Stretch, ...] = ()
    """Of a mixture: how its steps were mixed so far."""
    rewinds: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Of which steps the weights were thrown away, and what stands in for them."""
    _eval_steps: dict[Any, Any] = dataclasses.field(default_factory=dict)
    _repeated: set[str] = dataclasses.field(default_factory=set)

    @property
    def total_steps(self) -> int:
        """Steps of all phases."""
        return total_steps(self.phases)

    @functools.cached_property
    def pipeline(self) -> Batches:
        """The training batches."""
        return open_pipeline(self.run, self.dataset, self.phases, self.history)

    def mix(self, metadata: Mapping[str, Any]) -> None:
        """Goes on with a mixture where a checkpoint left it, and says what it comes to."""
        self.history = mixing_history(self.run, metadata, self.step)
        if isinstance(self.pipeline, MixedPipeline) and self.step < self.total_steps:
            for line in self.pipeline.notes(self.step):
                self.say(line)

    def epochs(self, step: int) -> dict[str, float]:
        """How often the parts of a mixture were seen before `step`; says when one is repeated."""
        if not isinstance(self.pipeline, MixedPipeline):
            return {}
        seen = self.pipeline.epochs(step)
        for name, epochs in seen.items():
            if epochs > 1 and name not in self._repeated:
                self._repeated.add(name)
                self.say(f"step {step}: all rows of {name} have been seen, its text is repeated")
        return {f"epochs/{name}": epochs for name, epochs in seen.items()}

    def eval_step(self, objective: Any = None) -> Callable[[Any, Any], Any]:
        """The jitted evaluation step, compiled once an objective."""
        key = json.dumps(render(objective)) if objective is not None else None
        if key not in self._eval_steps:
            self._eval_steps[key] = self.assembly.eval_step(objective)
        return self._eval_steps[key]


def total_steps(phases: tuple[Phase, ...]) -> int:
    """Steps of resolved phases."""
    return sum(phase.steps or 0 for phase in phases)


def note_of_warmup(run: Run, steps: int) -> str | None:
    """A line where a run, shortened perhaps, ends before its learning rate has risen."""
    warmup = getattr(run.schedule, "warmup_steps", None) or 0
    if warmup < steps:
        return None
    return (
        f"warm-up of {warmup:,} steps in a run of {steps:,}: the learning rate never reaches its "
        "peak; --set schedule.warmup_steps=... shortens it"
    )


def open_run_dataset(run: Run, workdir: Path) -> Dataset:
    """The dataset of a run, checked against its model.

    Raises:
        UserError: it is missing or damaged, or its tokenizer does not fit the model.
    """
    if isinstance(run.data, MixedData):
        dataset = open_mixed(run.data)
    else:
        dataset = open_dataset(dataset_folder(run, workdir))
    size, here = run.model.vocab_size, dataset.vocabulary.size
    takes = getattr(run.model, "takes_vocabulary", size.__eq__)
    if not takes(here):
        raise UserError(
            f"{dataset.folder} was made with a tokenizer of {dataset.vocabulary.size} tokens, but "
            f"model.vocab_size is {size}: add --set model.vocab_size={dataset.vocabulary.size}, or "
            "choose the dataset made for this recipe"
        )
    # Transformers counts RoBERTa's positions from it, and an export must say the truth.
    pad = dataset.vocabulary.pad
    if pad is not None and getattr(run.model, "pad_token_id", pad) not in (pad, None):
        raise UserError(
            f"the padding token of {dataset.folder} is {pad}, but model.pad_token_id is "
            f"{run.model.pad_token_id}: add --set model.pad_token_id={pad}"
        )
    return dataset


def dataset_if_built(run: Run, workdir: Path) -> Dataset | None:
    """The dataset of a run, checked against its model; None where its folder has none yet.

    Raises:
        UserError: as `open_run_dataset`; a dataset behind a URL must be there.
    """
    folder = dataset_folder(run, workdir)
    if not is_remote(folder) and not (Path(folder) / METADATA_FILE).exists():
        return None
    return open_run_dataset(run, workdir)


def keep_tokenizer(dataset: Dataset, workdir: Path, write: bool) -> None:
    """Copies the dataset's tokenizer into a workdir that has none, so that it stands by itself.

    Raises:
        UserError: the workdir came with the tokenizer of another model.
    """
    kept, own = workdir / TOKENIZER_FOLDER, dataset.tokenizer_folder
    if kept.exists():
        problem = odd_tokens(kept, own)
        if problem is not None:
            raise UserError(
                f"{kept} is another tokenizer than that of {dataset.folder}: {problem}; build the "
                "dataset with the workdir's tokenizer, or choose a new --workdir"
            )
    elif write and own.is_dir():
        aside = workdir / f"{TOKENIZER_FOLDER}.new"
        shutil.copytree(own, aside, dirs_exist_ok=True)
        aside.rename(kept)


def odd_tokens(model: Path, dataset: Path) -> str | None:
    """How many tokens of the dataset's tokenizer have another id in the model's, in words.

    None where all agree, or where one of the folders has no tokenizer.json.
    """
    files = [folder / "tokenizer.json" for folder in (model, dataset)]
    if not all(file.is_file() for file in files):
        return None
    theirs, ours = (Tokenizer.from_file(str(file)).get_vocab() for file in files)
    odd = [token for token, number in ours.items() if theirs.get(token) != number]
    if not odd:
        return None
    return f"{len(odd)} of {len(ours)} tokens have another id or none, such as {odd[0]!r}"


def dataset_identity(dataset: Dataset) -> str:
    """A hash of what the rows are made of: tokenizer, vocabulary and shard checksums."""
    facts = {
        "fingerprint": dataset.fingerprint,
        "vocabulary": dataset.metadata["vocabulary"],
        "splits": dataset.metadata["splits"],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def row_plan(
    run: Run, dataset: Dataset, data: Data, length: int
) -> RowPlan | MixedPlan | BucketedPlan:
    """The rows that a split, or the parts of a mixture, give at a length."""
    if isinstance(data, MixedData):
        plans = []
        for part in data.parts:
            layout = part.layout or data.layout
            objective = part.objective or run.objective
            framing = layout.framing(objective.framing(dataset.vocabulary, length))
            split = dataset.split(f"{part.name}/{part.split}")
            plans.append(plan_rows(layout, split, framing.room(), data.window_tokens))
        return mixed_plan(data.mixing(), plans)
    if isinstance(data.layout, LengthBuckets):
        framing_of = functools.partial(run.objective.framing, dataset.vocabulary)
        return data.layout.plan_buckets(dataset.split(data.split), framing_of, length)
    framing = data.layout.framing(run.objective.framing(dataset.vocabulary, length))
    return plan_rows(data.layout, dataset.split(data.split), framing.room(), data.window_tokens)


def resolve_phases(run: Run, dataset: Dataset) -> tuple[Phase, ...]:
    """The phases of a run with lengths in steps."""
    return resolve(run.phases, lambda length: row_plan(run, dataset, run.data, length))


def step_shapes(run: Run, dataset: Dataset | None, phases: tuple[Phase, ...]) -> list[Phase]:
    """The shapes of the steps of resolved phases: one a phase, or one a length in buckets.

    Raises:
        UserError: rows go to buckets, and there is no dataset that tells which have any.
    """
    if not isinstance(run.data.layout, LengthBuckets):
        return list(phases)
    if dataset is None:
        raise UserError(
            "data.layout LengthBuckets: only the dataset tells which lengths have rows: build it "
            "first, or name it with --data-dir"
        )
    plans = [(phase, row_plan(run, dataset, run.data, phase.length)) for phase in phases]
    return [
        plan.shaped(phase, length)
        for phase, plan in plans
        if isinstance(plan, BucketedPlan)
        for length in plan.plans
    ]


def open_pipeline(
    run: Run, dataset: Dataset, phases: tuple[Phase, ...], history: tuple[Stretch, ...] = ()
) -> Batches:
    """The training batches of a run; `history` says how the steps of a mixture were mixed."""
    if isinstance(run.data, MixedData) and isinstance(dataset, MixedDataset):
        objectives = {part.name: part.objective or run.objective for part in run.data.parts}
        return MixedPipeline(
            {part.name: dataset.split(f"{part.name}/{part.split}") for part in run.data.parts},
            run.data,
            lambda name, length: objectives[name].framing(dataset.vocabulary, length),
            phases,
            order_seed=run.seeds.order,
            noise_seed=run.seeds.noise,
            history=history,
        )
    options = {"window_tokens": run.data.window_tokens}
    pipeline = Pipeline
    if isinstance(run.data.layout, LengthBuckets):
        if run.data.window_tokens is not None:
            raise UserError(
                "data.layout: LengthBuckets sorts the whole split by length, which cannot be read "
                "in windows (data.window_tokens): use Documents(), which packs, or a local copy of "
                "the dataset"
            )
        pipeline, options = BucketPipeline, {}
    return pipeline(
        dataset.split(run.data.split),
        run.data.layout,
        functools.partial(run.objective.framing, dataset.vocabulary),
        phases,
        order_seed=run.seeds.order,
        noise_seed=run.seeds.noise,
        duplication=run.data.duplication,
        **options,
    )


def mixing_history(run: Run, metadata: Mapping[str, Any], step: int) -> tuple[Stretch, ...]:
    """How the steps of a mixture are mixed, by what a checkpoint at `step` says of those before."""
    if not isinstance(run.data, MixedData):
        return ()
    past = [(first, Mixing.parse(mixing)) for first, mixing in metadata.get("mixing", ())]
    return prolonged(past, run.data.mixing(), step)


_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "tokenizers",
    "transformers",
)


def facts(run: Run, dataset: Dataset, mesh: Any) -> dict[str, Any]:
    """What it takes to repeat the run, beside its configuration: run.json."""
    versions = {}
    for name in _PACKAGES:
        versions[name] = importlib.metadata.version(name)
    return {
        "flaxpretrain": flaxpretrain.__version__,
        "python": platform.python_version(),
        "packages": versions,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "libtpu_init_args": os.environ.get("LIBTPU_INIT_ARGS", ""),
        "devices": {
            "platform": mesh.devices.flat[0].platform,
            "kind": mesh.devices.flat[0].device_kind,
            "count": int(np.size(mesh.devices)),
            "processes": jax.process_count(),
            "mesh": {name: int(size) for name, size in mesh.shape.items()},
        },
        "dataset": {
            "identity": dataset_identity(dataset),
            "fingerprint": dataset.fingerprint,
            "licence": dataset.metadata.get("licence"),
            "attribution": dataset.metadata.get("attribution"),
        },
        "seeds": dataclasses.asdict(run.seeds),
    }


def write_json(path: Path, data: Any) -> None:
    """Writes aside, then renames, so that no reader sees half of it."""
    aside = path.with_name(path.name + ".new")
    aside.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    aside.replace(path)
