"""The token store on disk, as read: one flat stream of ids in shards, of which rows are views.

A dataset is a folder:

| file                  | holds                                                                  |
| --------------------- | ---------------------------------------------------------------------- |
| dataset.json          | format, vocabulary, tokenizer fingerprint, splits and shards, sources  |
| tokenizer/            | tokenizer.json and tokenizer_config.json                               |
| train-00000.ids       | token ids without special tokens, little-endian uint16 or uint32       |
| train-00000.words     | one bit a token, low bit first: this token opens a word                |
| train-00000.sentences | int64, where sentences begin in this shard, in tokens, and the end     |
| train-00000.documents | int64, where documents begin in this shard, in tokens, and the end     |

Shards end at document ends, when enough bytes of ids are in them. `store_writer` writes them.
"""

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flaxpretrain.data.files import Files, FlatArray, files_of
from flaxpretrain.data.offsets import Offsets, ShardedOffsets
from flaxpretrain.data.vocabulary import Vocabulary
from flaxpretrain.errors import UserError
from flaxpretrain.locations import Location, is_remote
from flaxpretrain.shapes import Bool, Int, Numpy

FORMAT = 1
METADATA_FILE = "dataset.json"
TOKENIZER_FOLDER = "tokenizer"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
OFFSET_TYPE = np.dtype("<i8")
PARTS: tuple[str, ...] = ("ids", "words", "sentences", "documents")
"""Suffixes of the files that make a shard."""


def partial_folder(folder: Path) -> Path:
    """Where an unfinished build of `folder` lies: beside it, so that a rename finishes it."""
    return folder.with_name(folder.name + ".partial")


def part_bytes(entry: Mapping[str, Any], dtype: np.dtype) -> dict[str, int]:
    """Size of each file of a shard, from its entry in `dataset.json`."""
    return {
        "ids": entry["tokens"] * dtype.itemsize,
        "words": -(-entry["tokens"] // 8),
        "sentences": (entry["sentences"] + 1) * OFFSET_TYPE.itemsize,
        "documents": (entry["documents"] + 1) * OFFSET_TYPE.itemsize,
    }


class Shard:
    """The arrays of one shard, opened when they are asked for, and where it stands in the split."""

    def __init__(self, start: int, tokens: int, opened: Callable[[str], Any]) -> None:
        """`opened` gives the array of one of `PARTS`."""
        self.start, self.tokens = start, tokens
        self._opened = opened

    @functools.cached_property
    def ids(self) -> FlatArray:
        """Token ids."""
        return self._opened("ids")

    @functools.cached_property
    def words(self) -> FlatArray:
        """A bit a token, low bit first: it opens a word."""
        return self._opened("words")

    @functools.cached_property
    def sentences(self) -> Int[Numpy, " S"]:
        """Where sentences begin in this shard, and the end."""
        return self._opened("sentences")

    @functools.cached_property
    def documents(self) -> Int[Numpy, " D"]:
        """Where documents begin in this shard, and the end."""
        return self._opened("documents")

    def __len__(self) -> int:
        return self.tokens

    @property
    def stop(self) -> int:
        """Where the token after the last one stands in the split."""
        return self.start + self.tokens


class Split:
    """One split of a dataset: a stream of token ids with the borders of sentences and documents.

    Offsets and positions count tokens from the split's first one, over all shards.
    """

    def __init__(self, files: Files, name: str, entry: Mapping[str, Any], dtype: np.dtype) -> None:
        """`entry` is this split's object in `dataset.json`; sizes were checked by the caller."""
        self.name = name
        self.documents: int = entry["documents"]
        self.sentences: int = entry["sentences"]
        self.tokens: int = entry["tokens"]
        self.bytes: int = entry["bytes"]
        self.remote = is_remote(files.location)
        self.shards = tuple(_shards(files, entry["shards"], dtype))

    @functools.cached_property
    def document_offsets(self) -> Offsets:
        """Where each document begins, and the end of the last; int64."""
        return self._offsets("documents")

    @functools.cached_property
    def sentence_offsets(self) -> Offsets:
        """Where each sentence begins, and the end of the last; a document begins a sentence."""
        return self._offsets("sentences")

    def gather(
        self, starts: Int[Numpy, " B"], lengths: Int[Numpy, " B"], width: int
    ) -> tuple[Int[Numpy, "B {width}"], Bool[Numpy, "B {width}"]]:
        """Ids (int32) and word starts of B views of the stream, zero beyond each length.

        A view may span shards; the ids of a row come by one copy, not token by token.

        Raises:
          IndexError: a view leaves the stream, or is longer than `width`.
        """
        starts = np.asarray(starts, np.int64)
        lengths = np.asarray(lengths, np.int64)
        if len(starts) == 0:
            return np.zeros((0, width), np.int32), np.zeros((0, width), bool)
        if starts.min() < 0 or (starts + lengths).max() > self.tokens:
            raise IndexError(f"a view leaves split {self.name!r} of {self.tokens} tokens")
        if lengths.min() < 0 or lengths.max() > width:
            raise IndexError(f"a view is longer than the width of {width}, or negative")

        ids = np.zeros((len(starts), width), np.int32)
        word_starts = np.zeros((len(starts), width), bool)
        inside = np.arange(width) < lengths[:, None]
        positions = (starts[:, None] + np.arange(width))[inside]
        shard_starts = np.array([shard.start for shard in self.shards], np.int64)
        shard_of_token = np.searchsorted(shard_starts, positions, side="right") - 1
        found, opens = np.empty(len(positions), np.int32), np.empty(len(positions), bool)
        for number in np.unique(shard_of_token):
            shard, here = self.shards[number], shard_of_token == number
            local = positions[here] - shard.start
            found[here] = shard.ids[local]
            opens[here] = (shard.words[local >> 3] >> (local & 7)) & 1
        ids[inside], word_starts[inside] = found, opens
        return ids, word_starts

    def _offsets(self, part: str) -> Offsets:
        local = [getattr(shard, part) for shard in self.shards] or [np.zeros(1, np.int64)]
        if len(local) == 1:
            return local[0]
        return ShardedOffsets(local, [shard.start for shard in self.shards])


class Dataset:
    """A dataset on disk: its vocabulary, what it was made from, and its splits."""

    def __init__(self, files: Files, metadata: Mapping[str, Any]) -> None:
        """Opened by `open_dataset`, which checks `metadata` (the content of `dataset.json`)."""
        self.files = files
        self.metadata = dict(metadata)
        self.fingerprint: str = metadata["fingerprint"]
        self.vocabulary = Vocabulary.from_json(metadata["vocabulary"])
        self.dtype = np.dtype(metadata["dtype"]).newbyteorder("<")
        self.splits: Mapping[str, Split] = {
            name: Split(files, name, entry, self.dtype)
            for name, entry in metadata["splits"].items()
        }

    @property
    def folder(self) -> Location:
        """Where it lies."""
        return self.files.location

    @property
    def tokenizer_folder(self) -> Path:
        """The folder that `tokenizers.load` and Transformers' AutoTokenizer read; a copy of it,
        where the dataset lies elsewhere."""
        return self.files.folder(TOKENIZER_FOLDER, TOKENIZER_FILES)

    def split(self, name: str) -> Split:
        """The split of this name.

        Raises:
          UserError: there is none; the message lists those there are.
        """
        if name not in self.splits:
            raise UserError(
                f"dataset {self.folder} has no split {name!r}; it has {', '.join(self.splits)}"
            )
        return self.splits[name]

    def verify(self) -> None:
        """Reads every shard and compares its CRC-32 with the one written by the builder.

        Raises:
          UserError: a file differs; the message names the first one that does.
        """
        for split in self.metadata["splits"].values():
            for entry in split["shards"]:
                for part, size in part_bytes(entry, self.dtype).items():
                    name = f"{entry['name']}.{part}"
                    if self.files.crc32(name, size) != entry["crc32"][part]:
                        raise UserError(
                            f"{self.files.path(name)} is damaged: its CRC-32 is not the one in "
                            f"{METADATA_FILE}; build the dataset anew or copy it again"
                        )


def open_dataset(location: Location) -> Dataset:
    """Opens a dataset in a folder or at a URL; checks that every shard has the right size.

    Raises:
      UserError: no dataset, an unfinished one, another format, a missing or cut shard, or a store
        that refuses.
    """
    files = files_of(location)
    content = files.text(METADATA_FILE)
    if content is None:
        raise _no_dataset(files.location)
    path = files.path(METADATA_FILE)
    try:
        metadata = json.loads(content)
        if metadata["format"] != FORMAT:
            raise UserError(
                f"{path} has format {metadata['format']!r}; this version reads format {FORMAT}: "
                "build the dataset anew"
            )
        _check_sizes(files, metadata)
        return Dataset(files, metadata)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error})") from error


