"""Files of tensors as Transformers writes and reads them; torch only for pytorch_model.bin."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  numpy learns bfloat16 from it
import numpy as np
import safetensors
import safetensors.numpy

from flaxpretrain.errors import UserError

SAFETENSORS = "model.safetensors"
PICKLED = "pytorch_model.bin"
INDEX_SUFFIX = ".index.json"
MAX_SHARD_BYTES = 5 * 10**9
"""Size above which Transformers splits a file."""


def write_tensors(
    folder: Path, tensors: Mapping[str, np.ndarray], max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[str]:
    """Writes safetensors into `folder`, with an index where one file would grow too large.

    Returns:
        The names of the files written.
    """
    shards = _split(tensors, max_shard_bytes)
    if len(shards) == 1:
        _write_file(folder / SAFETENSORS, shards[0])
        return [SAFETENSORS]
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {
            tensor: name
            for name, shard in zip(names, shards, strict=True)
            for tensor in sorted(shard)
        },
    }
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / (SAFETENSORS + INDEX_SUFFIX)).write_text(text, encoding="utf-8")
    return [*names, SAFETENSORS + INDEX_SUFFIX]


def _split(tensors: Mapping[str, np.ndarray], max_shard_bytes: int) -> list[dict[str, np.ndarray]]:
    """Tensors in order, a new shard wherever the next one would not fit."""
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _write_file(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    # safetensors writes the memory of an array from its first byte on, whatever its strides.
    whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    safetensors.numpy.save_file(whole, path, metadata={"format": "pt"})
    # It also makes the file private to its writer, unlike every other file of the folder.
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of a Hugging Face folder by name: safetensors where there are any.

    Raises:
        UserError: no weights, a missing or damaged file, or torch is needed and absent.
    """
    tensors: dict[str, np.ndarray] = {}
    for path in weight_files(folder):
        read = _safetensors if path.suffix == ".safetensors" else _pickled
        for name, tensor in read(path):
            tensors[name] = tensor
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a Hugging Face folder.

    Raises:
        UserError: there are none, or the index names files that are not there.
    """
    for name in (SAFETENSORS, PICKLED):
        if (folder / name).is_file():
            return [folder / name]
        if (folder / (name + INDEX_SUFFIX)).is_file():
            return _indexed(folder / (name + INDEX_SUFFIX))
    raise UserError(
        f"{folder} holds no weights: expected {SAFETENSORS} or {PICKLED}, or one of them in "
        "shards with an index"
    )


def _indexed(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map: it is no index of shards")
    names = sorted(set(weight_map.values()))
    # An index from elsewhere must not make us read outside of its folder.
    outside = [name for name in names if Path(str(name)).name != name]
    if outside:
        raise UserError(f"{index} names {outside[0]!r}: shards must lie beside their index")
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise UserError(f"{index.parent} lacks {', '.join(absent)}, which {index.name} names")
    return [index.parent / name for name in names]


def _safetensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118  no mapping
                yield name, file.get_tensor(name)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error})") from error


def _pickled(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path} is a PyTorch file, and reading it needs torch: install torch, or save the "
            f"model as {SAFETENSORS} where torch is installed"
        ) from error
    try:
        # weights_only: the unpickler refuses everything but tensors, so nothing is executed.
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a damaged or refused file
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path} cannot be read as weights only ({reason})") from error
    if not isinstance(tensors, Mapping):
        raise UserError(f"{path} holds a {type(tensors).__name__}; expected names with tensors")
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f"{path}: {name} is a {type(tensor).__name__}, not a tensor")
        # numpy has no bfloat16 of torch's.
        yield name, tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: the file is missing, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}; expected an object")
    return values
