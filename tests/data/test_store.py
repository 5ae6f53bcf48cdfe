"""The token store gives back exactly the stream that was written, from any number of shards."""

import json
import pickle

import numpy as np
import pytest

from flaxpretrain.data.store import open_dataset, partial_folder
from flaxpretrain.data.store_writer import id_type, write_dataset
from flaxpretrain.data.vocabulary import Vocabulary
from flaxpretrain.errors import UserError

VOCABULARY = Vocabulary(size=300, pad=0, unk=1, cls=2, sep=3, mask=4)
OPENS = np.arange(300) % 3 != 0


def make_documents(count=40, seed=0):
    random = np.random.default_rng(seed)
    return [
        [
            random.integers(5, 300, random.integers(1, 9)).tolist()
            for _ in range(random.integers(1, 6))
        ]
        for _ in range(count)
    ]


def flat(documents):
    return np.array([i for document in documents for sentence in document for i in sentence])


@pytest.fixture(params=[1 << 20, 100, 1], ids=["one shard", "some shards", "a shard a document"])
def stored(request, tmp_path):
    documents = make_documents()
    write_dataset(
        tmp_path / "data",
        VOCABULARY,
        {"train": documents, "validation": make_documents(3, seed=1)},
        word_starts=OPENS,
        shard_bytes=request.param,
    )
    return open_dataset(tmp_path / "data"), documents


def test_counts_and_offsets_are_those_of_the_documents(stored):
    dataset, documents = stored
    split = dataset.split("train")
    document_lengths = [sum(map(len, document)) for document in documents]
    sentence_lengths = [len(sentence) for document in documents for sentence in document]
    assert (split.documents, split.sentences) == (len(documents), len(sentence_lengths))
    assert split.tokens == sum(document_lengths)
    documents, sentences = split.document_offsets[:], split.sentence_offsets[:]
    assert documents.tolist() == [0, *np.cumsum(document_lengths)]
    assert sentences.tolist() == [0, *np.cumsum(sentence_lengths)]
    assert documents.dtype == sentences.dtype == np.int64
    assert set(documents) <= set(sentences)


def test_the_whole_stream_comes_back(stored):
    dataset, documents = stored
    split = dataset.split("train")
    ids, word_starts = split.gather(np.array([0]), np.array([split.tokens]), split.tokens)
    np.testing.assert_array_equal(ids[0], flat(documents))
    expected = OPENS[flat(documents)].copy()
    expected[split.sentence_offsets[:-1]] = True
    np.testing.assert_array_equal(word_starts[0], expected)
    assert ids.dtype == np.int32 and word_starts.dtype == bool


@pytest.mark.parametrize("width", [1, 7, 8, 9, 64])
def test_views_of_every_kind_equal_slices_of_the_stream(stored, width):
    dataset, documents = stored
    split = dataset.split("train")
    stream = flat(documents)
    opens = OPENS[stream].copy()
    opens[split.sentence_offsets[:-1]] = True
    random = np.random.default_rng(width)
    starts = random.integers(0, split.tokens + 1, 200)
    starts[:2] = split.tokens, split.tokens - 1
    lengths = np.minimum(random.integers(0, width + 1, 200), split.tokens - starts)
    ids, word_starts = split.gather(starts, lengths, width)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        np.testing.assert_array_equal(ids[row, :length], stream[start : start + length])
        np.testing.assert_array_equal(word_starts[row, :length], opens[start : start + length])
        assert not ids[row, length:].any() and not word_starts[row, length:].any()


def test_shards_end_at_document_ends(stored):
    dataset, _ = stored
    split = dataset.split("train")
    assert {shard.stop for shard in split.shards} <= set(split.document_offsets[:].tolist())


def test_a_view_outside_the_stream_is_an_error(stored):
    split = stored[0].split("train")
    with pytest.raises(IndexError, match="train"):
        split.gather(np.array([split.tokens - 1]), np.array([2]), 4)
    with pytest.raises(IndexError, match="width of 4"):
        split.gather(np.array([0]), np.array([5]), 4)


def test_no_rows_and_no_documents(tmp_path):
    write_dataset(tmp_path, VOCABULARY, {"train": make_documents(2), "validation": []})
    dataset = open_dataset(tmp_path)
    nothing = np.zeros(0, np.int64)
    assert dataset.split("train").gather(nothing, nothing, 5)[0].shape == (0, 5)
    empty = dataset.split("validation")
    assert empty.tokens == 0
    assert empty.document_offsets.tolist() == [0]
    assert empty.gather(np.array([0]), np.array([0]), 3)[0].tolist() == [[0, 0, 0]]


def test_ids_take_two_bytes_up_to_65536_and_four_above(tmp_path):
    assert id_type(1 << 16).itemsize == 2
    large = Vocabulary(size=(1 << 16) + 1)
    write_dataset(tmp_path, large, {"train": [[[65536, 3]]]})
    ids, _ = open_dataset(tmp_path).split("train").gather(np.array([0]), np.array([2]), 2)
    assert ids.tolist() == [[65536, 3]]


def test_a_missing_split_is_named_with_those_there_are(stored):
    with pytest.raises(UserError, match="'test'.*train, validation"):
        stored[0].split("test")


def test_an_untouched_dataset_verifies(stored):
    stored[0].verify()


@pytest.mark.parametrize("part", ["ids", "words", "sentences", "documents"])
def test_a_changed_byte_is_found_and_its_file_named(stored, part):
    dataset, _ = stored
    path = dataset.folder / f"train-00000.{part}"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"train-00000.{part} is damaged"):
        open_dataset(dataset.folder).verify()


def test_a_missing_or_cut_shard_is_named(stored):
    folder = stored[0].folder
    path = folder / "train-00000.ids"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"train-00000.ids is damaged: it has \d+ bytes instead"):
        open_dataset(folder)
    path.unlink()
    with pytest.raises(UserError, match="train-00000.ids is missing"):
        open_dataset(folder)


def test_what_is_no_dataset_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="data is no dataset: there is no such folder; build one"):
        open_dataset(tmp_path / "data")
    with pytest.raises(UserError, match="holds no dataset.json"):
        open_dataset(tmp_path)
    partial_folder(tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="unfinished"):
        open_dataset(tmp_path / "data")


def test_another_format_and_broken_metadata_are_refused(stored):
    path = stored[0].folder / "dataset.json"
    metadata = json.loads(path.read_text())
    path.write_text(json.dumps({**metadata, "format": 2}))
    with pytest.raises(UserError, match="format 2"):
        open_dataset(path.parent)
    path.write_text(path.read_text()[:50])
    with pytest.raises(UserError, match="dataset.json is damaged"):
        open_dataset(path.parent)


def test_the_vocabulary_comes_with_the_dataset(stored):
    assert stored[0].vocabulary == VOCABULARY
    assert pickle.loads(pickle.dumps(stored[0].vocabulary)) == VOCABULARY
