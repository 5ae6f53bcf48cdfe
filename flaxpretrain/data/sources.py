"""Where documents come from: text files of three formats, plain or gzipped, as one sequence.

The sequence of documents is all that counts: how they are spread over files leaves no trace in a
dataset. Texts are taken as they are, but for line ends; normalising is the tokenizer's task.
"""

import abc
import contextlib
import dataclasses
import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from flaxpretrain.errors import UserError

BLOCK = 1 << 20
"""Bytes read at once."""

LONGEST_DOCUMENT = 1 << 22
"""Characters; a longer document is cut at a sentence's end, to bound memory.

No row is long enough to tell: it is about a million tokens.
"""

LONGEST_LINE = 1 << 24
"""Bytes; a longer line is no text, or text that should have been cut."""

FORMATS = ("sentences", "lines", "files")
SUFFIX_GZIP = ".gz"


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One document: what stood on each of its lines, a sentence or a paragraph; none is blank."""

    sentences: tuple[str, ...]


class Source(abc.ABC):
    """A sequence of documents, the same every time it is read."""

    name: str

    @abc.abstractmethod
    def documents(self, progress: Callable[[int], None] | None = None) -> Iterator[Document]:
        """Reads all documents; `progress` is told of every so many bytes that were read.

        Raises:
          UserError: a file cannot be read, is not UTF-8, or its compression is broken.
        """

    @abc.abstractmethod
    def size(self) -> int:
        """Bytes that `progress` will have been told of at the end."""


@dataclasses.dataclass(frozen=True)
class TextFiles(Source):
    """Text files, read one after the other.

    `format` says what a document is: "sentences": lines up to a blank line or the file's end;
    "lines": each line; "files": each file, blank lines ignored.
    """

    name: str
    paths: tuple[Path, ...]
    format: str = "sentences"
    errors: str = "strict"
    """What bytes that are not UTF-8 do: "strict" stops with an error, "replace" puts U+FFFD."""

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UserError(f"a text format is one of {', '.join(FORMATS)}; got {self.format!r}")
        if self.errors not in ("strict", "replace"):
            raise UserError(f"errors is 'strict' or 'replace'; got {self.errors!r}")

    def size(self) -> int:
        """Bytes on the disk, compressed ones where a file is compressed."""
        return sum(path.stat().st_size for path in self.paths)

    def documents(self, progress: Callable[[int], None] | None = None) -> Iterator[Document]:
        """Reads all documents of all files, in the order of `paths`."""
        for path in self.paths:
            lines = _read_lines(path, self.errors, progress)
            if self.format == "lines":
                for batch in lines:
                    yield from (Document((line,)) for line in batch if not _blank(line))
            else:
                yield from _grouped(lines, blanks_separate=self.format == "sentences")


def text_files(
    folder: Path | str, format: str = "sentences", errors: str = "strict", name: str | None = None
) -> TextFiles:
    """A file, or all files of a folder and the folders in it, sorted by their path.

    Hidden files and folders (a leading dot) are left out. `name` defaults to the folder's.

    Raises:
      UserError: nothing there.
    """
    folder = Path(folder)
    name = folder.resolve().name if name is None else name
    if folder.is_file():
        return TextFiles(name, (folder,), format, errors)
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
    return TextFiles(name, tuple(paths), format, errors)


def _hidden(parts: Sequence[str]) -> bool:
    return any(part.startswith(".") for part in parts)


def _blank(line: str) -> bool:
    return not line or line.isspace()


def _grouped(lines: Iterator[list[str]], blanks_separate: bool) -> Iterator[Document]:
    """Lines of one file as documents."""
    sentences: list[str] = []
    size = 0
    for batch in lines:
        for line in batch:
            if _blank(line):
                if blanks_separate and sentences:
                    yield Document(tuple(sentences))
                    sentences, size = [], 0
                continue
            sentences.append(line)
            size += len(line)
            if size >= LONGEST_DOCUMENT:
                yield Document(tuple(sentences))
                sentences, size = [], 0
    if sentences:
        yield Document(tuple(sentences))


def _read_lines(
    path: Path, errors: str, progress: Callable[[int], None] | None
) -> Iterator[list[str]]:
    """The lines of a file without their ends, some at a time; a byte order mark is dropped.

    Only "\\n" and "\\r\\n" end a line: U+2028 and its like are text.
    """
    offset = lines = told = 0
    rest = b""
    with _open(path) as (raw, file):
        while True:
            block = _read(path, file)
            if progress is not None:
                position = raw.tell()
                progress(position - told)
                told = position
            if not block and not rest:
                return
            # A character never spans blocks: they are cut after a line end.
            cut = block.rfind(b"\n") + 1 if block else 0
            if block and not cut:
                rest += block
                if len(rest) > LONGEST_LINE:
                    raise UserError(
                        f"{path}, line {lines + 1}: longer than {LONGEST_LINE} bytes; is it text?"
                    )
                continue
            whole, rest = rest + block[:cut], block[cut:]
            start = 3 if offset == 0 and whole.startswith(b"\xef\xbb\xbf") else 0
            try:
                text = whole[start:].decode("utf-8", errors)
            except UnicodeDecodeError as error:
                line = lines + whole.count(b"\n", 0, start + error.start) + 1
                raise UserError(
                    f"{path} is not UTF-8: byte {offset + start + error.start}, line {line}; "
                    "convert it, or pass --errors replace"
                ) from None
            if "\r\n" in text:
                text = text.replace("\r\n", "\n")
            batch = text.removesuffix("\n").split("\n")
            offset += len(whole)
            lines += len(batch)
            yield batch


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[io.BufferedIOBase, io.BufferedIOBase]]:
    """The file on the disk, whose position is the progress, and the file to read text from."""
    try:
        raw = path.open("rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    with raw:
        if path.suffix == SUFFIX_GZIP:
            yield raw, gzip.GzipFile(fileobj=raw, mode="rb")
        else:
            yield raw, raw


def _read(path: Path, file: io.BufferedIOBase) -> bytes:
    try:
        return file.read(BLOCK)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is a broken gzip file: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
