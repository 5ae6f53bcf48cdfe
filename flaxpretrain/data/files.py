"""The files of a dataset, wherever they lie: on this machine, or in a store that answers requests.

A store is anything that fsspec reads: gs://, s3://, http(s)://, memory:// and more. Large files
are read in ranges of bytes; small ones are copied to this machine first. What fails for a moment is
tried again; what a store refuses is told in one line.
"""

import abc
import collections
import concurrent.futures
import hashlib
import os
import shutil
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from flaxpretrain.errors import UserError
from flaxpretrain.locations import Location, from_store, is_remote, located
from flaxpretrain.shapes import Numpy, Shaped

T = TypeVar("T")

ATTEMPTS = 8
FIRST_PAUSE_SECONDS = 0.25
"""Doubled after each attempt: 32 seconds in all."""

REQUESTS_AT_ONCE = 16
BLOCK_BYTES = 1 << 21
KEPT_BYTES = 1 << 27
"""Of blocks that were read at single positions, and are kept for the next ones."""

CACHE_FOLDER = Path(".cache") / "flaxpretrain" / "datasets"
"""In the user's home: copies of small files of remote datasets."""


class Files(abc.ABC):
    """The files of one folder."""

    def __init__(self, location: Location) -> None:
        """`location` is how the user calls the folder."""
        self.location = location

    @abc.abstractmethod
    def text(self, name: str) -> str | None:
        """The content of a small file; None where there is none."""

    @abc.abstractmethod
    def sizes(self, names: Iterable[str]) -> dict[str, int | None]:
        """Bytes of each file; None where there is none."""

    @abc.abstractmethod
    def array(self, name: str, dtype: np.dtype, size: int) -> "FlatArray":
        """A file of `size` bytes as a flat array, to be indexed by a slice or by whole numbers."""

    @abc.abstractmethod
    def small_array(self, name: str, dtype: np.dtype, size: int) -> Shaped[Numpy, " N"]:
        """A file of `size` bytes as a memory map."""

    @abc.abstractmethod
    def folder(self, name: str, files: Iterable[str]) -> Path:
        """A folder within this one, as a folder of this machine with those `files` there are."""

    @abc.abstractmethod
    def blocks(self, name: str, size: int) -> Iterable[bytes]:
        """All bytes of a file, some at a time."""

    def crc32(self, name: str, size: int) -> int:
        """CRC-32 of a file's bytes."""
        crc = 0
        for block in self.blocks(name, size):
            crc = zlib.crc32(block, crc)
        return crc

    def path(self, name: str) -> str:
        """How to call a file in a message."""
        return f"{self.location}/{name}"


def files_of(location: Location) -> Files:
    """The files of a folder.

    Raises:
        UserError: the URL is of a kind that nothing installed can read.
    """
    location = located(location)
    return RemoteFiles(str(location)) if is_remote(location) else LocalFiles(Path(location))


