"""Where documents come from: files of text or of records, as one sequence of documents.

The sequence of documents is all that counts: how they are spread over files leaves no trace in a
dataset. Texts are taken as they are, but for line ends; normalising is the tokenizer's task.
Libraries of data sets are read in `library_sources`.
"""

import abc
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from flaxpretrain.data import document
from flaxpretrain.data.document import Document, Losses, blank
from flaxpretrain.data.lines import read_lines
from flaxpretrain.data.randomness import fold
from flaxpretrain.data.records import TEXT, Columns, reader_of
from flaxpretrain.data.remote_text import TextPath, remote_paths
from flaxpretrain.errors import UserError
from flaxpretrain.locations import Location, is_remote

FORMATS = ("sentences", "lines", "files")

Progress = Callable[[int], None]
"""Is told of every so many bytes that were read."""


class Source(abc.ABC):
    """A sequence of documents, the same every time it is read."""

    name: str

    @abc.abstractmethod
    def documents(
        self, progress: Progress | None = None, losses: Losses | None = None
    ) -> Iterator[Document]:
        """Reads all documents; `losses` says what becomes of broken ones, None that they stop it.

        Raises:
          UserError: a file cannot be read, or something in it is broken.
        """

    @abc.abstractmethod
    def size(self) -> int | None:
        """Bytes that `progress` will have been told of at the end; None where nobody knows."""

    def shard(self, index: int, count: int) -> "Source":
        """Part `index` of `count`: together they give every document once."""
        return self if count == 1 else Strided(self, index, count)


@dataclasses.dataclass(frozen=True)
class TextFiles(Source):
    """Files, read one after the other.

    Those ending in .jsonl, .ndjson, .json, .csv, .tsv and .parquet hold records, a document each,
    of which `columns` says what is read. All others hold text, of which `format` says what a
    document is: "sentences": lines up to a blank line or the file's end; "lines": each line;
    "files": each file, blank lines ignored. All but Parquet may be compressed: .gz, .xz, .zst.
    """

    name: str
    paths: tuple[TextPath, ...]
    format: str = "sentences"
    errors: str = "strict"
    """What bytes that are not UTF-8 do: "strict" stops with an error, "replace" puts U+FFFD."""
    columns: Columns = TEXT

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UserError(f"a text format is one of {', '.join(FORMATS)}; got {self.format!r}")
        check_errors(self.errors)

    def size(self) -> int:
        """Bytes of the files, compressed ones where a file is compressed."""
        return sum(path.stat().st_size for path in self.paths)

    def documents(
        self, progress: Progress | None = None, losses: Losses | None = None
    ) -> Iterator[Document]:
        """Reads all documents of all files, in the order of `paths`."""
        losses = losses or Losses()
        for path in self.paths:
            reader = reader_of(path)
            if reader is not None:
                yield from reader(path, self.columns, self.errors, losses, progress)
                continue
            if self.columns.target is not None:
                raise UserError(
                    f"{path} holds plain text, where --target-column asks for pairs: give them as "
                    ".jsonl, .csv, .tsv or .parquet"
                )
            lines = (texts for _, texts in read_lines(path, self.errors, losses, progress))
            if self.format == "lines":
                for texts in lines:
                    yield from (Document((text,)) for text in texts if text and not blank(text))
            else:
                yield from _grouped(lines, blanks_separate=self.format == "sentences")

    def shard(self, index: int, count: int) -> Source:
        """Whole files, where that gives parts of about the same size; else every so many documents.

        Each part then reads all files and encodes its share.
        """
        loads, owner = [0] * count, {}
        sizes = {number: path.stat().st_size for number, path in enumerate(self.paths)}
        for number in sorted(sizes, key=lambda number: (-sizes[number], number)):
            owner[number] = loads.index(min(loads))
            loads[owner[number]] += sizes[number]
        if count > 1 and max(loads) * count > 1.25 * sum(loads):
            return super().shard(index, count)
        paths = (path for number, path in enumerate(self.paths) if owner[number] == index)
        return dataclasses.replace(self, paths=tuple(paths))


