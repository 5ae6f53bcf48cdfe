"""Builds a dataset from documents: encodes, splits, writes shards, goes on after an interruption.

All work happens in `<output>.partial/`. Finished shards are noted in its `state.json`; the folder
`dataset` in it becomes `<output>` by one rename, when all is written. A build that goes on reads
the text again, which is cheap beside encoding it, and checks that it is the same text.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flaxpretrain.data.encoding import TRAIN, VALIDATION, EncodedChunk, Encoder, chunks
from flaxpretrain.data.encoding import encode_chunks as encode_all
from flaxpretrain.data.sources import Losses, Source
from flaxpretrain.data.store import (
    FORMAT,
    METADATA_FILE,
    TOKENIZER_FOLDER,
    Dataset,
    open_dataset,
    part_bytes,
    partial_folder,
)
from flaxpretrain.data.store_writer import (
    SplitWriter,
    flush_folder,
    id_type,
    remove_folder,
    write_json,
    write_metadata,
)
from flaxpretrain.data.tokenizers import Tokenizer
from flaxpretrain.data.word_starts import SEGMENTERS
from flaxpretrain.errors import UserError

STATE_FILE = "state.json"
_SPLIT_NAME = re.compile(r"[A-Za-z0-9_]+")
COMPATIBLE = ("electra",)
"""Programs whose rows can be made from a dataset."""


@dataclasses.dataclass(frozen=True)
class BuildSettings:
    """What determines a dataset, beside the text and the tokenizer."""

    validation_share: float = 0.01
    """Part of the documents that is held out, by a hash of their content."""
    seed: int = 0
    limit: int | None = None
    """Documents to take; None takes all."""
    shard_bytes: int = 1 << 26
    """A shard ends with the document that brings its ids to so many bytes."""
    compat: str | None = None
    """Whose rows the dataset is meant for: "electra", google-research/electra's, or nobody's.

    The store is the same; `segments.recorded_layout` reads it.
    """
    words: str | None = None
    """What finds words in scripts without spaces, for whole word masks: "jieba", or nothing."""
    skip_broken: bool = False
    """Goes on after lines, records and files that cannot be read, and counts them."""
    held_out: tuple[str, ...] = ()
    """Names of splits that hold one source each, all of it: the last sources, in this order."""
    shard: str | None = None
    """Which part of the text this is, "0/8" to "7/8", of a dataset that `merging` puts together."""

    def __post_init__(self) -> None:
        if not 0 <= self.validation_share < 1:
            raise UserError(f"the validation share is in [0, 1); got {self.validation_share}")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"the limit is a number of documents, 1 or more; got {self.limit}")
        if self.shard_bytes < 1:
            raise UserError(f"shard_bytes is 1 or more; got {self.shard_bytes}")
        if self.compat not in (None, *COMPATIBLE):
            raise UserError(f"compat is {' or '.join(COMPATIBLE)}, or None; got {self.compat!r}")
        if self.words not in (None, *SEGMENTERS):
            raise UserError(f"words is {' or '.join(SEGMENTERS)}, or None; got {self.words!r}")
        for name in self.held_out:
            if name == TRAIN or not _SPLIT_NAME.fullmatch(name) or self.held_out.count(name) > 1:
                raise UserError(
                    f"--held-out {name}: expected another name than {TRAIN}, used once, of "
                    "letters, digits and _"
                )
        if self.shard is not None and self.limit is not None:
            raise UserError("--limit counts documents of the whole text: with --shard use --sample")


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What a dataset says of its origin; the model card repeats it."""

    licence: str | None = None
    """An SPDX identifier, say CC-BY-SA-3.0."""
    attribution: str | None = None
    language: str | None = None
    """An ISO 639-1 code, say en."""


