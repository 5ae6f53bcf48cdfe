"""Files of text in a store: gs://, s3://, http(s)://, memory:// and whatever else fsspec reads.

They are read in ranges of bytes, each asked for again where a request fails for a moment.
"""

import dataclasses
import functools
import io
import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from flaxpretrain.data.files import BLOCK_BYTES, RemoteFiles
from flaxpretrain.errors import UserError

_PATTERN = re.compile(r"[*?\[]")
_QUERY = re.compile(r"[?#].*")
_WEB = ("http://", "https://")


class Status(NamedTuple):
    """What is known of a file, by the names that `os.stat` gives."""

    st_size: int


@dataclasses.dataclass(frozen=True)
class RemotePath:
    """A file in a store, with as much of a Path as readers of text use."""

    folder: str
    name: str
    """Below the folder, folders within it included."""
    size: int
    """In bytes."""

    def __str__(self) -> str:
        return f"{self.folder}/{self.name}"

    @property
    def suffixes(self) -> list[str]:
        """As a Path's; an address's query is no part of its name."""
        return PurePosixPath(_QUERY.sub("", self.name)).suffixes

    @property
    def suffix(self) -> str:
        """The last of the suffixes."""
        return self.suffixes[-1] if self.suffixes else ""

    def stat(self) -> Status:
        """The size that the store told when it was asked for its files."""
        return Status(self.size)

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """The bytes of the file; reading raises UserError where the store refuses or goes on
        failing."""
        if mode != "rb":
            raise ValueError(f"files in a store are only read, as bytes; got mode {mode!r}")
        return io.BufferedReader(_Ranges(self), BLOCK_BYTES)


TextPath = Path | RemotePath
"""A file of text, here or in a store."""


class _Ranges(io.RawIOBase):
    """A file in a store as a stream that can be read from anywhere."""

    def __init__(self, path: RemotePath) -> None:
        super().__init__()
        self._path, self._files, self._position = path, _files(path.folder), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._path.size}
        self._position = max(origin[whence] + offset, 0)
        return self._position

    def readinto(self, buffer: memoryview, /) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        end = min(self._position + len(buffer), self._path.size)
        found = self._files.read(self._path.name, self._position, end)
        buffer[: len(found)] = found
        self._position += len(found)
        return len(found)


@functools.lru_cache(maxsize=16)
def _files(folder: str) -> RemoteFiles:
    return RemoteFiles(folder)


def remote_paths(url: str) -> tuple[RemotePath, ...]:
    """The file at a URL, those that match a pattern with `*`, or all below a folder, by name.

    Hidden files and folders (a leading dot) are left out. A web server has no folders but where an
    address ends in a slash, and then its page must list them.

    Raises:
        UserError: nothing is there, the store refuses, or it does not tell sizes.
    """
    is_web = url.startswith(_WEB)
    # On the web, ? begins a query and brackets may stand in addresses.
    wild = re.search(r"\*", url) if is_web else _PATTERN.search(url)
    if wild:
        folder, _, pattern = url[: wild.start()].rpartition("/")
        pattern += url[wild.start() :]
        found = _files(folder).matching(pattern)
    elif is_web and not url.endswith("/"):
        folder, _, name = url.rpartition("/")
        found = _alone(folder, name)
    else:
        folder, _, name = url.rstrip("/").rpartition("/")
        found = {} if is_web or folder.endswith(":/") else _alone(folder, name)
        if not found:
            folder = url.rstrip("/")
            found = _files(folder).matching("**")
    if not found:
        raise UserError(
            f"{url} is no file and no folder with files, and no pattern of any: see whether the "
            "address is right"
        )
    unknown = [name for name, size in found.items() if size is None]
    if unknown:
        raise UserError(
            f"{folder}/{unknown[0]}: its server does not tell how many bytes it has, so that it "
            "cannot be read in ranges: download it first"
        )
    return tuple(RemotePath(folder, name, size or 0) for name, size in sorted(found.items()))


def _alone(folder: str, name: str) -> dict[str, int | None]:
    """The file of this name; none where there is a folder or nothing."""
    return _files(folder).matching(name, literally=True)


__all__ = ["RemotePath", "TextPath", "remote_paths"]
