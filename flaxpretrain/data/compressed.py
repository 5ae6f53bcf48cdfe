"""Text files as they lie on the disk: plain, or compressed by gzip, xz or Zstandard."""

import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from flaxpretrain.data.remote_text import TextPath
from flaxpretrain.errors import UserError

_LARGEST_WINDOW = 1 << 31
"""Bytes: what `zstd --long=31` asks of a reader."""


class BrokenFile(Exception):
    """A compressed file that ends early or is none; the message says which kind it should be."""


class _Zstandard:
    """Frames of Zstandard one after another; unlike the library's reader it misses no end."""

    def __init__(self, raw: io.BufferedIOBase) -> None:
        try:
            import zstandard
        except ImportError:
            raise UserError(
                "reading .zst files takes a package: pip install 'zstandard>=0.23'"
            ) from None
        self._raw = raw
        self._make: Callable[[], Any] = zstandard.ZstdDecompressor(
            max_window_size=_LARGEST_WINDOW
        ).decompressobj
        self._frame: Any = None
        self._error: type[Exception] = zstandard.ZstdError

    def read(self, size: int, /) -> bytes:
        """The text of the next `size` compressed bytes that hold any."""
        while True:
            data = self._raw.read(size)
            if not data:
                if self._frame is not None:
                    raise EOFError("it ends in the middle")
                return b""
            parts = []
            try:
                while data:
                    self._frame = self._frame or self._make()
                    parts.append(self._frame.decompress(data))
                    if not self._frame.eof:
                        break
                    data, self._frame = self._frame.unused_data, None
            except self._error as error:
                raise EOFError(str(error)) from None
            if text := b"".join(parts):
                return text


_FORMATS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    ".gz": ("gzip", lambda raw: gzip.GzipFile(fileobj=raw, mode="rb")),
    ".xz": ("xz", lambda raw: lzma.LZMAFile(raw, "rb")),
    ".zst": ("zst", _Zstandard),
}
SUFFIXES = frozenset(_FORMATS)
"""Of compressed files."""


@contextlib.contextmanager
def opened(path: TextPath) -> Iterator[tuple[io.BufferedIOBase, Callable[[int], bytes]]]:
    """The file as it is stored, whose position is the progress, and a function that reads its text.

    The function raises `BrokenFile` where the compression is broken.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        raw = path.open("rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    with raw:
        name, reader = _FORMATS.get(path.suffix, ("", lambda raw: raw))
        file = reader(raw)

        def read(size: int) -> bytes:
            try:
                return file.read(size)
            except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
                raise BrokenFile(f"{path} is a broken {name} file: {error}") from None
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror}") from None

        yield raw, read


__all__ = ["SUFFIXES", "BrokenFile", "opened"]
