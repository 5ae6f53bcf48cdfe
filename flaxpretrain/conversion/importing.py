"""A Hugging Face model as a workdir at step 0, from which training goes on and tools work."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flaxpretrain
from flaxpretrain.config import Run, render
from flaxpretrain.conversion.folders import (
    CONFIG_FILE,
    HubModel,
    config_class,
    config_of,
    copy_tokenizer,
    params_of,
)
from flaxpretrain.conversion.init_from import (
    differing,
    fitted_params,
    flags_of,
    fresh_params,
)
from flaxpretrain.conversion.joint import fitted_run, joint_params, pair_of
from flaxpretrain.conversion.sources import CHECKPOINTS, Origin, open_model, write_origin
from flaxpretrain.data.store import TOKENIZER_FOLDER
from flaxpretrain.errors import UserError
from flaxpretrain.training.checkpoints import Checkpoints
from flaxpretrain.training.resume import FORMAT
from flaxpretrain.training.session import write_json


@dataclasses.dataclass(frozen=True)
class Imported:
    """What an import made.

    flags: `--set` arguments with which the recipe trains this model.
    """

    workdir: Path
    config: Any
    parameters: int
    flags: tuple[str, ...]


def import_model(
    source: str | Path,
    workdir: Path,
    run: Run | None,
    *,
    say: Callable[[str], None],
    others: Sequence[str | Path] = (),
) -> Imported:
    """Writes a workdir whose checkpoint of step 0 holds a model's weights, and its tokenizer.

    With a run, the checkpoint is for that run, whose model takes the source's sizes and keeps its
    own heads; those that the source lacks start fresh. Without, the model is kept as it is.
    With `others`, sources of the run's other networks such as ELECTRA's generator, nothing starts
    fresh.

    Raises:
        UserError: the workdir is in use, or a source cannot be read or does not fit the run.
    """
    require_unused(workdir)
    model, origin = open_model(source)
    more = {str(other): open_model(other)[0] for other in others}
    return write_workdir(model, origin, workdir, run, source=str(source), say=say, more=more)


def require_unused(workdir: Path) -> None:
    """Raises UserError where a run or a model lies already."""
    if (workdir / CHECKPOINTS).exists() or (workdir / CONFIG_FILE).exists():
        raise UserError(f"--workdir {workdir} is in use: choose a new one")


def write_workdir(
    model: HubModel,
    origin: Origin,
    workdir: Path,
    run: Run | None,
    *,
    source: str,
    say: Callable[[str], None],
    more: Mapping[str, HubModel] | None = None,
) -> Imported:
    """As `import_model`, for a model that is open already; `source` is its name in messages.

    `more` are models of the run's other networks, by name.

    Raises:
        UserError: the workdir cannot be written, or the models do not fit the run.
    """
    config, flags = config_of(model), ()
    if more and run is None:
        raise UserError("several sources are for a run that trains several networks: name a recipe")
    if run is None:
        params, notes = params_of(model, config, source=source)
        for note in notes:
            say(f"{source}: {note}")
    elif more:
        pair = pair_of({source: model, **more})
        run, flags = fitted_run(run, pair)
        config, params = run.model, joint_params(run, pair, say)
    else:
        run, flags = _fitted_run(model, config, run, source)
        config, params = run.model, fitted_params(model, run, source=source, say=say)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be written ({error.strerror})") from error
    if model.tokenizer is not None:
        copy_tokenizer(model.tokenizer, workdir / TOKENIZER_FOLDER)
    else:
        say(f"{source}: no tokenizer; exports and evaluation of {workdir} will need --tokenizer")
    write_origin(workdir, origin)
    if run is not None:
        write_json(workdir / CONFIG_FILE, render(run))
    metadata = {
        "format": FORMAT,
        "step": 0,
        "run": None if run is None else render(run),
        "model": render(config),
        "phase_steps": [],
        "dataset": None,
        "tokenizer": None,
        "code_version": flaxpretrain.__version__,
        "figures": {},
    }
    # Last: with it the workdir is whole.
    Checkpoints(workdir / CHECKPOINTS).save_params(0, params, metadata)
    return Imported(workdir, config, _count(params), flags)


def _fitted_run(model: HubModel, config: Any, run: Run, source: str) -> tuple[Run, tuple[str, ...]]:
    """The run with the source's sizes, and the flags that say so."""
    if not isinstance(run.model, config_class(model.values.get("model_type"))):
        raise UserError(
            f"{source} is a {config.model_type}, but the recipe {run.name} trains a "
            f"{run.model.model_type}: choose a recipe for {config.model_type}"
        )
    parts = list(run.objective.parts(run.model, fresh_params(run)).values())
    if len(parts) > 1 and config.heads != parts[0][0].heads:
        return run, ()  # not the network that gives the run's model its sizes
    changes = differing(config, run.model)
    fitted = dataclasses.replace(run.model, **changes)
    return dataclasses.replace(run, model=fitted), tuple(flags_of(changes))


def _count(params: Any) -> int:
    if isinstance(params, dict):
        return sum(_count(value) for value in params.values())
    return int(params.size)