class LocalFiles(Files):
    """Files of this machine, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder

    def text(self, name: str) -> str | None:
        """The content of a small file; None where there is none."""
        path = self._folder / name
        return path.read_text(encoding="utf-8") if path.is_file() else None

    def sizes(self, names: Iterable[str]) -> dict[str, int | None]:
        """Bytes of each file; None where there is none."""
        paths = {name: self._folder / name for name in names}
        return {n: path.stat().st_size if path.is_file() else None for n, path in paths.items()}

    def array(self, name: str, dtype: np.dtype, size: int) -> Shaped[Numpy, " N"]:
        """A file as a memory map."""
        # asarray: indexing a plain view of the map is faster than indexing a np.memmap.
        return np.asarray(np.memmap(self._folder / name, dtype, "r"))

    def small_array(self, name: str, dtype: np.dtype, size: int) -> Shaped[Numpy, " N"]:
        """As `array`."""
        return self.array(name, dtype, size)

    def folder(self, name: str, files: Iterable[str]) -> Path:
        """The folder itself."""
        return self._folder / name

    def blocks(self, name: str, size: int) -> Iterable[bytes]:
        """All bytes of a file, some at a time."""
        with (self._folder / name).open("rb") as file:
            while block := file.read(1 << 20):
                yield block


class _Short(OSError):
    """A store gave fewer bytes than asked for."""


class RemoteFiles(Files):
    """Files in a store, read in ranges of bytes."""

    first_pause_seconds = FIRST_PAUSE_SECONDS

    def __init__(self, url: str) -> None:
        """Raises UserError where nothing installed can read such a URL."""
        import fsspec

        super().__init__(url)
        try:
            self._system, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UserError(
                f"{url}: nothing installed reads {url.partition('://')[0]}:// ({error}); for gs:// "
                "and s3:// install flaxpretrain[cloud]"
            ) from error
        except Exception as error:
            if not from_store(error):
                raise
            raise self._refusal("", error) from error
        self._copies: Path | None = None
        self._kept: collections.OrderedDict[tuple[str, int], np.ndarray] = collections.OrderedDict()
        self._kept_bytes, self._lock = 0, threading.Lock()

    def _name(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}" if name else self._root

    def _ask(self, name: str, request: Callable[[], T]) -> T:
        """The answer to a request, made again where it fails for a moment.

        Raises:
            FileNotFoundError: the store has no such object.
            UserError: the store refuses, or goes on failing.
        """
        for attempt in range(ATTEMPTS):
            try:
                return request()
            except Exception as error:
                # fsspec calls an object missing where a server failed to tell its size.
                cause = error.__cause__ if isinstance(error, FileNotFoundError) else None
                if isinstance(cause, Exception) and _status(cause) not in (None, 404):
                    error = cause
                if isinstance(error, FileNotFoundError) or not from_store(error):
                    raise
                if _lasting(error) or attempt == ATTEMPTS - 1:
                    raise self._refusal(name, error) from error
            time.sleep(self.first_pause_seconds * 2**attempt)
        raise AssertionError

    def _refusal(self, name: str, error: Exception) -> UserError:
        reason = " ".join(str(error).split())[:300]
        return UserError(
            f"{self.path(name)} cannot be read ({type(error).__name__}: {reason}): look whether "
            "the address is right and this machine may read it"
        )

    def text(self, name: str) -> str | None:
        """The content of a small file; None where there is none."""
        try:
            content = self._ask(name, lambda: self._system.cat_file(self._name(name)))
        except (FileNotFoundError, IsADirectoryError):
            return None
        return bytes(content).decode()

    def sizes(self, names: Iterable[str]) -> dict[str, int | None]:
        """Bytes of each file, asked for side by side; None where there is none."""

        def size(name: str) -> int | None:
            try:
                info = self._ask(name, lambda: self._system.info(self._name(name)))
            except FileNotFoundError:
                return None
            return info["size"]

        names = list(names)
        return dict(zip(names, _at_once(size, names), strict=True))

    def matching(self, pattern: str, *, literally: bool = False) -> dict[str, int | None]:
        """Bytes of the files below this folder whose path matches, None where the store is silent.

        A pattern is one of fsspec's, `*.txt` or `**`; `literally`, it is a single path. Hidden
        files and folders (a leading dot) match no pattern.

        Raises:
            UserError: the store refuses, or goes on failing.
        """

        def request() -> dict[str, Any]:
            path = self._name(pattern)
            if literally:
                return {path: self._system.info(path)}
            return self._system.glob(path, detail=True)

        try:
            found = self._ask(pattern, request)
        except FileNotFoundError:
            return {}
        begin = len(self._root.rstrip("/")) + 1
        sizes = {p[begin:]: info["size"] for p, info in found.items() if info["type"] == "file"}
        if not literally:
            sizes = {name: size for name, size in sizes.items() if "/." not in f"/{name}"}
        untold = [name for name, size in sizes.items() if size is None]
        return sizes | (self.sizes(untold) if untold else {})

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Bytes [begin, end) of a file.

        Raises:
            UserError: it is missing or too short, or the store refuses or ignores ranges.
        """
        if begin >= end:
            return b""

        def request() -> bytes:
            found = self._system.cat_file(self._name(name), start=begin, end=end)
            if len(found) > end - begin:
                raise UserError(
                    f"{self.path(name)}: asked for {end - begin} bytes, the server gave "
                    f"{len(found)}: it does not serve ranges of bytes; use one that does"
                )
            if len(found) < end - begin:
                raise _Short(f"{len(found)} bytes came of {end - begin} from byte {begin} on")
            return found

        try:
            return self._ask(name, request)
        except FileNotFoundError as error:
            raise UserError(f"{self.path(name)} is missing; it was there before") from error

    def array(self, name: str, dtype: np.dtype, size: int) -> "RemoteArray":
        """A file as an array whose slices and single positions are read when they are asked for."""
        return RemoteArray(self, name, np.dtype(dtype), size)

    def small_array(self, name: str, dtype: np.dtype, size: int) -> Shaped[Numpy, " N"]:
        """A file of `size` bytes, copied to this machine, as a memory map."""
        path = self._folder_of_copies() / name
        if not (path.is_file() and path.stat().st_size == size):
            self._copy(name, size, path)
        return np.asarray(np.memmap(path, dtype, "r"))

    def folder(self, name: str, files: Iterable[str]) -> Path:
        """A folder within this one, copied to this machine; not there where it has no such file."""
        target = self._folder_of_copies() / name
        if target.is_dir():
            return target
        found = self.sizes(f"{name}/{file}" for file in files)
        if not any(size is not None for size in found.values()):
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
        for file, size in found.items():
            if size is not None:
                self._copy(file, size, aside / Path(file).name)
        try:
            aside.rename(target)
        except OSError:  # another process was faster
            shutil.rmtree(aside)
        return target

    def blocks(self, name: str, size: int) -> Iterable[bytes]:
        """All bytes of a file, some at a time."""
        for begin in range(0, size, BLOCK_BYTES):
            yield self.read(name, begin, min(begin + BLOCK_BYTES, size))

    def _copy(self, name: str, size: int, target: Path) -> None:
        """Copies a file aside, then renames: what was interrupted is begun again."""
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(prefix=".copy-", dir=target.parent)
        with os.fdopen(handle, "wb") as file:
            for block in self.blocks(name, size):
                file.write(block)
        os.replace(aside, target)

    def _folder_of_copies(self) -> Path:
        """A folder for copies of what lies at this address now, told by its dataset.json."""
        if self._copies is None:
            content = self.text("dataset.json") or ""
            key = hashlib.sha256(f"{self.location}\n{content}".encode()).hexdigest()[:32]
            self._copies = Path.home() / CACHE_FOLDER / key
            try:
                self._copies.mkdir(parents=True, exist_ok=True)
            except OSError:  # a machine without a home to write to
                self._copies = Path(tempfile.mkdtemp(prefix="flaxpretrain-"))
        return self._copies

    def kept_blocks(
        self, name: str, numbers: Iterable[int], read: Callable[[int], np.ndarray]
    ) -> Mapping[int, np.ndarray]:
        """Blocks of a file, from those kept or by `read`, side by side."""
        with self._lock:
            found = {n: self._kept[name, n] for n in numbers if (name, n) in self._kept}
            for number in found:
                self._kept.move_to_end((name, number))
        missing = [n for n in numbers if n not in found]
        fresh = dict(zip(missing, _at_once(read, missing), strict=True))
        with self._lock:
            for number, block in fresh.items():
                if (name, number) not in self._kept:
                    self._kept[name, number] = block
                    self._kept_bytes += block.nbytes
            while self._kept_bytes > KEPT_BYTES:
                self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes
        return found | fresh


