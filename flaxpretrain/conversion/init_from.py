"""Weights for a new run from a model that exists already: continued pretraining."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from flaxpretrain.config import Run, dataset_folder
from flaxpretrain.conversion.check import locally
from flaxpretrain.conversion.folders import HubModel, config_class, params_of
from flaxpretrain.conversion.resizing import resized_for_dataset
from flaxpretrain.conversion.sources import open_model, write_origin
from flaxpretrain.data.files import files_of
from flaxpretrain.data.store import TOKENIZER_FILES, TOKENIZER_FOLDER
from flaxpretrain.errors import UserError
from flaxpretrain.models.functional import model_of
from flaxpretrain.training.session import odd_tokens

_MAY_DIFFER = {
    "heads",
    "vocab_multiple",
    "position_init",
    "initializer_range",
    "initializer_factor",
    "init_std",
    "bos_token_id",
    "eos_token_id",
    "forced_eos_token_id",
    "reorder_and_upcast_attn",
}
"""Fields that do not change what given weights compute; dropout rates neither."""


def weights_from(
    source: str | Path,
    run: Run,
    *,
    say: Callable[[str], None],
    workdir: Path | None = None,
) -> PyTree:
    """Parameters for a run from a workdir, a Hugging Face folder or a hub id.

    What the run's model shares with the source is copied. Heads that the source lacks start
    fresh, from `run.seeds.init`; those that the run lacks are left. `say` gets a line on each.
    With a `workdir`, the tokenizer of the run's dataset must agree with the source's, or extend it,
    and the workdir remembers what the run started from.

    Raises:
        UserError: another architecture, sizes or activations, another tokenizer, or names missing
            or left over.
    """
    model, origin = open_model(source)
    if workdir is not None:
        # Not by opening the dataset: a mixture has several, and one tokenizer.
        dataset = files_of(dataset_folder(run, workdir))
        tokenizer = dataset.folder(TOKENIZER_FOLDER, TOKENIZER_FILES)
        model = resized_for_dataset(model, tokenizer, source, say)
        check_tokenizers(model.tokenizer, tokenizer, source)
    params = fitted_params(model, run, source=str(source), say=say)
    if workdir is not None and jax.process_index() == 0:
        write_origin(workdir, origin)
    return params


def fitted_params(
    model: HubModel,
    run: Run,
    *,
    source: str,
    say: Callable[[str], None],
    initial: PyTree | None = None,
) -> PyTree:
    """The parameters of a run's objective with those of the part that fits the model replaced.

    `initial` are the parameters to start from, by default the run's own.
    """
    if initial is None:
        initial = fresh_params(run)
    config, fresh = _fitting_part(model, run, initial, source)
    loaded, notes = params_of(model, config, source=source, initial=fresh)
    for note in notes:
        say(f"{source}: {note}")
    new = {id(old): leaf for old, leaf in zip(*map(jax.tree.leaves, (fresh, loaded)), strict=True)}
    if not new.keys() <= set(map(id, jax.tree.leaves(initial))):
        raise UserError(
            f"{source}: {type(run.objective).__name__} does not hold this network's parameters "
            "as they are (it trains a difference of them, say), so they cannot be taken over"
        )
    return jax.tree.map(lambda leaf: new.get(id(leaf), leaf), initial)


def fresh_params(run: Run) -> PyTree:
    """What the run would start from by itself, as numpy arrays."""
    model = model_of(functools.partial(run.objective.build, run.model))
    with locally():
        params = jax.jit(model.init)(jax.random.key(run.seeds.init))
    return jax.tree.map(np.asarray, params)


def _fitting_part(model: HubModel, run: Run, params: PyTree, source: str) -> tuple[Any, PyTree]:
    """The first of the run's networks that computes what the source's weights are made for."""
    theirs = config_class(model.values.get("model_type"))
    problems = []
    parts = list(run.objective.parts(run.model, params).values())
    # Of two networks of one size, the one with the source's heads.
    heads = theirs.architectures.get((model.values.get("architectures") or [None])[0])
    parts.sort(key=lambda part: getattr(part[0], "heads", None) != heads)
    for config, subtree in parts:
        if not isinstance(config, theirs):
            problems.append(
                f"it is a {model.values.get('model_type')}, the run trains a {config.model_type}"
            )
            continue
        changes = differing(theirs.from_hf(model.values, heads=config.heads), config)
        if not changes:
            return config, subtree
        problems.append(f"its model is another one: add {' '.join(flags_of(changes))}")
    raise UserError(f"{source} does not fit the recipe {run.name}: {problems[0]}")


def differing(source: Any, target: Any) -> dict[str, Any]:
    """Fields of `target` that must change, and to what, to compute what `source` computes."""
    changes = {}
    for field in dataclasses.fields(source):
        theirs, ours = getattr(source, field.name), getattr(target, field.name)
        free = field.name in _MAY_DIFFER or "drop" in field.name  # GPT-2 has attn_pdrop
        if not free and theirs != ours:
            changes[field.name] = theirs
    return changes


def flags_of(changes: Mapping[str, Any]) -> list[str]:
    """The arguments of run_pretraining.py that make these changes to a recipe's model."""
    return [f"--set model.{name}={value}" for name, value in changes.items()]


def check_tokenizers(source: Path | None, dataset: Path, name: str | Path) -> None:
    """Compares the ids of the tokens, as far as both sides have a tokenizer.json.

    Raises:
        UserError: some tokens have another id.
    """
    problem = None if source is None else odd_tokens(source, dataset)
    if problem is not None:
        raise UserError(
            f"{name} was trained with another tokenizer than the dataset: {problem}; build the "
            "dataset with the tokenizer of that model"
        )
