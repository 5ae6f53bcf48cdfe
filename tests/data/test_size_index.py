"""Items are found by size and number, and to index ten times as many takes no more memory."""

import tracemalloc

import numpy as np
import pytest

from flaxpretrain.data.encoder_decoder import Ends
from flaxpretrain.data.framing import framed_room
from flaxpretrain.data.full_sentences import FullSentences
from flaxpretrain.data.pairs import SourceTarget, SourceTargetPairs
from flaxpretrain.data.rows import Documents
from flaxpretrain.data.segments import ElectraSegments
from flaxpretrain.data.sentence_pairs import SentencePairs
from flaxpretrain.data.size_index import index_by_size
from flaxpretrain.data.store import open_dataset
from flaxpretrain.data.store_writer import SplitWriter, id_type, write_metadata
from tests.data.streams import VOCABULARY

FEW = 80_000
LAYOUTS = (
    Documents(),
    SentencePairs(),
    FullSentences(),
    ElectraSegments(),
    SourceTargetPairs(),
)


def test_items_of_a_size_keep_their_order():
    random = np.random.default_rng(0)
    sizes, records = random.integers(0, 9, 1000), random.integers(0, 99, (1000, 2))
    index = index_by_size(
        lambda: zip(np.array_split(sizes, 7), np.array_split(records, 7), strict=True), 12, 2
    )
    assert (
        len(index) == 1000 and index.histogram.tolist() == np.bincount(sizes, minlength=12).tolist()
    )
    for size in range(12):
        begin = index.first[size]
        found = index.records[begin : begin + index.histogram[size]]
        assert found.tolist() == records[sizes == size].tolist()


def split_of(folder, documents):
    """Documents of two lines each, in shards of 30,000 documents or so."""
    folder.mkdir()
    random = np.random.default_rng(0)
    writer = SplitWriter(folder, "train", id_type(VOCABULARY.size), shard_bytes=600_000)
    for _ in range(documents // FEW):
        lines = random.integers(1, 9, 2 * FEW)
        ids = random.integers(5, VOCABULARY.size, int(lines.sum()))
        pairs, one = lines.reshape(-1, 2), np.ones(FEW, np.int64)
        writer.append(ids, ids % 3 > 0, lines, pairs.sum(1), 2 * one, 0 * one, 0 * one)
    writer.close()
    splits = {"train": writer.entry()}
    write_metadata(folder, fingerprint="", vocabulary=VOCABULARY, splits=splits)
    return open_dataset(folder).split("train")


def planned(layout, split):
    """The plan of a layout that has drawn a batch, and the bytes that it held at most and holds."""
    tracemalloc.start()
    try:
        if isinstance(layout, SourceTargetPairs):
            framing = SourceTarget().framing(VOCABULARY, 64, None, Ends("cls", "sep", "cls"))
            plan = layout.fill(split, framing.room())
        else:
            plan = layout.fill(
                split, framed_room(64, 3 if isinstance(layout, SentencePairs) else 2)
            )
        index = np.linspace(0, plan.rows_per_epoch - 1, 64).astype(np.int64)
        plan.rows(0, index * 0, index)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return plan, held, peak


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("splits")
    return split_of(folder / "few", FEW), split_of(folder / "many", 10 * FEW)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: type(layout).__name__)
def test_ten_times_the_documents_take_no_more_memory(splits, layout):
    (few, _, peak_of_few), (many, held, peak) = (planned(layout, split) for split in splits)
    assert many.rows_per_epoch > 9 * few.rows_per_epoch
    assert len(splits[1].shards) > 8 * len(splits[0].shards)
    # Half of the few documents' last portion is empty.
    assert peak < 1.25 * peak_of_few
    # One array of one number a document would be 6.4 MB.
    assert held < 2**20
