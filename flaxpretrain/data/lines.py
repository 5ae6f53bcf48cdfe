"""The lines of text files, with their numbers; what is broken is named by file and line."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from flaxpretrain.data import document
from flaxpretrain.data.compressed import BrokenFile, opened
from flaxpretrain.data.document import Losses
from flaxpretrain.data.remote_text import TextPath

BLOCK = 1 << 20
"""Bytes read at once."""


class Lines(NamedTuple):
    """Consecutive lines of a file without their ends."""

    first: int
    """Number of the first line, from 1."""
    texts: list[str | None]
    """None where a line could not be read and was counted as broken."""


def read_lines(
    path: TextPath,
    errors: str,
    losses: Losses,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Lines]:
    """The lines of a file, some at a time; a byte order mark is dropped.

    Only "\\n" and "\\r\\n" end a line: U+2028 and its like are text. `errors` "replace" puts U+FFFD
    in the place of bytes that are not UTF-8.

    Raises:
      UserError: the file cannot be read; or, unless `losses` skips it, a line is not UTF-8 or too
        long, or the compression is broken.
    """
    number = offset = told = 0
    rest, dropping = b"", False
    with opened(path) as (raw, read):
        while True:
            try:
                block = read(BLOCK)
            except BrokenFile as error:
                losses.broken(str(error), remedy="copy or download it again, or pass --skip-broken")
                if progress is not None:
                    progress(path.stat().st_size - told)
                return
            if progress is not None:
                position = raw.tell()
                progress(position - told)
                told = position
            if dropping and block:
                end = block.find(b"\n") + 1
                offset += end or len(block)
                if not end:
                    continue
                number, dropping, block = number + 1, False, block[end:]
                if not block:
                    continue
            if not block and not rest:
                return
            # A character never spans blocks: they are cut after a line end.
            cut = block.rfind(b"\n") + 1 if block else 0
            if block and not cut:
                rest += block
                if len(rest) > document.LONGEST_LINE:
                    losses.broken(
                        f"{path}, line {number + 1}: longer than {document.LONGEST_LINE} bytes; "
                        "is it text?"
                    )
                    offset, rest, dropping = offset + len(rest), b"", True
                continue
            whole, rest = rest + block[:cut], block[cut:]
            lines = _decoded(whole, path, number, offset, errors, losses)
            yield Lines(number + 1, lines)
            offset, number = offset + len(whole), number + len(lines)


def _decoded(
    data: bytes, path: TextPath, number: int, offset: int, errors: str, losses: Losses
) -> list[str | None]:
    """Whole lines as text; `number` lines and `offset` bytes come before them in the file."""
    start = 3 if offset == 0 and data.startswith(b"\xef\xbb\xbf") else 0
    try:
        return _cut(data[start:].decode())
    except UnicodeDecodeError as error:
        if errors != "replace" and not losses.skip_broken:
            line = number + data.count(b"\n", 0, start + error.start) + 1
            losses.broken(
                f"{path} is not UTF-8: byte {offset + start + error.start}, line {line}",
                remedy="convert it, or pass --errors replace or --skip-broken",
            )
    texts: list[str | None] = []
    for index, line in enumerate(data[start:].removesuffix(b"\n").split(b"\n"), number + 1):
        try:
            texts.append(line.removesuffix(b"\r").decode())
        except UnicodeDecodeError as error:
            if errors == "replace":
                losses.replaced_count += 1
                texts.append(line.removesuffix(b"\r").decode("utf-8", "replace"))
            else:
                losses.broken(f"{path} is not UTF-8: byte {error.start} of line {index}")
                texts.append(None)
    return texts


def _cut(text: str) -> list[str | None]:
    if "\r\n" in text:
        text = text.replace("\r\n", "\n")
    return [*text.removesuffix("\n").split("\n")]


__all__ = ["Lines", "read_lines"]
