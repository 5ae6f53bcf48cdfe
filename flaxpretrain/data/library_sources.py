"""Data sets of libraries: Hugging Face `datasets` and TensorFlow Datasets, without TensorFlow.

Each is spelled as one name: `hf:NAME[:CONFIG[:SPLIT]]`, where NAME is on the hub or a local
folder, and `tfds:NAME[:SPLIT]`. Splits may be added, `train+validation`, and cut, `train[:10%]`.
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flaxpretrain.data.document import Document, Losses
from flaxpretrain.data.records import ROWS_AT_A_TIME, TEXT, Columns, arrow_records, reader_of
from flaxpretrain.data.sources import Progress, Source, TextFiles, check_errors, text_files
from flaxpretrain.errors import UserError

_SAVED = ("dataset_dict.json", "state.json")
"""What `save_to_disk` leaves in its folder."""

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}
"""Words in the names of files that say their split, as the hub reads them."""


def parts_of(text: str) -> list[str]:
    """A name cut at its colons, those in the brackets of a split left alone."""
    return re.split(r":(?![^\[]*\])", text)


def named_source(
    text: str,
    columns: Columns = TEXT,
    errors: str = "strict",
    streaming: bool = False,
) -> Source:
    """The source that a name such as `hf:wikitext:wikitext-2-v1:train` stands for.

    Raises:
      UserError: another kind of name.
    """
    kind, _, rest = text.partition(":")
    if kind == "hf" and rest:
        name, config, split = [*parts_of(rest), "", ""][:3]
        if len(parts_of(rest)) > 3:
            raise UserError(f"{text}: expected hf:NAME[:CONFIG[:SPLIT]]")
        return _hugging_face(name, config or None, split or "train", columns, errors, streaming)
    if kind == "tfds" and rest:
        parts = parts_of(rest)
        named = len(parts) > 1 and not re.fullmatch(r"[\d*]+\.[\d*]+\.[\d*]+", parts[-1])
        split = parts.pop() if named else "train"
        name = ":".join(parts)
        shown = Path(name).name if Path(name).is_dir() else f"tfds:{name}"
        return TensorFlowDataset(f"{shown}:{split}", name, split, columns, errors)
    raise UserError(f"{text}: expected hf:NAME[:CONFIG[:SPLIT]] or tfds:NAME[:SPLIT]")


def _hugging_face(
    name: str, config: str | None, split: str, columns: Columns, errors: str, streaming: bool
) -> Source:
    folder = Path(name)
    # The name goes into model cards: that of the hub, of a local folder its last part.
    shown = ":".join([folder.name if folder.is_dir() else f"hf:{name}", *filter(None, [config])])
    shown = f"{shown}:{split}"
    saved = any((folder / file).is_file() for file in _SAVED)
    if folder.is_dir() and not saved and not streaming:
        return _files(folder, config, split, shown, columns, errors)
    return HuggingFace(shown, name, config, split, columns, errors, streaming)


def _files(
    folder: Path, config: str | None, split: str, name: str, columns: Columns, errors: str
) -> TextFiles:
    """The files of a split in a folder laid out as on the hub, read without making a copy."""
    inside = folder / config if config else folder
    every = text_files(inside, errors=errors, name=name, columns=columns)
    records = [p for p in every.paths if isinstance(p, Path) and reader_of(p) is not None]
    said = {path: _split_of(path.relative_to(inside)) for path in records}
    paths: list[Path] = []
    for wanted in split.split("+"):
        of_split = [path for path in records if said[path] == wanted]
        if not of_split and wanted == "train":
            of_split = [path for path in records if said[path] is None]
        if not of_split:
            there = sorted({said[path] or "train" for path in records})
            raise UserError(
                f"hf:{folder}: no file of split {wanted!r}; there are files of "
                f"{', '.join(there) or 'no split'} (.jsonl, .csv, .tsv, .parquet)"
            )
        paths += of_split
    return dataclasses.replace(every, paths=tuple(paths))


def _split_of(path: Path) -> str | None:
    """The split that the name of a file or of its folder says."""
    words = re.split(r"[^a-z]+", str(path).lower())
    return next((s for s, names in _SPLITS.items() if any(n in words for n in names)), None)


@dataclasses.dataclass(frozen=True)
class HuggingFace(Source):
    """A split of a data set that the library `datasets` loads.

    `dataset` is a name on the hub, or a folder that `save_to_disk` wrote. Its Arrow files are
    mapped, not read, into memory; `streaming` reads over the network, without a copy on the disk.
    """

    name: str
    dataset: str
    config: str | None = None
    split: str = "train"
    columns: Columns = TEXT
    errors: str = "strict"
    streaming: bool = False
    part: tuple[int, int] = (0, 1)
    """Which of how many consecutive runs of rows."""

    def __post_init__(self) -> None:
        check_errors(self.errors)

    @functools.cached_property
    def _table(self) -> Any:
        """The data set, with the columns that are read."""
        try:
            import datasets
        except ImportError:
            raise UserError("reading hf: takes a package: pip install 'datasets>=4.0'") from None
        where = f"hf:{self.dataset}"
        with _errors_of(where):
            if any((Path(self.dataset) / file).is_file() for file in _SAVED):
                table: Any = datasets.load_from_disk(self.dataset)
                if isinstance(table, datasets.DatasetDict):
                    table = _added(table, self.split, where)
            else:
                table = datasets.load_dataset(
                    self.dataset, self.config, split=self.split, streaming=self.streaming
                )
            there = table.column_names or list(next(iter(table), {}))
        self.columns.require(there, where)
        table = table.select_columns(self.columns.names)
        index, count = self.part
        if count > 1 and not self.streaming:
            table = table.shard(count, index, contiguous=True)
        return table

    def size(self) -> int | None:
        """Nobody knows before it is read: other columns lie between the texts."""
        return None

    def documents(
        self, progress: Progress | None = None, losses: Losses | None = None
    ) -> Iterator[Document]:
        """Reads all documents, some rows at a time."""
        losses = losses or Losses()
        table, row = self._table.with_format("arrow"), 0
        batches = iter(table.iter(batch_size=ROWS_AT_A_TIME))
        while True:
            with _errors_of(f"hf:{self.dataset}, after row {row}"):
                batch = next(batches, None)
            if batch is None:
                return
            for record in arrow_records(batch):
                where = f"hf:{self.dataset}, row {row}"
                yield from self.columns.documents(record, where, self.errors, losses)
                row += 1
            if progress is not None:
                progress(batch.nbytes)

    def shard(self, index: int, count: int) -> Source:
        """Consecutive rows; of a stream every so many."""
        if self.streaming:
            return super().shard(index, count)
        return dataclasses.replace(self, part=(index, count))


def _added(table: Any, split: str, where: str) -> Any:
    """One split of a saved dictionary of them, or several end to end."""
    import datasets

    for name in split.split("+"):
        if name not in table:
            raise UserError(f"{where} has no split {name!r}; it has {', '.join(table)}")
    return datasets.concatenate_datasets([table[name] for name in split.split("+")])


@contextlib.contextmanager
def _errors_of(where: str) -> Iterator[None]:
    """What a library says of data that are missing or broken, as one line."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, LookupError, RuntimeError, AssertionError) as error:
        cause = error.__cause__ or error
        lines = str(cause).strip().split("\n")
        raise UserError(f"{where}: {lines[0] or type(cause).__name__}") from error


