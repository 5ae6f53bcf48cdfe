"""Puts together a dataset that several builds made, each of one part of the text.

The parts lie in `<output>.parts/`, each a dataset of its own. Their files are linked where the disk
allows it, else copied: merging costs no time worth mentioning and no room.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flaxpretrain.data.store import (
    METADATA_FILE,
    PARTS,
    TOKENIZER_FOLDER,
    Dataset,
    open_dataset,
    partial_folder,
)
from flaxpretrain.data.store_writer import COUNTS, flush_folder, remove_folder, write_metadata
from flaxpretrain.errors import UserError

_PROVENANCE = ("licence", "attribution", "language")


def parts_folder(output: Path) -> Path:
    """Where the parts of a dataset lie: beside it."""
    return output.with_name(f"{output.name}.parts")


def part_folder(output: Path, index: int, count: int) -> Path:
    """Where part `index` of `count` of a dataset is built."""
    return parts_folder(output) / f"{index:05d}-of-{count:05d}"


def part_of(text: str) -> tuple[int, int]:
    """Index and count of a part spelled "0/8".

    Raises:
      UserError: no such part.
    """
    index, slash, count = text.partition("/")
    if slash and index.isdecimal() and count.isdecimal() and int(index) < int(count):
        return int(index), int(count)
    raise UserError(f"--shard {text}: expected I/N with I from 0 to N - 1, such as 0/8")


def merge(output: Path | str, count: int, *, overwrite: bool = False) -> Dataset:
    """The dataset `output` of `count` parts, which stay where they are.

    Its documents are those of the parts in turn.

    Raises:
      UserError: a part is missing or built differently, or `output` is there already.
    """
    output = Path(os.path.abspath(output))
    if count < 1:
        raise UserError(f"--merge: a number of parts is 1 or more; got {count}")
    _check_output(output, overwrite)
    parts = _open_parts(output, count)
    partial = partial_folder(output)
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another program is writing {output}: wait for it") from None
        folder = partial / "dataset"
        remove_folder(folder)
        folder.mkdir()
        names = dict.fromkeys(name for part in parts for name in part.metadata["splits"])
        splits = {name: _linked(parts, name, folder) for name in names}
        if "train" not in splits:
            raise UserError(f"{parts_folder(output)} holds no text to train on")
        shutil.copytree(parts[0].tokenizer_folder, folder / TOKENIZER_FOLDER)
        first = parts[0].metadata
        write_metadata(
            folder,
            fingerprint=parts[0].fingerprint,
            vocabulary=parts[0].vocabulary,
            splits=splits,
            sources=_sources([part.metadata["sources"] for part in parts]),
            build=first["build"] | {"shard": None, "parts": count},
            **{name: first[name] for name in _PROVENANCE},
        )
        if output.exists():
            os.rename(output, partial / "replaced")
        os.rename(folder, output)
        flush_folder(output.parent)
    remove_folder(partial)
    return open_dataset(output)


def _check_output(output: Path, overwrite: bool) -> None:
    if not output.exists():
        return
    if not (output / METADATA_FILE).is_file():
        raise UserError(f"{output} is there and is no dataset: give another --output-dir")
    if not overwrite:
        raise UserError(f"{output} is there already: pass --overwrite, or another --output-dir")


def _open_parts(output: Path, count: int) -> list[Dataset]:
    """The parts, all built alike."""
    parts: list[Dataset] = []
    for index in range(count):
        folder = part_folder(output, index, count)
        if not (folder / METADATA_FILE).is_file():
            raise UserError(
                f"{folder} is no finished part: run the command with --shard {index}/{count}"
            )
        part = open_dataset(folder)
        alike = _alike(part)
        if parts and alike != _alike(parts[0]):
            different = [name for name, value in alike.items() if value != _alike(parts[0])[name]]
            raise UserError(
                f"{folder} was built differently from the part before it ({', '.join(different)}): "
                "build it anew with --overwrite"
            )
        parts.append(part)
    return parts


def _alike(part: Dataset) -> dict[str, Any]:
    """What the parts of a dataset have in common."""
    return {
        "tokenizer": part.fingerprint,
        "sources": [source["name"] for source in part.metadata["sources"]],
        **{name: part.metadata[name] for name in _PROVENANCE},
        **{name: value for name, value in part.metadata["build"].items() if name != "shard"},
    }


def _linked(parts: Sequence[Dataset], split: str, folder: Path) -> dict[str, Any]:
    """Links the files of a split into a folder; its object in `dataset.json`."""
    shards = []
    for part in parts:
        for entry in part.metadata["splits"].get(split, {"shards": ()})["shards"]:
            name = f"{split}-{len(shards):05d}"
            for kind in PARTS:
                _link(Path(part.folder) / f"{entry['name']}.{kind}", folder / f"{name}.{kind}")
            shards.append({**entry, "name": name})
    totals = {name: sum(shard[name] for shard in shards) for name in COUNTS}
    return {**totals, "shards": shards}


def _link(old: Path, new: Path) -> None:
    try:
        os.link(old, new)
    except OSError:
        # Another disk, or one that knows no links.
        shutil.copyfile(old, new)


def _sources(parts: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The sources of all parts, their counts added."""
    merged = []
    for entries in zip(*parts, strict=True):
        digests = "".join(entry["sha256"] for entry in entries)
        lost: dict[str, int] = {}
        for entry in entries:
            for reason, count in entry.get("lost", {}).items():
                lost[reason] = lost.get(reason, 0) + count
        merged.append(
            {
                "name": entries[0]["name"],
                "documents": sum(entry["documents"] for entry in entries),
                "bytes": sum(entry["bytes"] for entry in entries),
                "sha256": hashlib.sha256(digests.encode()).hexdigest(),
            }
            | ({"lost": lost} if lost else {})
        )
    return merged


__all__ = ["merge", "part_folder", "part_of", "parts_folder"]
