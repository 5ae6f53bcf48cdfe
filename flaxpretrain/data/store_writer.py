"""Writes the token store: shard after shard, each whole or absent, `dataset.json` last of all.

Nothing here depends on how the text was read: the borders of shards follow from the tokens alone.
"""

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from flaxpretrain.data.store import FORMAT, METADATA_FILE, OFFSET_TYPE, PARTS
from flaxpretrain.data.vocabulary import Vocabulary
from flaxpretrain.shapes import Bool, Int, Numpy, Shaped

COUNTS: tuple[str, ...] = ("documents", "sentences", "tokens", "bytes", "unknown")
"""What is counted of every shard and split; `bytes` are of UTF-8 text, `unknown` are tokens."""


def id_type(vocabulary_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype("<u2" if vocabulary_size <= 1 << 16 else "<u4")


def write_json(path: Path, values: Any) -> None:
    """Writes a JSON file aside, flushes it to the disk and renames it."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w", encoding="utf-8") as file:
        json.dump(values, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Makes renames and new files in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ShardWriter:
    """The files of the shard that is being filled; sizes grow, memory does not."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype) -> None:
        """Begins the files anew: what an interrupted build left of this shard is dropped."""
        self.name = name
        self.dtype = dtype
        self.counts = dict.fromkeys(COUNTS, 0)
        self._crc32 = dict.fromkeys(PARTS, 0)
        self._files: dict[str, BinaryIO] = {
            part: (folder / f"{name}.{part}").open("wb") for part in PARTS
        }
        # Bits of the last, unfinished byte of the word starts.
        self._bits = np.zeros(0, bool)
        zero = np.zeros(1, OFFSET_TYPE)
        self._write("sentences", zero)
        self._write("documents", zero)

    def append(
        self,
        ids: Shaped[Numpy, " T"],
        word_starts: Bool[Numpy, " T"],
        sentence_lengths: Int[Numpy, " S"],
        document_lengths: Int[Numpy, " D"],
        text_bytes: int,
        unknown: int,
    ) -> None:
        """Adds whole documents; lengths are in tokens."""
        tokens = self.counts["tokens"]
        self._write("ids", ids.astype(self.dtype))
        bits = np.concatenate([self._bits, word_starts])
        whole = len(bits) - len(bits) % 8
        self._write("words", np.packbits(bits[:whole], bitorder="little"))
        self._bits = bits[whole:]
        self._write("sentences", (tokens + np.cumsum(sentence_lengths)).astype(OFFSET_TYPE))
        self._write("documents", (tokens + np.cumsum(document_lengths)).astype(OFFSET_TYPE))
        added = (len(document_lengths), len(sentence_lengths), len(ids), text_bytes, unknown)
        for name, count in zip(COUNTS, added, strict=True):
            self.counts[name] += int(count)

    def close(self) -> dict[str, Any]:
        """Flushes the files to the disk and returns the shard's entry for `dataset.json`."""
        self._write("words", np.packbits(self._bits, bitorder="little"))
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        return {"name": self.name, **self.counts, "crc32": dict(self._crc32)}

    def abandon(self) -> None:
        """Closes the files of a shard that will not be finished."""
        for file in self._files.values():
            # Closing writes what is buffered: on a full disk it fails, for a shard given up.
            with contextlib.suppress(OSError):
                file.close()

    def _write(self, part: str, values: np.ndarray) -> None:
        data = values.tobytes()
        self._crc32[part] = zlib.crc32(data, self._crc32[part])
        self._files[part].write(data)


class SplitWriter:
    """Writes one split: closes a shard with the document that fills it, opens the next."""

    def __init__(
        self,
        folder: Path,
        split: str,
        dtype: np.dtype,
        shard_bytes: int,
        shards: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """`shards` are the entries of those that an interrupted build has finished."""
        self.split = split
        self.shards = [dict(entry) for entry in shards]
        self._folder = folder
        self._dtype = dtype
        self._shard_bytes = shard_bytes
        self._open: ShardWriter | None = None

    def append(
        self,
        ids: Shaped[Numpy, " T"],
        word_starts: Bool[Numpy, " T"],
        sentence_lengths: Int[Numpy, " S"],
        document_lengths: Int[Numpy, " D"],
        document_sentences: Int[Numpy, " D"],
        document_bytes: Int[Numpy, " D"],
        document_unknown: Int[Numpy, " D"],
    ) -> list[int]:
        """Adds whole documents.

        Returns:
          For every shard that this closed, how many of these documents are in finished shards.
        """
        token_ends = np.concatenate([[0], np.cumsum(document_lengths)])
        sentence_ends = np.concatenate([[0], np.cumsum(document_sentences)])
        closed, first = [], 0
        while first < len(document_lengths):
            if self._open is None:
                name = f"{self.split}-{len(self.shards):05d}"
                self._open = ShardWriter(self._folder, name, self._dtype)
            wanted = self._shard_bytes // self._dtype.itemsize - self._open.counts["tokens"]
            # The shard ends with the first document that brings it to the wanted size.
            full = int(np.searchsorted(token_ends, token_ends[first] + wanted))
            full = max(full, first + 1)
            last = min(full, len(document_lengths))
            tokens = slice(token_ends[first], token_ends[last])
            self._open.append(
                ids[tokens],
                word_starts[tokens],
                sentence_lengths[sentence_ends[first] : sentence_ends[last]],
                document_lengths[first:last],
                int(document_bytes[first:last].sum()),
                int(document_unknown[first:last].sum()),
            )
            if full <= len(document_lengths):
                self.close()
                closed.append(last)
            first = last
        return closed

    def close(self) -> None:
        """Finishes the shard that is open, if one is."""
        if self._open is not None:
            self.shards.append(self._open.close())
            self._open = None

    def abandon(self) -> None:
        """Lets go of the files of an unfinished shard."""
        if self._open is not None:
            self._open.abandon()
            self._open = None

    def entry(self) -> dict[str, Any]:
        """The split's object in `dataset.json`: totals over its finished shards, and these."""
        totals = {name: sum(shard[name] for shard in self.shards) for name in COUNTS}
        return {**totals, "shards": self.shards}


def write_metadata(
    folder: Path,
    *,
    fingerprint: str,
    vocabulary: Vocabulary,
    splits: Mapping[str, Mapping[str, Any]],
    sources: Sequence[Mapping[str, Any]] = (),
    licence: str | None = None,
    attribution: str | None = None,
    language: str | None = None,
    build: Mapping[str, Any] | None = None,
) -> None:
    """Writes `dataset.json`, the last file of a dataset: with it the dataset is whole."""
    values = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "vocabulary": vocabulary.to_json(),
        "dtype": id_type(vocabulary.size).name,
        "splits": dict(splits),
        "sources": list(sources),
        "licence": licence,
        "attribution": attribution,
        "language": language,
        "build": dict(build or {}),
    }
    write_json(folder / METADATA_FILE, values)


def write_dataset(
    folder: Path,
    vocabulary: Vocabulary,
    splits: Mapping[str, Iterable[Sequence[Sequence[int]]]],
    word_starts: Bool[Numpy, " V"] | None = None,
    shard_bytes: int = 1 << 26,
    fingerprint: str = "",
) -> None:
    """Writes a dataset from ids that are already there: documents of sentences of ids.

    `word_starts` says of each id of the vocabulary whether it opens a word (None: each does).
    A dataset that lies in the folder is replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    opens = np.ones(vocabulary.size, bool) if word_starts is None else word_starts
    entries = {}
    for name, documents in splits.items():
        writer = SplitWriter(folder, name, id_type(vocabulary.size), shard_bytes)
        for sentences in documents:
            lengths = np.array([len(sentence) for sentence in sentences], np.int64)
            ids = np.array([i for sentence in sentences for i in sentence], np.int64)
            starts = opens[ids]
            starts[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
            one = np.array([1])
            unknown = one * (0 if vocabulary.unk is None else int((ids == vocabulary.unk).sum()))
            writer.append(
                ids, starts, lengths, one * len(ids), one * len(lengths), one * 0, unknown
            )
        writer.close()
        entries[name] = writer.entry()
    write_metadata(folder, fingerprint=fingerprint, vocabulary=vocabulary, splits=entries)


def remove_folder(folder: Path) -> None:
    """Removes a folder of ours with all it holds, if it is there."""
    if folder.exists():
        shutil.rmtree(folder)