@dataclasses.dataclass(frozen=True)
class TensorFlowDataset(Source):
    """A split of a data set prepared by TensorFlow Datasets as array records.

    `dataset` is a name such as "wiki40b/en:1.3.0", looked up in $TFDS_DATA_DIR, or the folder of a
    prepared one. Records are read at random access without TensorFlow.
    """

    name: str
    dataset: str
    split: str = "train"
    columns: Columns = TEXT
    errors: str = "strict"
    part: tuple[int, int] = (0, 1)
    """Which of how many consecutive runs of records."""

    def __post_init__(self) -> None:
        check_errors(self.errors)

    @functools.cached_property
    def _records(self) -> Any:
        try:
            import array_record as _  # noqa: F401  what it reads the records with
            import tensorflow_datasets as tfds
        except ImportError:
            raise UserError(
                "reading tfds: takes packages: pip install 'flaxpretrain[tfds]'"
            ) from None
        where = f"tfds:{self.dataset}"
        with _errors_of(where):
            if Path(self.dataset).is_dir():
                builder = tfds.builder_from_directory(self.dataset)
            else:
                builder = tfds.builder(self.dataset, try_gcs=False)
            if not builder.info.splits:
                raise UserError(
                    f"{where} is not prepared: run tfds.builder({self.dataset!r}, file_format="
                    "'array_record').download_and_prepare() where TensorFlow Datasets is at home"
                )
            features: Any = builder.info.features
            self.columns.require(list(features) if hasattr(features, "keys") else [], where)
            read: Any = builder.as_data_source
            return [read(split=split) for split in self.split.split("+")]

    @property
    def _range(self) -> range:
        total = sum(map(len, self._records))
        index, count = self.part
        return range(total * index // count, total * (index + 1) // count)

    def size(self) -> int | None:
        """Nobody knows before it is read."""
        return None

    def documents(
        self, progress: Progress | None = None, losses: Losses | None = None
    ) -> Iterator[Document]:
        """Reads all documents, some records at a time."""
        losses = losses or Losses()
        wanted, before = self._range, 0
        for records in self._records:
            first = max(wanted.start - before, 0)
            last = min(wanted.stop - before, len(records))
            for begin in range(first, last, ROWS_AT_A_TIME):
                numbers = range(begin, min(begin + ROWS_AT_A_TIME, last))
                with _errors_of(f"tfds:{self.dataset}, records from {begin}"):
                    batch = records.__getitems__(list(numbers))
                for number, record in zip(numbers, batch, strict=True):
                    where = f"tfds:{self.dataset}, record {number}"
                    for found in self.columns.documents(record, where, self.errors, losses):
                        yield found
                        if progress is not None:
                            progress(sum(map(len, found.sentences)))
            before += len(records)

    def shard(self, index: int, count: int) -> Source:
        """Consecutive records."""
        return dataclasses.replace(self, part=(index, count))


__all__ = ["HuggingFace", "TensorFlowDataset", "named_source", "parts_of"]
