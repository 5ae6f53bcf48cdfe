"""Cleans a corpus: text to text, in several processes, restartable, with a count of what went.

What comes out is the same for any number of processes: documents are cleaned wherever, but judged
for duplicates in their order. All work happens in `<output>.partial/`, which becomes `<output>` by
one rename; its `state.json` names the finished shards, from which an interrupted run goes on.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import heapq
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flaxpretrain.data.cleaning import Sentences, Step
from flaxpretrain.data.decontamination import TestSets, collect
from flaxpretrain.data.deduplication import (
    Duplicates,
    ExactDuplicates,
    MinHash,
    NearDuplicates,
    Prints,
    digest_of,
    prints_of,
)
from flaxpretrain.data.document import Losses
from flaxpretrain.data.encoding import CHUNK, Chunk, chunks, in_order
from flaxpretrain.data.shingles import word_hashes
from flaxpretrain.data.sources import Source
from flaxpretrain.data.store import partial_folder
from flaxpretrain.data.store_writer import flush_folder, remove_folder, write_json
from flaxpretrain.errors import UserError
from flaxpretrain.shapes import Numpy, UInt

REPORT_FILE = "cleaning.json"
STATE_FILE = "state.json"
TEXT_FOLDER = "text"
OVERLAP = "overlap with"
SAMPLES = 5
"""Examples of what each step did."""
EXCERPT = 240
"""Characters of an example."""


@dataclasses.dataclass(frozen=True)
class CleaningSettings:
    """What determines the cleaned corpus, beside the text and the test sets."""

    steps: tuple[Step, ...]
    """In their order; each sees what the one before left."""
    duplicates: bool = True
    """Whether documents go whose text, but for case and spaces, came before."""
    near: MinHash | None = MinHash()  # noqa: RUF009
    """How near duplicates are found; None leaves them."""
    overlap_words: int = 13
    """A document that shares a run of so many words with a test set is dropped."""
    limit: int | None = None
    """Documents to read; None reads all."""
    skip_broken: bool = False
    """Whether what cannot be read is left out and counted, where by default it is an error."""
    shard_bytes: int = 1 << 26
    """Bytes of text after which a new file begins."""


@dataclasses.dataclass
class Tally:
    """What a step did."""

    documents_dropped: int = 0
    documents_changed: int = 0
    sentences_dropped: int = 0
    characters_removed: int = 0

    def add(self, other: "Tally") -> None:
        """Adds the counts of another one."""
        for field in dataclasses.fields(self):
            total = getattr(self, field.name) + getattr(other, field.name)
            setattr(self, field.name, total)


Sample = tuple[int, str, str | None]
"""Digest of the document, text before, and after; None: the document was dropped."""


@dataclasses.dataclass
class Account:
    """Tallies and samples by step. Of all samples those of the smallest digests are kept."""

    tallies: dict[str, Tally] = dataclasses.field(default_factory=dict)
    samples: dict[str, list[Sample]] = dataclasses.field(default_factory=dict)

    def note(self, name: str, tally: Tally, sample: Sample | None = None) -> None:
        """Counts what a step did to a document."""
        self.tallies.setdefault(name, Tally()).add(tally)
        if sample is not None:
            self._merge(name, [sample])

    def add(self, other: "Account") -> None:
        """Adds another account."""
        for name, tally in other.tallies.items():
            self.note(name, tally)
        for name, samples in other.samples.items():
            self._merge(name, samples)

    def _merge(self, name: str, samples: Sequence[Sample]) -> None:
        both = {sample[0]: sample for sample in [*self.samples.get(name, ()), *samples]}
        self.samples[name] = [both[key] for key in heapq.nsmallest(SAMPLES, both)]


@dataclasses.dataclass(frozen=True)
class CleanedChunk:
    """Documents of a chunk that the steps left, and what the others went by."""

    chunk_end: int
    """Number of the document after the chunk."""
    bytes_read: int
    digests: UInt[Numpy, " D"]
    """Of all documents as they were read."""
    documents: list[Sentences]
    prints: Prints
    account: Account
    characters_read: int
    sentences_read: int


@dataclasses.dataclass(frozen=True)
class Cleaner:
    """What a process needs to clean chunks: a pure function of them."""

    steps: tuple[Step, ...]
    near: MinHash | None
    tests: TestSets | None
    done: int
    """Documents before this one are in finished shards: they are not cleaned again."""

    def __call__(self, chunk: Chunk) -> CleanedChunk:
        """Cleans the documents of a chunk, up to the comparison with one another."""
        digests = np.array([digest_of("\n".join(d)) for d in chunk.documents], np.uint64)
        end = chunk.first + len(chunk.documents)
        account = Account()
        kept: list[Sentences] = []
        words: list[np.ndarray] = []
        if end > self.done:
            for digest, sentences in zip(digests, chunk.documents, strict=True):
                cleaned = self._clean(sentences, int(digest), account)
                if cleaned is None:
                    continue
                numbers = word_hashes("\n".join(cleaned))
                if not self._overlaps(cleaned, numbers, int(digest), account):
                    kept.append(cleaned)
                    words.append(numbers)
        return CleanedChunk(
            end,
            chunk.bytes_read,
            digests,
            kept,
            prints_of(["\n".join(document) for document in kept], words, self.near),
            account,
            sum(sum(map(len, document)) for document in chunk.documents),
            sum(map(len, chunk.documents)),
        )

    def _clean(self, sentences: Sentences, digest: int, account: Account) -> Sentences | None:
        for step in self.steps:
            after = step(sentences)
            if after is None:
                account.note(step.name, dropped(sentences), (digest, excerpt(sentences), None))
                return None
            if after != sentences:
                sample = (digest, *_first_difference(sentences, after))
                account.note(step.name, _changed(sentences, after), sample)
            sentences = after
        return sentences

    def _overlaps(
        self, sentences: Sentences, words: np.ndarray, digest: int, account: Account
    ) -> bool:
        if self.tests is None:
            return False
        overlaps = self.tests.overlaps(words)
        if not overlaps.any():
            return False
        name = f"{OVERLAP} {self.tests.names[int(overlaps.argmax())]}"
        account.note(name, dropped(sentences), (digest, excerpt(sentences), None))
        return True


def dropped(sentences: Sentences) -> Tally:
    """The tally of a document that goes."""
    return Tally(1, 0, len(sentences), sum(map(len, sentences)))


def _changed(before: Sentences, after: Sentences) -> Tally:
    removed = sum(map(len, before)) - sum(map(len, after))
    return Tally(0, 1, len(before) - len(after), removed)


def excerpt(sentences: Sentences) -> str:
    """The beginning of a document."""
    text = " / ".join(sentences[:4])
    return text if len(text) <= EXCERPT else text[:EXCERPT] + "…"


def _first_difference(before: Sentences, after: Sentences) -> tuple[str, str]:
    """The first sentence that a step changed, and what it made of it: nothing, if it dropped it."""
    if len(before) == len(after):
        pairs = zip(before, after, strict=True)
    else:
        kept = set(after)
        pairs = ((sentence, "") for sentence in before if sentence not in kept)
    old, new = next(((a, b) for a, b in pairs if a != b), (before[0], after[0]))
    return excerpt((old,)), excerpt((new,))


def clean_corpus(
    sources: Sequence[Source],
    output: Path | str,
    settings: CleaningSettings,
    *,
    tests: Mapping[str, Source] | None = None,
    num_processes: int = 1,
    overwrite: bool = False,
    notify: Callable[[str], None] = lambda message: None,
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Writes `<output>/text/`, and returns the report, which is `<output>/cleaning.json` too.

    The files are of sentences, a blank line after each document, and the same for any number of
    processes. `tests` are named texts with which no document may share a run of words.

    Raises:
      UserError: the output is there, no text is left, a disk that is full or cannot be written,
        text that changed since the run was interrupted.
    """
    if num_processes < 1:
        raise UserError(f"--num-processes is 1 or more; got {num_processes}")
    output = Path(os.path.abspath(output))
    if output.exists() and not (overwrite and (output / REPORT_FILE).is_file()):
        what = "pass --overwrite to replace it" if (output / REPORT_FILE).is_file() else "no corpus"
        raise UserError(f"{output} is there ({what}), or give another --output-dir")
    found = collect(tests, settings.overlap_words, word_hashes) if tests else None
    for name, count in ({} if found is None else found.short).items():
        if count:
            notify(f"{name}: {count} documents are shorter than a run of words: not compared")
    try:
        partial = partial_folder(output)
        partial.mkdir(parents=True, exist_ok=True)
        with _locked(partial):
            return _Run(sources, output, settings, found, notify).clean(num_processes, progress)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}; it goes on later") from error


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[None]:
    with (partial / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing {partial}: wait for it or end it") from None
        yield


class _Run:
    """One run, from its partial folder to its corpus."""

    def __init__(
        self,
        sources: Sequence[Source],
        output: Path,
        settings: CleaningSettings,
        tests: TestSets | None,
        notify: Callable[[str], None],
    ) -> None:
        self.sources, self.output, self.settings, self.tests = sources, output, settings, tests
        self.notify = notify
        self.partial = partial_folder(output)
        self.folder = self.partial / "corpus"
        self.duplicates = Duplicates(settings.duplicates, settings.near)
        # All of them, in their order: a step that did nothing is told too.
        self.account = Account({name: Tally() for name in _names(settings, tests)})
        self.counts = dict.fromkeys(
            ("documents_read", "sentences_read", "characters_read", "documents", "sentences",
             "characters"), 0
        )  # fmt: skip
        self.shards: list[dict[str, Any]] = []
        self.done, self.mark = 0, ""
        self.read = hashlib.sha256()
        self.identity = json.loads(json.dumps(_identity(sources, settings, tests)))
        self.losses = [Losses(settings.skip_broken, notify) for _ in sources]
        self.held: list[str] = []
        self.held_bytes = 0
        self.held_prints: list[Prints] = []

    def clean(self, num_processes: int, progress: Callable[[int], None]) -> dict[str, Any]:
        """Reads, cleans, judges and writes everything."""
        self._resume()
        cleaner = Cleaner(self.settings.steps, self.settings.near, self.tests, self.done)
        read = chunks(self.sources, self.settings.limit, self.losses)
        checked = not self.done
        for cleaned in in_order(cleaner, read, num_processes):
            self.read.update(cleaned.digests.tobytes())
            progress(cleaned.bytes_read)
            if cleaned.chunk_end <= self.done:
                if cleaned.chunk_end == self.done:
                    checked = self.read.hexdigest() == self.mark
                continue
            if not checked:
                raise self._other_text()
            self._take(cleaned)
            if self.held_bytes >= self.settings.shard_bytes:
                self._write_shard(cleaned.chunk_end)
        if not checked:
            raise self._other_text()
        if self.held:
            self._write_shard(self.counts["documents_read"])
        if not self.counts["documents"]:
            raise UserError(
                "nothing is left of the corpus: see which steps drop what, and relax them"
            )
        return self._finish()

    def _take(self, cleaned: CleanedChunk) -> None:
        self.account.add(cleaned.account)
        self.counts["documents_read"] += len(cleaned.digests)
        self.counts["sentences_read"] += cleaned.sentences_read
        self.counts["characters_read"] += cleaned.characters_read
        verdicts = self.duplicates.judge(cleaned.prints)
        for number, (sentences, verdict) in enumerate(
            zip(cleaned.documents, verdicts, strict=True)
        ):
            if verdict is not None:
                digest = int(cleaned.prints.digests[number])
                self.account.note(verdict, dropped(sentences), (digest, excerpt(sentences), None))
                continue
            text = "\n".join(sentences) + "\n\n"
            self.held.append(text)
            self.held_bytes += len(text.encode())
            self.counts["documents"] += 1
            self.counts["sentences"] += len(sentences)
            self.counts["characters"] += sum(map(len, sentences))
        kept = np.array([verdict is None for verdict in verdicts], bool)
        self.held_prints.append(cleaned.prints[kept])

    def _write_shard(self, end: int) -> None:
        """Writes what is held, and notes that it is done."""
        name = f"clean-{len(self.shards):05d}"
        text = "".join(self.held).encode()
        path = self.folder / TEXT_FOLDER / f"{name}.txt"
        _write(path, text)
        prints: dict[str, Any] = {
            field.name: np.concatenate([getattr(part, field.name) for part in self.held_prints])
            for field in dataclasses.fields(Prints)
        }
        with (self.partial / f"{name}.npz").open("wb") as file:
            np.savez(file, **prints)
            os.fsync(file.fileno())
        flush_folder(path.parent)
        self.shards.append({"name": name, "bytes": len(text)})
        self.held, self.held_bytes, self.held_prints = [], 0, []
        state = {
            "identity": self.identity,
            "documents": end,
            "digest": self.read.hexdigest(),
            "counts": self.counts,
            "shards": self.shards,
            "tallies": {n: dataclasses.asdict(t) for n, t in self.account.tallies.items()},
            "samples": self.account.samples,
        }
        write_json(self.partial / STATE_FILE, state)

    def _resume(self) -> None:
        """Takes up the finished shards of an interrupted run of the same kind."""
        state = self._state()
        if state is None:
            remove_folder(self.folder)
            (self.folder / TEXT_FOLDER).mkdir(parents=True)
            return
        self.done, self.mark = state["documents"], state["digest"]
        self.counts, self.shards = state["counts"], state["shards"]
        self.account = Account(
            {name: Tally(**values) for name, values in state["tallies"].items()},
            {
                name: [(key, before, after) for key, before, after in samples]
                for name, samples in state["samples"].items()
            },
        )
        for shard in self.shards:
            with np.load(self.partial / f"{shard['name']}.npz") as arrays:
                self.duplicates.keep(Prints(**arrays))
        self.notify(f"going on with an interrupted run: {len(self.shards)} files are finished")

    def _state(self) -> dict[str, Any] | None:
        path = self.partial / STATE_FILE
        if not path.exists():
            return None
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            self.notify(f"starting anew: {path} is damaged")
            return None
        if state["identity"] != self.identity:
            self.notify("starting anew: the interrupted run had other settings or sources")
            return None
        for shard in state["shards"]:
            text = self.folder / TEXT_FOLDER / f"{shard['name']}.txt"
            prints = self.partial / f"{shard['name']}.npz"
            if not prints.is_file() or not text.is_file() or text.stat().st_size != shard["bytes"]:
                self.notify(f"starting anew: {text.name} of the interrupted run is damaged")
                return None
        return state

    def _finish(self) -> dict[str, Any]:
        report = {
            "sources": [source.name for source in self.sources],
            "settings": self.identity,
            **self.counts,
            "lost": [losses.counts() for losses in self.losses],
            "steps": {n: dataclasses.asdict(t) for n, t in self.account.tallies.items()},
            "samples": {
                name: [{"before": before, "after": after} for _, before, after in samples]
                for name, samples in self.account.samples.items()
            },
            "memory_of_duplicates_bytes": self.duplicates.bytes,
        }
        write_json(self.folder / REPORT_FILE, report)
        if self.output.exists():
            os.rename(self.output, self.partial / "replaced")
        os.rename(self.folder, self.output)
        flush_folder(self.output.parent)
        remove_folder(self.partial)
        return report

    def _other_text(self) -> UserError:
        return UserError(
            f"the text is not that of the interrupted run in {self.partial}: remove that folder to "
            "start anew"
        )


def _names(settings: CleaningSettings, tests: TestSets | None) -> list[str]:
    """What documents can be changed or dropped by."""
    names = [step.name for step in settings.steps]
    names += [] if tests is None else [f"{OVERLAP} {name}" for name in tests.names]
    names += [ExactDuplicates.name] if settings.duplicates else []
    return [*names, *([] if settings.near is None else [NearDuplicates.name])]


def _identity(
    sources: Sequence[Source], settings: CleaningSettings, tests: TestSets | None
) -> dict[str, Any]:
    """What must be the same for an interrupted run to go on."""
    return {
        "steps": [{"step": step.name, **dataclasses.asdict(step)} for step in settings.steps],
        "duplicates": settings.duplicates,
        "near": None if settings.near is None else dataclasses.asdict(settings.near),
        "rensa": importlib.metadata.version("rensa"),
        "overlap_words": settings.overlap_words,
        "tests": [] if tests is None else list(tests.names),
        "test_runs": None
        if tests is None
        else hashlib.sha256(tests.runs.tobytes() + tests.owners.tobytes()).hexdigest(),
        "limit": settings.limit,
        "skip_broken": settings.skip_broken,
        "chunk": CHUNK,
        "shard_bytes": settings.shard_bytes,
        "sources": [source.name for source in sources],
    }


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