class RemoteArray:
    """A flat array in a store: slices are read as they are, single positions in blocks."""

    def __init__(self, files: RemoteFiles, name: str, dtype: np.dtype, size_bytes: int) -> None:
        """`size_bytes` is that of the file."""
        self._files, self._name, self.dtype = files, name, dtype
        self._length = size_bytes // dtype.itemsize
        self._block = BLOCK_BYTES // dtype.itemsize

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        """The elements of a slice without step, or at any positions."""
        if isinstance(index, slice):
            begin, end, _ = index.indices(self._length)
            return self._read(begin, end)
        index = np.asarray(index)
        found = np.empty(index.shape, self.dtype)
        if not index.size:
            return found
        block = index // self._block
        first = int(block.min())
        numbers = (np.flatnonzero(np.bincount((block - first).ravel())) + first).tolist()
        for number, content in self._files.kept_blocks(self._name, numbers, self._whole).items():
            here = block == number
            found[here] = content[index[here] - number * self._block]
        return found

    def _whole(self, number: int) -> np.ndarray:
        return self._read(number * self._block, min((number + 1) * self._block, self._length))

    def _read(self, begin: int, end: int) -> np.ndarray:
        size = self.dtype.itemsize
        return np.frombuffer(self._files.read(self._name, begin * size, end * size), self.dtype)


FlatArray = np.ndarray | RemoteArray
"""What takes a slice or whole numbers, and gives numpy arrays."""


def _at_once(function: Callable[[Any], T], values: list[Any]) -> list[T]:
    """The function's answers, several requests under way together."""
    if len(values) < 2:
        return [function(value) for value in values]
    with concurrent.futures.ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        return list(pool.map(function, values))


def _lasting(error: Exception) -> bool:
    """Whether to ask again is of no use: the store knows the request and refuses it."""
    status = _status(error) or 0
    refused = 400 <= status < 500 and status not in (408, 429)
    return refused or isinstance(error, (PermissionError, IsADirectoryError, NotADirectoryError))


def _status(error: Exception) -> int | None:
    """What a server answered, as HTTP numbers it."""
    status = str(getattr(error, "status", None) or getattr(error, "code", None))
    return int(status) if status.isdecimal() else None


__all__ = ["Files", "FlatArray", "LocalFiles", "RemoteArray", "RemoteFiles", "files_of"]
