"""Hugging Face folders: configuration, tokenizer, and weights as parameters."""

import dataclasses
import importlib
import json
import pkgutil
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

import flaxpretrain.models
from flaxpretrain.conversion.tensors import read_json, read_tensors
from flaxpretrain.errors import UserError
from flaxpretrain.models.functional import model_of
from flaxpretrain.models.names import flatten, to_params

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
"""What a tokenizer may consist of; never code."""


@dataclasses.dataclass(frozen=True)
class HubModel:
    """What a Hugging Face folder holds: its config.json, its tensors, and where its tokenizer is.

    `tokenizer` is None where the folder has none.
    """

    values: Mapping[str, Any]
    tensors: Mapping[str, Any]
    tokenizer: Path | None


def read_folder(folder: Path) -> HubModel:
    """Reads a Hugging Face folder without running any of its code.

    Raises:
        UserError: a file is missing or damaged.
    """
    values = read_json(folder / CONFIG_FILE)
    return HubModel(values, read_tensors(folder), tokenizer_of(folder))


def tokenizer_of(folder: Path) -> Path | None:
    """The folder itself when it holds a tokenizer."""
    return folder if any((folder / name).is_file() for name in TOKENIZER_FILES) else None


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copies the files of a tokenizer; returns their names.

    Raises:
        UserError: there are none.
    """
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not names:
        raise UserError(f"{source} holds no tokenizer: expected tokenizer.json or vocab.txt")
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def adapt_tokenizer(folder: Path, length: int | None) -> None:
    """Makes the tokenizer of an exported model say the longest row that the model takes, if any.

    Its class gets the name that older releases of Transformers know as well.
    """
    path = folder / "tokenizer_config.json"
    values = read_json(path) if path.is_file() else {}
    stated = values.get("model_max_length")
    # Transformers writes a huge number where it knows no limit.
    if length is not None and (not isinstance(stated, int) or stated > length):
        values["model_max_length"] = length
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def config_class(model_type: Any) -> type:
    """The configuration class of the architecture that Transformers calls `model_type`.

    Raises:
        UserError: there is no such architecture here; those that there are, are listed.
    """
    file = str(model_type).replace("-", "_")
    files = [info.name for info in pkgutil.iter_modules(flaxpretrain.models.__path__)]
    if file in files:
        found = _config_in(file, model_type)
        if found is not None:
            return found
    known = [name for name in files if _config_in(name) is not None]
    raise UserError(f"config.json: model_type is {model_type!r}; known: {', '.join(known)}")


def _config_in(file: str, model_type: str | None = None) -> type | None:
    """The configuration that a file of `models/` defines, of this model_type if one is given."""
    module = importlib.import_module(f"{flaxpretrain.models.__name__}.{file}")
    for value in vars(module).values():
        stated = getattr(value, "model_type", None) if isinstance(value, type) else None
        if stated is not None and stated == (model_type or stated):
            return value
    return None


def config_of(model: HubModel) -> Any:
    """The configuration of a Hugging Face model, with the heads that its tensors show.

    Raises:
        UserError: an architecture or an option that is not known here.
    """
    config = config_class(model.values.get("model_type")).from_hf(model.values)
    return config.fitted(model.tensors)


def params_of(
    model: HubModel, config: Any, *, source: str, initial: PyTree = None
) -> tuple[PyTree, tuple[str, ...]]:
    """Parameters of a configuration's network, and notes on names dropped, renamed or kept fresh.

    `initial` parameters serve for heads that the model lacks altogether.

    Raises:
        UserError: names left over, missing or of another shape, all of them in one line.
    """
    shapes = model_of(config.build).abstract()
    try:
        loaded = to_params(
            model.tensors, type(config).names, shapes, config.vocab_size, initial=initial
        )
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    if initial is not None:
        _require_trunk(config, loaded.params, initial, source)
    return loaded.params, loaded.notes


def _require_trunk(config: Any, params: PyTree, initial: PyTree, source: str) -> None:
    """Only heads may be missing from a checkpoint: a network without layers is a mistake."""
    trunk = model_of(dataclasses.replace(config, heads=()).build).abstract()
    given = dict(flatten(initial))
    fresh = {
        path.split("/")[0] for path, leaf in flatten(params) if leaf is given[path]
    } & trunk.keys()
    if fresh:
        raise UserError(f"{source}: checkpoint has no {' and no '.join(sorted(fresh))}")
