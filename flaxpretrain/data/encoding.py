"""From documents to token arrays: chunks of text encoded by one process or several, in order.

Which process encodes a chunk, and where chunks are cut, leaves no trace in what comes out.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import numpy as np

from flaxpretrain.data.randomness import fold
from flaxpretrain.data.sources import Document, Losses, Source
from flaxpretrain.data.tokenizers import Tokenizer
from flaxpretrain.data.word_starts import segmenter
from flaxpretrain.errors import UserError
from flaxpretrain.shapes import Bool, Int, Numpy, UInt

TRAIN = "train"
VALIDATION = "validation"

CHUNK = 1 << 18
"""Characters encoded at once, roughly: large enough to hide the way to another process."""

AHEAD = 3
"""Chunks in flight for each process."""


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Consecutive documents of one source."""

    source: int
    first: int
    """Number of the first document, counted over all sources."""
    documents: list[tuple[str, ...]]
    bytes_read: int
    """What was read of the source for these documents, as `Source.documents` tells it."""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Documents of one split, as `SplitWriter.append` takes them; none is without tokens."""

    numbers: Int[Numpy, " D"]
    """Numbers of the documents, over all sources."""
    ids: UInt[Numpy, " T"]
    word_starts: Bool[Numpy, " T"]
    sentence_lengths: Int[Numpy, " S"]
    document_lengths: Int[Numpy, " D"]
    document_sentences: Int[Numpy, " D"]
    document_bytes: Int[Numpy, " D"]
    document_unknown: Int[Numpy, " D"]


@dataclasses.dataclass(frozen=True)
class EncodedChunk:
    """What became of a chunk; digests and sizes are of all its documents, kept or not."""

    source: int
    first: int
    bytes_read: int
    digests: UInt[Numpy, " D"]
    text_bytes: int
    splits: dict[str, Encoded]


@dataclasses.dataclass(frozen=True)
class Encoder:
    """What a process needs to encode chunks.

    A document goes to the validation split by its content and the seed alone, so that equal
    documents stay together and neither files nor processes matter. `done` are the numbers of
    documents that are in the finished shards of each split already. `words` names the segmenter
    that finds words where the script has no spaces; None leaves it to the tokenizer. `held_out`
    names the split that all documents of a source go to, by the source's number.
    """

    tokenizer: Tokenizer
    dtype: np.dtype
    validation_share: float
    seed: int
    done: dict[str, int]
    words: str | None = None
    held_out: Mapping[int, str] = dataclasses.field(default_factory=dict)

    def encode(self, chunk: Chunk) -> EncodedChunk:
        """Encodes the documents of a chunk that are not done."""
        texts = ["\n".join(sentences).encode() for sentences in chunk.documents]
        joined = b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in texts)
        digests = np.frombuffer(joined, "<u8")
        # In units of 2**-53: exact in float64.
        draws = (fold(digests, self.seed) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        whole = self.held_out.get(chunk.source)
        if whole is None:
            validates = draws < self.validation_share
            shares = [(TRAIN, ~validates), (VALIDATION, validates)]
        else:
            shares = [(whole, np.ones(len(texts), bool))]
        numbers = chunk.first + np.arange(len(texts))
        sizes = np.array([len(text) for text in texts], np.int64)
        splits = {}
        for split, chosen in shares:
            wanted = np.flatnonzero(chosen & (numbers >= self.done.get(split, 0)))
            if len(wanted):
                documents = [chunk.documents[i] for i in wanted]
                splits[split] = self._encode(documents, numbers[wanted], sizes[wanted])
        return EncodedChunk(
            chunk.source, chunk.first, chunk.bytes_read, digests, int(sizes.sum()), splits
        )

    def _encode(
        self, documents: Sequence[tuple[str, ...]], numbers: np.ndarray, sizes: np.ndarray
    ) -> Encoded:
        sentences = list(itertools.chain.from_iterable(documents))
        ids, all_lengths = self.tokenizer.encode_sentences(sentences)
        counts = np.fromiter(map(len, documents), np.int64, len(documents))
        document_of_sentence = np.repeat(np.arange(len(documents)), counts)

        # A sentence of control characters only may have no token; then it is none.
        kept = all_lengths > 0
        lengths, document_of_sentence = all_lengths[kept], document_of_sentence[kept]
        word_starts = self.tokenizer.word_rule(ids)
        if self.words is not None:
            offsets = self.tokenizer.token_offsets(sentences)
            word_starts = _segmenter(self.words).mark(sentences, offsets, all_lengths, word_starts)
        word_starts[np.cumsum(lengths) - lengths] = True
        document_of_token = np.repeat(document_of_sentence, lengths)
        unk = self.tokenizer.vocabulary.unk
        unknown = document_of_token[ids == (-1 if unk is None else unk)]

        def count(documents_of: np.ndarray) -> np.ndarray:
            return np.bincount(documents_of, minlength=len(documents))

        tokens = count(document_of_token)
        some = tokens > 0
        return Encoded(
            numbers[some],
            ids.astype(self.dtype),
            word_starts,
            lengths,
            tokens[some],
            count(document_of_sentence)[some],
            sizes[some],
            count(unknown)[some],
        )


# One a process: loading its dictionary takes a second.
_segmenter = functools.cache(segmenter)


def chunks(
    sources: Sequence[Source],
    limit: int | None,
    losses: Sequence[Losses] | None = None,
    unlimited: int = 0,
) -> Iterator[Chunk]:
    """The documents of all sources, `limit` of them at most, in chunks of one source each.

    `losses`, one a source, count what reading leaves out; without them nothing may be broken. The
    last `unlimited` sources are read whole.
    """
    first = 0
    for number, source in enumerate(sources):
        read = 0

        def progress(count: int) -> None:
            nonlocal read
            read += count

        def chunk(held: list[tuple[str, ...]], number: int = number) -> Chunk:
            nonlocal read, first
            made = Chunk(number, first, held, read)
            first, read = first + len(held), 0
            return made

        left = limit - first if limit is not None and number < len(sources) - unlimited else None
        held: list[tuple[str, ...]] = []
        size = 0
        documents: Iterable[Document] = source.documents(
            progress, None if losses is None else losses[number]
        )
        for document in itertools.islice(documents, left):
            held.append(document.sentences)
            size += sum(map(len, document.sentences))
            if size >= CHUNK:
                yield chunk(held)
                held, size = [], 0
        if held or read:
            yield chunk(held)


def encode_chunks(
    encoder: Encoder, chunks: Iterator[Chunk], num_processes: int
) -> Iterator[EncodedChunk]:
    """Encodes chunks in `num_processes` processes (1: in this one) and gives them in order."""
    return in_order(encoder.encode, chunks, num_processes)


Result = TypeVar("Result")


def in_order(
    work: Callable[[Chunk], Result], chunks: Iterator[Chunk], num_processes: int
) -> Iterator[Result]:
    """Works on chunks in `num_processes` processes (1: in this one) and gives results in order.

    Only some chunks a process are held at a time, however large the corpus is.

    Raises:
      UserError: a process was killed.
    """
    if num_processes == 1:
        yield from map(work, chunks)
        return
    # Not fork: threads of jax, of the tokenizers or of a notebook would be copied locked.
    pool = concurrent.futures.ProcessPoolExecutor(
        num_processes, multiprocessing.get_context("spawn"), _start_worker, (work,)
    )
    try:
        pending: collections.deque[concurrent.futures.Future] = collections.deque()
        for chunk in chunks:
            pending.append(pool.submit(_work, chunk))
            if len(pending) >= AHEAD * num_processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a process was killed, perhaps for want of memory: run the command again, "
            "it goes on where it stopped; give a smaller --num-processes if it happens again"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker: Callable[[Chunk], Any] | None = None


def _start_worker(work: Callable[[Chunk], Any]) -> None:
    global _worker
    _worker = work
    # One thread each: the processes are the parallelism.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Control-C is the parent's affair, which then ends the pool.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    """Ends this process with its parent: a killed builder leaves no workers behind."""
    parent.join()
    os._exit(1)


def _work(chunk: Chunk) -> Any:
    if _worker is None:
        raise RuntimeError("this process was not started as a worker")
    return _worker(chunk)
