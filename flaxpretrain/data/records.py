"""Files of records, a text each: JSON lines, tables with tabs or commas, Parquet."""

import csv
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flaxpretrain.data import compressed, document
from flaxpretrain.data.document import Document, Losses, blank, documents_of
from flaxpretrain.data.lines import read_lines
from flaxpretrain.data.remote_text import RemotePath, TextPath
from flaxpretrain.errors import UserError

ROWS_AT_A_TIME = 256
"""Of a Parquet file or a table of another library."""

Progress = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which fields of a record make a document.

    text: its text, or a list of sentences; each line of a text is a sentence.
    target: makes pairs, as `SourceTargetPairs` reads them: the document is one line of `text`, the
        source, and one of this field.
    prefix: stands before the source of a pair, "translate English to German: ", say.
    """

    text: str = "text"
    target: str | None = None
    prefix: str = ""

    def __post_init__(self) -> None:
        if self.prefix and self.target is None:
            raise UserError(
                f"--prefix {self.prefix!r} is for pairs: name their targets by --target-column"
            )

    @property
    def names(self) -> list[str]:
        """The fields that are read."""
        return [self.text] if self.target is None else [self.text, self.target]

    def require(self, there: list[str], where: str) -> None:
        """Raises UserError where a table lacks a column."""
        for name in self.names:
            if name not in there:
                flag = "--text-column" if name == self.text else "--target-column"
                raise UserError(
                    f"{where} has no column {name!r}, it has {', '.join(there)}: name the one "
                    f"to read by {flag}"
                )

    def documents(
        self, record: Mapping[str, Any], where: str, errors: str, losses: Losses
    ) -> Iterator[Document]:
        """The document of a record; several where it is too long, none where it has no text.

        Raises:
          UserError: the record is broken, unless `losses` skips it.
        """
        texts = []
        for name in self.names:
            if name not in record:
                losses.broken(f"{where}: no field {name!r}, only {', '.join(record) or 'nothing'}")
                return
            try:
                texts.append(_sentences(record[name], errors, losses))
            except _Unfit as problem:
                losses.broken(f"{where}, field {name!r}: {problem}")
                return
        if self.target is None:
            if not texts[0]:
                losses.empty_count += 1
            yield from documents_of(texts[0])
        elif all(texts):
            source, target = (" ".join(map(str.strip, text)) for text in texts)
            yield Document((self.prefix + source, target))
        else:
            side = self.names[0] if not texts[0] else self.target
            losses.broken(f"{where}: field {side!r} of a pair is empty")


TEXT = Columns()
"""A document a record, in its field "text"."""


class _Unfit(Exception):
    """A value that is no text; the message says why."""


def _sentences(value: Any, errors: str, losses: Losses) -> list[str]:
    """The lines of a value that are not blank."""
    if value is None:
        return []
    if isinstance(value, list | tuple):
        return [line for part in value for line in _sentences(part, errors, losses)]
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            if errors != "replace":
                raise _Unfit(f"not UTF-8 at byte {error.start}") from None
            losses.replaced_count += 1
            value = value.decode("utf-8", "replace")
    if not isinstance(value, str):
        raise _Unfit(f"expected text, got {type(value).__name__}")
    try:
        # JSON can spell halves of surrogate pairs, which no UTF-8 can.
        if not value.isascii():
            value.encode()
    except UnicodeEncodeError:
        raise _Unfit("half a surrogate pair, which is no character") from None
    lines = [line for line in value.replace("\r\n", "\n").split("\n") if not blank(line)]
    longest = max(map(len, lines), default=0)
    if longest > document.LONGEST_LINE:
        raise _Unfit(f"a line of {longest} characters; is it text?")
    return lines


def json_documents(
    path: TextPath, columns: Columns, errors: str, losses: Losses, progress: Progress | None
) -> Iterator[Document]:
    """The documents of a file with one JSON object a line."""
    for first, texts in read_lines(path, errors, losses, progress):
        for number, text in enumerate(texts, first):
            if text is None or blank(text):
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                losses.broken(f"{where}: no JSON ({error})")
                continue
            if not isinstance(record, dict):
                losses.broken(
                    f"{where}: expected a JSON object a line, got {type(record).__name__}"
                )
                continue
            yield from columns.documents(record, where, errors, losses)


def table_documents(
    path: TextPath, columns: Columns, errors: str, losses: Losses, progress: Progress | None
) -> Iterator[Document]:
    """The documents of a table, tabs or commas between its columns, their names on the first line.

    With commas, a cell in quotes may hold commas and line ends.
    """
    names: list[str] | None = None
    comma = ".csv" in path.suffixes
    for number, cells in (_comma_rows if comma else _tab_rows)(path, errors, losses, progress):
        where = f"{path}, line {number}"
        if names is None:
            names = cells
            columns.require(names, f"{path}, whose first line names its columns,")
        elif len(cells) != len(names):
            losses.broken(f"{where}: {len(cells)} columns, where the first line names {len(names)}")
        else:
            yield from columns.documents(
                dict(zip(names, cells, strict=True)), where, errors, losses
            )


def _tab_rows(
    path: TextPath, errors: str, losses: Losses, progress: Progress | None
) -> Iterator[tuple[int, list[str]]]:
    """The cells of each line that is not blank, and its number."""
    for first, texts in read_lines(path, errors, losses, progress):
        for number, text in enumerate(texts, first):
            if text is not None and not blank(text):
                yield number, text.split("\t")


def _comma_rows(
    path: TextPath, errors: str, losses: Losses, progress: Progress | None
) -> Iterator[tuple[int, list[str]]]:
    """The cells of each record, and the number of its last line."""
    number = 0

    def lines() -> Iterator[str]:
        nonlocal number
        for first, texts in read_lines(path, errors, losses, progress):
            for place, text in enumerate(texts, first):
                number = place
                if text is not None:
                    yield text + "\n"

    csv.field_size_limit(document.LONGEST_LINE)
    reader = csv.reader(lines(), strict=True)
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            losses.broken(f"{path}, line {number}: no CSV ({error})")
            continue
        if cells is None:
            return
        if cells:
            yield number, cells


def parquet_documents(
    path: TextPath, columns: Columns, errors: str, losses: Losses, progress: Progress | None
) -> Iterator[Document]:
    """The documents of a Parquet file, read some rows at a time."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError("reading Parquet takes a package: pip install 'datasets>=4.0'") from None
    broken = (arrow.ArrowException, OSError)
    size, told, row = path.stat().st_size, 0, 0
    remedy = "write or download it again, or pass --skip-broken"
    try:
        file = parquet.ParquetFile(path.open("rb") if isinstance(path, RemotePath) else path)
    except broken as error:
        losses.broken(f"{path} is no Parquet file, or a broken one: {_brief(error)}", remedy)
        if progress is not None:
            progress(size)
        return
    with file:
        columns.require(file.schema_arrow.names, str(path))
        for group in range(file.num_row_groups):
            end = row + file.metadata.row_group(group).num_rows
            batches = file.iter_batches(ROWS_AT_A_TIME, row_groups=[group], columns=columns.names)
            while True:
                try:
                    batch = next(batches, None)
                except broken as error:
                    losses.broken(
                        f"{path}, rows {row} to {end - 1}: broken ({_brief(error)})",
                        remedy,
                        count=end - row,
                    )
                    break
                if batch is None:
                    break
                for record in arrow_records(batch):
                    yield from columns.documents(record, f"{path}, row {row}", errors, losses)
                    row += 1
            row = end
            if progress is not None:
                here = size * row // max(file.metadata.num_rows, 1)
                progress(here - told)
                told = here
    if progress is not None:
        progress(size - told)


def arrow_records(table: Any) -> Iterator[dict[str, Any]]:
    """The rows of an Arrow table; text that is not UTF-8 comes as bytes."""
    values = []
    for column in table.columns:
        try:
            values.append(column.to_pylist())
        except UnicodeDecodeError:
            values.append(column.cast("large_binary").to_pylist())
    names = table.column_names if hasattr(table, "column_names") else table.schema.names
    for row in zip(*values, strict=True):
        yield dict(zip(names, row, strict=True))


def _brief(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


READERS: dict[str, Callable[..., Iterator[Document]]] = {
    ".jsonl": json_documents,
    ".ndjson": json_documents,
    ".json": json_documents,
    ".tsv": table_documents,
    ".csv": table_documents,
    ".parquet": parquet_documents,
}
"""What reads files of records, by their suffix."""


def reader_of(path: TextPath) -> Callable[..., Iterator[Document]] | None:
    """What reads a file of records; None for one of plain text."""
    if path.suffix in compressed.SUFFIXES:
        reader = READERS.get("".join(path.suffixes[-2:-1]))
        return None if reader is parquet_documents else reader
    return READERS.get(path.suffix)


__all__ = ["ROWS_AT_A_TIME", "TEXT", "Columns", "arrow_records", "reader_of"]
