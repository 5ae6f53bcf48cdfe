"""Where weights come from: a workdir, a Hugging Face folder or a hub id, all alike."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import PyTree

from flaxpretrain.config import Run, dataset_folder, parse
from flaxpretrain.conversion import hub
from flaxpretrain.conversion.folders import (
    HubModel,
    config_of,
    params_of,
    read_folder,
    tokenizer_of,
)
from flaxpretrain.conversion.tensors import read_json
from flaxpretrain.data.files import files_of
from flaxpretrain.data.mixing import MixedData, mixed_metadata
from flaxpretrain.data.store import METADATA_FILE, TOKENIZER_FOLDER
from flaxpretrain.errors import UserError
from flaxpretrain.locations import Location, is_remote
from flaxpretrain.models.names import to_state_dict
from flaxpretrain.training.checkpoints import Checkpoints

CHECKPOINTS = "checkpoints"
ORIGIN_FILE = "initialized_from.json"
"""In a workdir: the model whose weights the run started from."""


class Pretrained(NamedTuple):
    """A model to work with: configuration, parameters, and its tokenizer's folder if it has one."""

    config: Any
    params: PyTree
    tokenizer: Path | None


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where weights came from: the hub id and commit, or None and the name of a folder."""

    name: str
    hub_id: str | None = None
    commit: str | None = None


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Parameters of a workdir with all that the workdir knows of them.

    run: as the checkpoint recorded it; None for weights that no run has trained yet.
    """

    workdir: Path
    step: int
    run: Run | None
    parts: Mapping[str, tuple[Any, PyTree]]
    metadata: Mapping[str, Any]

    def part(self, name: str | None) -> tuple[Any, PyTree]:
        """Configuration and parameters of a part, by default of the only one.

        Raises:
            UserError: no such part, or several and no name.
        """
        if name is None and len(self.parts) == 1:
            return next(iter(self.parts.values()))
        if name is None or name not in self.parts:
            got = "none was named" if name is None else f"got {name!r}"
            raise UserError(f"--part: expected one of {', '.join(self.parts)}; {got}")
        return self.parts[name]

    def part_with(self, head: str) -> str | None:
        """The name of the first part with this head; None where no part has it."""
        found = (n for n, (c, _) in self.parts.items() if head in getattr(c, "heads", ()))
        return next(found, None)

    @property
    def tokenizer(self) -> Path | None:
        """The folder of the tokenizer, kept in the workdir or with the dataset."""
        folders = [self.workdir / TOKENIZER_FOLDER]
        if self.run is not None:
            dataset = dataset_folder(self.run, self.workdir)
            # Of a remote dataset, the workdir has a copy.
            folders += [] if is_remote(dataset) else [Path(dataset) / TOKENIZER_FOLDER]
        return next((f for f in folders if tokenizer_of(f) is not None), None)


def is_workdir(folder: Path) -> bool:
    """Whether a folder is a workdir with checkpoints."""
    return (folder / CHECKPOINTS).is_dir()


def load_pretrained(
    source: str | Path,
    *,
    step: int | None = None,
    part: str | None = None,
    head: str | None = None,
) -> Pretrained:
    """The model of a workdir (its newest checkpoint, or that of `step`), a folder or a hub id.

    Parameters are nested dicts of numpy arrays. `step` and `part` are for workdirs; without a
    part, it is the first one that has the `head`.

    Raises:
        UserError: no such source, or one that cannot be read.
    """
    folder = Path(source)
    if is_workdir(folder):
        checkpoint = open_checkpoint(folder, step)
        if part is None and head is not None:
            part = checkpoint.part_with(head)
        config, params = checkpoint.part(part)
        return Pretrained(config, params, checkpoint.tokenizer)
    model = open_model(source)[0]
    config = config_of(model)
    return Pretrained(config, params_of(model, config, source=str(source))[0], model.tokenizer)


def open_model(source: str | Path) -> tuple[HubModel, Origin]:
    """Any source as Transformers would find it, and what to call it.

    Raises:
        UserError: no such source, or one that cannot be read.
    """
    folder = Path(source)
    if is_workdir(folder):
        checkpoint = open_checkpoint(folder)
        config, params = checkpoint.part(None)
        tensors = to_state_dict(params, type(config).names, config.vocab_size)
        hub_id = read_origin(folder).hub_id
        return (
            HubModel(config.to_hf(), tensors, checkpoint.tokenizer),
            Origin(folder.resolve().name, hub_id),
        )
    if folder.is_dir():
        return read_folder(folder), Origin(folder.resolve().name)
    if not hub.is_hub_id(str(source)):
        raise UserError(
            f"{source} is not there: expected a workdir with checkpoints, a Hugging Face folder "
            "or a hub id such as bert-base-uncased"
        )
    downloaded = hub.download(str(source))
    name = str(source).partition("@")[0]
    return read_folder(downloaded), Origin(name, name, downloaded.name)


def open_checkpoint(workdir: Path, step: int | None = None) -> Checkpoint:
    """The newest readable checkpoint of a workdir, or that of `step`.

    Raises:
        UserError: there is none, or it does not say which model it is of.
    """
    params, metadata, found = Checkpoints(workdir / CHECKPOINTS).restore_params(step=step)
    if metadata.get("run") is not None:
        run = parse(metadata["run"])
        parts = run.objective.parts(run.model, params)
        return Checkpoint(workdir, found, run, parts, metadata)
    if metadata.get("model") is None:
        raise UserError(f"the checkpoints in {workdir} do not say which model they are of")
    parts = {"model": (parse(metadata["model"]), params)}
    return Checkpoint(workdir, found, None, parts, metadata)


def read_origin(workdir: Path) -> Origin:
    """What the run in a workdir started from; an empty name means random weights."""
    path = workdir / ORIGIN_FILE
    return Origin(**read_json(path)) if path.is_file() else Origin("")


def write_origin(workdir: Path, origin: Origin) -> None:
    """Remembers what the run started from, for its model card."""
    workdir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(origin), indent=2) + "\n"
    (workdir / ORIGIN_FILE).write_text(text, encoding="utf-8")


def dataset_facts(run: Run | None, workdir: Path) -> dict[str, Any]:
    """The content of dataset.json where the dataset is still at hand, else nothing."""
    if run is None:
        return {}
    if isinstance(run.data, MixedData):
        folders = zip(run.data.parts, run.data.folders(), strict=True)
        found = {part.name: _metadata(folder) for part, folder in folders}
        return mixed_metadata(found) if all(found.values()) else {}
    return _metadata(dataset_folder(run, workdir))


def _metadata(dataset: Location) -> dict[str, Any]:
    """The content of a dataset's dataset.json; nothing where it cannot be had."""
    try:
        content = files_of(dataset).text(METADATA_FILE)
        return {} if content is None else json.loads(content)
    except UserError:
        return {}
    except ValueError as error:
        raise UserError(f"{dataset}/{METADATA_FILE} is damaged: {error}") from error


def run_facts(workdir: Path) -> dict[str, Any]:
    """The content of run.json, where there is one."""
    path = workdir / "run.json"
    return read_json(path) if path.is_file() else {}
