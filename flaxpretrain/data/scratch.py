"""Numbers that a process works out for itself, and more of them than its memory has room for.

They lie in a file without a name, mapped into memory: the system keeps of it what is in use and
drops the rest, and the file ends with the process, however that ends.
"""

import mmap
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from flaxpretrain.errors import UserError
from flaxpretrain.shapes import Int, Numpy

IN_MEMORY_BYTES = 1 << 20
"""Up to here an array is one of memory, and no file is made."""

_ITEM = np.dtype(np.int64)


class ArrayWriter:
    """Writes an array of int64 from its beginning to its end."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES)
        # Where an error ends the writing.
        weakref.finalize(self, self._file.close)

    def append(self, values: Int[Numpy, "..."]) -> None:
        """Adds values at the end.

        Raises:
            UserError: the disk is full, or there is no folder for temporary files.
        """
        with _told():
            self._file.write(np.ascontiguousarray(values, _ITEM).tobytes())

    def array(self) -> Int[Numpy, " T"]:
        """All values, to be read and written; ends the writing.

        Raises:
            UserError: as `append`.
        """
        with _told(), self._file as file:
            size = file.tell()
            if size > IN_MEMORY_BYTES:
                file.flush()
                return np.frombuffer(mmap.mmap(file.fileno(), size), _ITEM)
            file.seek(0)
            return np.frombuffer(bytearray(file.read()), _ITEM)


def zeros(count: int) -> Int[Numpy, " T"]:
    """An array of `count` zeros.

    They are written, for a disk that fills up later would end the process without a word.

    Raises:
        UserError: as `ArrayWriter.append`.
    """
    writer, block = ArrayWriter(), np.zeros(IN_MEMORY_BYTES // _ITEM.itemsize, _ITEM)
    for begin in range(0, count, len(block)):
        writer.append(block[: count - begin])
    return writer.array()


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the order of the rows does not fit in a temporary file ({error}): set TMPDIR to a "
            "folder on a disk with room for 8 bytes a document or row, 32 a pair"
        ) from error


__all__ = ["ArrayWriter", "zeros"]