def build(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    output: Path | str,
    settings: BuildSettings = BuildSettings(),
    provenance: Provenance = Provenance(),
    *,
    num_processes: int = 1,
    overwrite: bool = False,
    notify: Callable[[str], None] = lambda message: None,
    progress: Callable[[int], None] = lambda count: None,
) -> Dataset:
    """Builds the dataset `output`, or opens it if these settings and this text have built it.

    The files are the same, byte for byte, for any number of processes and any layout of the text
    in files. `progress` is told of bytes read, as `Source.size` counts them; `notify` gets a line
    when a build goes on, starts anew, or has nothing to do.

    Raises:
      UserError: another dataset is there and `overwrite` is false, no text, a full disk, a folder
        that cannot be written, text that changed since the build was interrupted.
    """
    if num_processes < 1:
        raise UserError(f"--num-processes is 1 or more; got {num_processes}")
    output = Path(os.path.abspath(output))
    builder = _Builder(sources, tokenizer, output, settings, provenance, notify)
    builder.refuse_what_is_no_dataset()
    if not overwrite and builder.is_built(notify):
        return open_dataset(output)
    with _disk_errors(output), builder.locked():
        builder.resume_or_start(notify)
        try:
            builder.encode(num_processes, progress)
            builder.finish()
        finally:
            builder.abandon()
    return open_dataset(output)


class _Text:
    """Counts and digests of the text read so far, over all sources and of each."""

    def __init__(
        self,
        sources: Sequence[Source],
        skip_broken: bool = False,
        notify: Callable[[str], None] = lambda message: None,
    ) -> None:
        self._names = [source.name for source in sources]
        self.losses = [Losses(skip_broken, notify) for _ in sources]
        self._counts = [{"documents": 0, "bytes": 0} for _ in sources]
        self._digests = [hashlib.sha256() for _ in sources]
        self._all = hashlib.sha256()

    def add(self, chunk: EncodedChunk) -> None:
        self._counts[chunk.source]["documents"] += len(chunk.digests)
        self._counts[chunk.source]["bytes"] += chunk.text_bytes
        self._digests[chunk.source].update(chunk.digests.tobytes())
        self._all.update(chunk.digests.tobytes())

    def digest_with(self, chunk: EncodedChunk, documents: int) -> str:
        """Digest of all documents before the chunk and its first `documents` ones."""
        digest = self._all.copy()
        digest.update(chunk.digests[:documents].tobytes())
        return digest.hexdigest()

    def entries(self) -> list[dict[str, Any]]:
        """The objects of `sources` in `dataset.json`; `lost` is there where something was."""
        each = zip(self._names, self._counts, self._digests, self.losses, strict=True)
        return [
            {"name": name, **counts, "sha256": digest.hexdigest()}
            | ({"lost": losses.counts()} if losses.counts() else {})
            for name, counts, digest, losses in each
        ]