def _no_dataset(location: Location) -> UserError:
    what = f"it holds no {METADATA_FILE}"
    if not is_remote(location):
        folder = Path(location)
        partial = partial_folder(folder)
        if partial.is_dir():
            return UserError(
                f"the dataset {folder} is unfinished ({partial} is there): "
                "run the command that builds it again, it goes on where it stopped"
            )
        what = what if folder.is_dir() else "there is no such folder"
    return UserError(
        f"{location} is no dataset: {what}; build one with tools/build_pretraining_dataset.py, "
        "or name it by --data-dir"
    )


def _check_sizes(files: Files, metadata: Mapping[str, Any]) -> None:
    dtype = np.dtype(metadata["dtype"])
    wanted = {
        f"{entry['name']}.{part}": size
        for split in metadata["splits"].values()
        for entry in split["shards"]
        for part, size in part_bytes(entry, dtype).items()
    }
    found = files.sizes(wanted)
    for name, expected in wanted.items():
        path = files.path(name)
        if found[name] is None:
            raise UserError(f"{path} is missing; {METADATA_FILE} names this shard")
        if found[name] != expected:
            raise UserError(
                f"{path} is damaged: it has {found[name]} bytes instead of "
                f"{expected}; build the dataset anew or copy it again"
            )


def _shards(files: Files, entries: list[Mapping[str, Any]], dtype: np.dtype) -> Iterator[Shard]:
    types = {"ids": dtype, "words": np.dtype(np.uint8)}
    start = 0
    for entry in entries:
        sizes = part_bytes(entry, dtype)

        def opened(part: str, name: str = entry["name"], sizes: dict = sizes) -> Any:
            file = f"{name}.{part}"
            if part in types:
                return files.array(file, types[part], sizes[part])
            return files.small_array(file, OFFSET_TYPE, sizes[part])

        yield Shard(start, entry["tokens"], opened)
        start += entry["tokens"]
