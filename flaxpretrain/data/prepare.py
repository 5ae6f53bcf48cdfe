"""What a recipe does before it trains: a tokenizer and a dataset from text, once for a workdir."""

import contextlib
import dataclasses
import fcntl
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flaxpretrain.config import Run, dataset_folder
from flaxpretrain.data import tokenizers
from flaxpretrain.data.building import BuildSettings, Provenance, build
from flaxpretrain.data.normalization import Normalization
from flaxpretrain.data.progress import ReadingProgress
from flaxpretrain.data.sources import Source
from flaxpretrain.data.store import METADATA_FILE
from flaxpretrain.data.tokenizer_training import train_wordpiece
from flaxpretrain.data.tokenizers import Tokenizer
from flaxpretrain.errors import UserError

POLL_SECONDS = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordPiece:
    """A WordPiece tokenizer of `vocab_size` tokens, to be trained on the text itself.

    `alphabet_limit` characters are kept, the most frequent; words with others become unknown.
    """

    vocab_size: int
    lowercase: bool = True
    alphabet_limit: int = 1000

    def make(self, source: Source) -> Tokenizer:
        """Trains it on all documents of a source."""
        return train_wordpiece(
            [sentence for document in source.documents() for sentence in document.sentences],
            self.vocab_size,
            normalization=Normalization(lowercase=self.lowercase),
            alphabet_limit=self.alphabet_limit,
        )

    @property
    def action(self) -> str:
        """What `make` does, for a line to the user."""
        return "trained a WordPiece tokenizer"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Existing:
    """A tokenizer that is there: a vocab.txt, a tokenizer.json, a folder or a hub id."""

    name: str

    def make(self, source: Source) -> Tokenizer:
        """Loads it."""
        return tokenizers.load(self.name)

    @property
    def action(self) -> str:
        """What `make` does, for a line to the user."""
        return f"loaded the tokenizer {self.name}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareDataset:
    """Builds the dataset that a run trains on, unless it is there: for `Run.prepare`.

    It goes into the workdir. A run that names another folder (`data.folder`, --data-dir) is left
    alone. Where several processes share the workdir, one builds and the others wait for it, for
    `wait_seconds` at most; the output is the same whichever does.

    source: the text. tokenizer: how its tokenizer comes about. validation_share: part of the
    documents that is held out. licence, attribution, language: for the model card.
    """

    source: Source
    tokenizer: WordPiece | Existing
    validation_share: float = 0.05
    seed: int = 0
    licence: str | None = None
    attribution: str | None = None
    language: str | None = None
    num_processes: int = 1
    wait_seconds: float = 3600.0

    def run(self, run: Run, workdir: Path) -> None:
        """Builds, or waits, or does nothing.

        Raises:
          UserError: the text or the tokenizer cannot be read, the disk is full, or another process
            takes too long.
        """
        if run.data.folder is not None:
            return
        folder = Path(dataset_folder(run, workdir))
        if _is_there(folder):
            return
        with _building(folder, self.wait_seconds) as mine:
            if mine:
                self._build(folder)

    def _build(self, folder: Path) -> None:
        tell = _Teller()
        # Read before it is measured: reading says in one line which file is at fault.
        documents = sum(1 for _ in self.source.documents())
        size = self.source.size()
        known = "" if size is None else f", {size / 1e6:.2f} MB"
        tell(f"read {self.source.name}: {documents:,} documents{known}")
        tokenizer = self.tokenizer.make(self.source)
        tell(f"{self.tokenizer.action}: {tokenizer.vocabulary.size:,} tokens")
        settings = BuildSettings(validation_share=self.validation_share, seed=self.seed)
        provenance = Provenance(self.licence, self.attribution, self.language)
        with ReadingProgress("building the dataset", size) as progress:
            dataset = build(
                [self.source],
                tokenizer,
                folder,
                settings,
                provenance,
                num_processes=self.num_processes,
                notify=_say,
                progress=progress.advance,
            )
        splits = ", ".join(
            f"{split.tokens:,} tokens in {split.documents:,} documents for {name}"
            for name, split in dataset.splits.items()
        )
        tell(f"built {folder}: {splits}")


@contextlib.contextmanager
def _building(folder: Path, wait_seconds: float) -> Iterator[bool]:
    """True where this process is to build `folder`, false when another one has done so.

    A lock decides, which dies with its process: when the builder is killed, the next takes over.

    Raises:
      UserError: nobody has built it in time.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait_seconds
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        while not _locked(lock):
            if time.monotonic() > deadline:
                raise UserError(
                    f"another process has been building {folder} for {wait_seconds:g} seconds: "
                    "look what it does, or raise prepare's wait_seconds"
                )
            time.sleep(POLL_SECONDS)
        yield not _is_there(folder)


def _locked(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_there(folder: Path) -> bool:
    return (folder / METADATA_FILE).is_file()


class _Teller:
    """Says what was done and how many seconds it took."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def __call__(self, text: str) -> None:
        now = time.monotonic()
        _say(f"{text} ({now - self._since:.1f} s)")
        self._since = now


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


__all__ = ["Existing", "PrepareDataset", "WordPiece"]