class _Builder:
    """One build, from its partial folder to its dataset."""

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: Tokenizer,
        output: Path,
        settings: BuildSettings,
        provenance: Provenance,
        notify: Callable[[str], None],
    ) -> None:
        self.sources = sources
        self.tokenizer = tokenizer
        self.output = output
        self.settings = settings
        self.provenance = provenance
        self.partial = partial_folder(output)
        self.folder = self.partial / "dataset"
        self.dtype = id_type(tokenizer.vocabulary.size)
        self.text = _Text(sources, settings.skip_broken, notify)
        self.done: dict[str, int] = {}
        self.marks: dict[str, dict[str, Any]] = {}
        self.writers: dict[str, SplitWriter] = {}
        self.splits = tuple(dict.fromkeys((TRAIN, VALIDATION, *settings.held_out)))
        # The state is compared as JSON gives it back.
        build = json.loads(json.dumps(dataclasses.asdict(settings)))
        self.identity: dict[str, Any] = {
            "format": FORMAT,
            "fingerprint": tokenizer.fingerprint,
            "build": build,
        }

    def refuse_what_is_no_dataset(self) -> None:
        """Only a dataset may ever be replaced, whatever the flags say."""
        output = self.output
        if output.is_dir() and (not any(output.iterdir()) or (output / METADATA_FILE).is_file()):
            return
        if output.exists():
            raise UserError(f"{output} is there and is no dataset: give another --output-dir")

    def is_built(self, notify: Callable[[str], None]) -> bool:
        """Whether `output` is this very dataset; an error if it is another one."""
        if not (self.output / METADATA_FILE).is_file():
            return False
        metadata = open_dataset(self.output).metadata
        wanted = {
            **self.identity,
            **dataclasses.asdict(self.provenance),
            "source names": [source.name for source in self.sources],
        }
        there = {
            **{key: metadata[key] for key in wanted if key in metadata},
            "source names": [entry["name"] for entry in metadata["sources"]],
        }
        different = _differences(there, wanted)
        if not different and metadata["sources"] != self._read_text():
            different = ["the text is another"]
        if different:
            raise UserError(
                f"{self.output} holds a dataset built differently ({'; '.join(different)}): pass "
                "--overwrite to replace it, or give another --output-dir"
            )
        notify(f"{self.output} is built already, from the same text with the same settings")
        return True

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the partial folder against a second builder; the lock dies with its process."""
        self.partial.mkdir(parents=True, exist_ok=True)
        with (self.partial / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another build is writing {self.output}: wait for it or end it"
                ) from None
            yield

    def resume_or_start(self, notify: Callable[[str], None]) -> None:
        """Takes up the finished shards of an interrupted build of the same kind."""
        state_file = self.partial / STATE_FILE
        if state_file.exists():
            state = _read_state(state_file)
            different = _differences(state["identity"], self.identity)
            different += self._damaged(state["splits"])
            if different:
                notify(f"starting anew: the interrupted build differs ({'; '.join(different)})")
            else:
                self.marks = state["splits"]
        if not self.marks:
            remove_folder(self.folder)
        self.folder.mkdir(exist_ok=True)
        self.done = {split: mark["documents"] for split, mark in self.marks.items()}
        for split in self.splits:
            shards = self.marks.get(split, {}).get("shards", ())
            self.writers[split] = SplitWriter(
                self.folder, split, self.dtype, self.settings.shard_bytes, shards
            )
        if self.marks:
            count = sum(len(mark["shards"]) for mark in self.marks.values())
            notify(f"going on with an interrupted build: {count} shards are finished")

    def encode(self, num_processes: int, progress: Callable[[int], None]) -> None:
        """Reads all text, encodes what is not done and writes it."""
        settings, held = self.settings, len(self.settings.held_out)
        encoder = Encoder(
            self.tokenizer,
            self.dtype,
            settings.validation_share,
            settings.seed,
            self.done,
            settings.words,
            dict(enumerate(settings.held_out, len(self.sources) - held)),
        )
        unchecked = dict(self.marks)
        read = chunks(self.sources, settings.limit, self.text.losses, held)
        for chunk in encode_all(encoder, read, num_processes):
            self._check(chunk, unchecked)
            for split, encoded in chunk.splits.items():
                arrays = {
                    field.name: getattr(encoded, field.name)
                    for field in dataclasses.fields(encoded)
                }
                numbers = arrays.pop("numbers")
                for count in self.writers[split].append(**arrays):
                    self._mark(split, chunk, int(numbers[count - 1]) + 1)
            self.text.add(chunk)
            progress(chunk.bytes_read)
        if unchecked:
            raise self._changed()

    def finish(self) -> None:
        """Closes the last shards, writes what describes the dataset, and gives it its name."""
        for writer in self.writers.values():
            writer.close()
        entries = {split: writer.entry() for split, writer in self.writers.items()}
        part = self.settings.shard is not None
        if not entries[TRAIN]["tokens"] and not part:
            held_out = entries[VALIDATION]["documents"]
            raise UserError(
                "there is no text to train on: "
                + (
                    f"all {held_out} documents fell to validation; lower --validation-share"
                    if held_out
                    else "the sources hold no document with a token"
                )
            )
        for name, entry in list(entries.items()):
            if not entry["tokens"]:
                if name in self.settings.held_out and not part:
                    raise UserError(f"--held-out {name}: its source holds no document with a token")
                del entries[name]
        self.tokenizer.save(self.folder / TOKENIZER_FOLDER)
        write_metadata(
            self.folder,
            fingerprint=self.tokenizer.fingerprint,
            vocabulary=self.tokenizer.vocabulary,
            splits=entries,
            sources=self.text.entries(),
            build=dataclasses.asdict(self.settings),
            **dataclasses.asdict(self.provenance),
        )
        if self.output.exists():
            replaced = self.partial / "replaced"
            remove_folder(replaced)
            os.rename(self.output, replaced)
        os.rename(self.folder, self.output)
        flush_folder(self.output.parent)
        remove_folder(self.partial)

    def abandon(self) -> None:
        """Lets go of shards that an error left open; without one there are none."""
        for writer in self.writers.values():
            writer.abandon()

    def _mark(self, split: str, chunk: EncodedChunk, documents: int) -> None:
        """Notes that the finished shards hold this split's part of the first `documents` ones."""
        self.marks[split] = {
            "documents": documents,
            "digest": self.text.digest_with(chunk, documents - chunk.first),
            "shards": list(self.writers[split].shards),
        }
        flush_folder(self.folder)
        state = {"identity": self.identity, "splits": self.marks}
        write_json(self.partial / STATE_FILE, state)

    def _check(self, chunk: EncodedChunk, unchecked: dict[str, dict[str, Any]]) -> None:
        """Compares the text with that of the interrupted build, where a mark was set."""
        for split, mark in list(unchecked.items()):
            if mark["documents"] <= chunk.first + len(chunk.digests):
                digest = self.text.digest_with(chunk, mark["documents"] - chunk.first)
                if digest != mark["digest"]:
                    raise self._changed()
                del unchecked[split]

    def _changed(self) -> UserError:
        return UserError(
            f"the text is not that of the interrupted build in {self.partial}: "
            "remove that folder to start anew"
        )

    def _damaged(self, splits: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Finished shards of the interrupted build that are no longer whole."""
        damaged = []
        for mark in splits.values():
            for entry in mark["shards"]:
                for part, size in part_bytes(entry, self.dtype).items():
                    path = self.folder / f"{entry['name']}.{part}"
                    if not path.is_file() or path.stat().st_size != size:
                        damaged.append(f"{path.name} is damaged")
        return damaged

    def _read_text(self) -> list[dict[str, Any]]:
        """Reads all text without encoding it, for its digest."""
        text = _Text(self.sources, self.settings.skip_broken)
        nothing = {split: np.iinfo(np.int64).max for split in self.splits}
        encoder = Encoder(self.tokenizer, self.dtype, 0.0, 0, nothing)
        held = len(self.settings.held_out)
        read = chunks(self.sources, self.settings.limit, text.losses, held)
        for chunk in encode_all(encoder, read, 1):
            text.add(chunk)
        return text.entries()


def _read_state(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        # Written by a rename, so damaged later: the build starts anew, and says so.
        return {"identity": {STATE_FILE: "damaged"}, "splits": {}}


def _differences(there: Mapping[str, Any], wanted: Mapping[str, Any], name: str = "") -> list[str]:
    """Every value that differs, as "name: there, not wanted"."""
    found = []
    for key in sorted({*there, *wanted}):
        old, new = there.get(key), wanted.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += _differences(old, new, f"{name}{key}.")
        elif old != new and key == "fingerprint":
            found.append("the tokenizer is another")
        elif old != new:
            found.append(f"{name}{key}: {old!r} there, {new!r} wanted")
    return found


@contextlib.contextmanager
def _disk_errors(output: Path) -> Iterator[None]:
    """A full disk or a folder without permission is a user's matter: one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no space is left on the disk of {output}: free some and run the command again, "
                "it goes on after the last finished shard"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT):
            raise UserError(f"cannot write {output}: {error.strerror}") from error
        raise