def check_errors(errors: str) -> None:
    """Raises UserError on a policy that there is not."""
    if errors not in ("strict", "replace"):
        raise UserError(f"errors is 'strict' or 'replace'; got {errors!r}")


@dataclasses.dataclass(frozen=True)
class Strided(Source):
    """Every `count`-th document of a source, from the `index`-th on."""

    source: Source
    index: int
    count: int

    @property
    def name(self) -> str:
        """The source's."""
        return self.source.name

    def size(self) -> int | None:
        """As the source: all of it is read."""
        return self.source.size()

    def documents(
        self, progress: Progress | None = None, losses: Losses | None = None
    ) -> Iterator[Document]:
        """Reads all documents and passes some on."""
        every = self.source.documents(progress, losses)
        return itertools.islice(every, self.index, None, self.count)


@dataclasses.dataclass(frozen=True)
class Sampled(Source):
    """About `share` of a source's documents, picked by their content and a seed.

    So equal documents stay or go together, and a smaller share is a part of a larger one.
    """

    source: Source
    share: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(f"--sample: a share is above 0 and at most 1; got {self.share}")

    @property
    def name(self) -> str:
        """The source's."""
        return self.source.name

    def size(self) -> int | None:
        """As the source: all of it is read."""
        return self.source.size()

    def documents(
        self, progress: Progress | None = None, losses: Losses | None = None
    ) -> Iterator[Document]:
        """Reads all documents and passes some on."""
        for found in self.source.documents(progress, losses):
            text = "\n".join(found.sentences).encode()
            # Not the digest that says which documents are held out.
            digest = hashlib.blake2b(text, digest_size=8, person=b"sample").digest()
            draw = int(fold(np.frombuffer(digest, "<u8"), self.seed)[0]) >> 11
            if draw * 2.0**-53 < self.share:
                yield found

    def shard(self, index: int, count: int) -> Source:
        """The same share of a part."""
        return dataclasses.replace(self, source=self.source.shard(index, count))


def text_files(
    folder: Location,
    format: str = "sentences",
    errors: str = "strict",
    name: str | None = None,
    columns: Columns = TEXT,
) -> TextFiles:
    """A file, or all files of a folder and the folders in it, sorted by their path.

    Hidden files and folders (a leading dot) are left out. `name` defaults to the folder's. A URL
    may be a pattern, gs://bucket/*.txt.

    Raises:
      UserError: nothing there, or a store refuses.
    """
    if is_remote(folder):
        name = str(folder).rstrip("/").rpartition("/")[2] if name is None else name
        return TextFiles(name, remote_paths(str(folder)), format, errors, columns)
    folder = Path(folder)
    name = folder.resolve().name if name is None else name
    if folder.is_file():
        return TextFiles(name, (folder,), format, errors, columns)
    if not folder.is_dir():
        raise UserError(f"there is no file or folder {folder}")
    found = [
        path
        for path in folder.rglob("*")
        if path.is_file() and not _hidden(path.relative_to(folder).parts)
    ]
    if not found:
        raise UserError(f"the folder {folder} holds no files")
    paths = sorted(found, key=lambda path: path.relative_to(folder).parts)
    return TextFiles(name, tuple(paths), format, errors, columns)


def _hidden(parts: Sequence[str]) -> bool:
    return any(part.startswith(".") for part in parts)


def _grouped(lines: Iterator[list[str | None]], blanks_separate: bool) -> Iterator[Document]:
    """Lines of one file as documents."""
    sentences: list[str] = []
    size = 0
    for texts in lines:
        for line in texts:
            if line is None:
                continue
            if blank(line):
                if blanks_separate and sentences:
                    yield Document(tuple(sentences))
                    sentences, size = [], 0
                continue
            sentences.append(line)
            size += len(line)
            if size >= document.LONGEST_DOCUMENT:
                yield Document(tuple(sentences))
                sentences, size = [], 0
    if sentences:
        yield Document(tuple(sentences))


__all__ = [
    "FORMATS",
    "Columns",
    "Document",
    "Losses",
    "Sampled",
    "Source",
    "Strided",
    "TextFiles",
    "check_errors",
    "text_files",
]
