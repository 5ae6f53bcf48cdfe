"""The data path of configs/chinese_wwm_base.py on real text: jieba's words, BERT's vocabulary."""

import numpy as np
import pytest

from flaxpretrain.data import tokenizers
from flaxpretrain.data.building import BuildSettings, Provenance, build
from flaxpretrain.data.framing import MaskedFraming
from flaxpretrain.data.rows import Documents
from flaxpretrain.data.sources import text_files
from flaxpretrain.data.word_masking import WordMasking

pytestmark = pytest.mark.slow
ARTICLES = 60


@pytest.fixture(scope="module")
def source(test_data):
    pytest.importorskip("jieba")
    return text_files(test_data / "zh_wikipedia_2023_simplified" / "train.txt")


@pytest.fixture(scope="module")
def dataset(source, test_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zh") / "dataset"
    tokenizer = tokenizers.load(test_data / "vocab" / "bert-base-chinese" / "vocab.txt")
    settings = BuildSettings(limit=ARTICLES, words="jieba", validation_share=0.1)
    return build([source], tokenizer, folder, settings, Provenance(language="zh"), num_processes=1)


def sentences_of(split):
    """Ids and word starts of every sentence."""
    offsets = np.asarray(split.sentence_offsets, np.int64)
    lengths = np.diff(offsets)
    ids, starts = split.gather(offsets[:-1], lengths, int(lengths.max()))
    for row, opens, length in zip(ids, starts, lengths, strict=True):
        yield row[:length], opens[:length]


def test_words_are_those_of_jieba(dataset):
    import jieba

    backend = tokenizers.load(dataset.tokenizer_folder).backend
    compared = 0
    for ids, opens in sentences_of(dataset.split("train")):
        tokens = [backend.id_to_token(int(i)) for i in ids]
        # Where every token is a character of the text, its words can be read off.
        if not all(
            len(t) == 1 and ("\u4e00" <= t <= "\u9fff" or t in "，。、；：") for t in tokens
        ):
            continue
        words = list(jieba.cut("".join(tokens)))
        expected = np.zeros(len(ids), bool)
        expected[np.cumsum([0, *map(len, words[:-1])])] = True
        assert (opens == expected).all(), "".join(tokens)
        compared += 1
    assert compared > 100


def test_words_are_masked_whole(dataset):
    framing = MaskedFraming(
        vocabulary=dataset.vocabulary, length=128, masking=WordMasking(rate=0.15)
    )
    plan = Documents().fill(dataset.split("train"), framing.room())
    index = np.arange(min(64, plan.rows_per_epoch))
    rows = plan.rows(0, index * 0, index)
    keys = (index + 1).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    batch = framing.examples(rows, keys, 0)
    used = batch["masked_weights"] > 0
    masked = np.zeros(batch["input_ids"].shape, bool)
    masked[np.nonzero(used)[0], batch["masked_positions"][used]] = True
    several = whole = 0
    for row in index:
        ids, opens = rows["ids"][row], rows["word_starts"][row]
        pieces = rows["piece_lengths"][row]
        # Text and where it stands in the framed row: after [CLS], pieces apart by [SEP] [CLS].
        place = np.concatenate(
            [
                np.arange(size) + 1 + 2 * number + pieces[:number].sum()
                for number, size in enumerate(pieces[pieces > 0])
            ]
        )
        border = np.zeros(len(place), bool)
        border[np.cumsum(pieces[pieces > 0])[:-1]] = True
        word = np.cumsum(opens[: len(place)] | border)
        for number in np.unique(word[masked[row, place]]):
            inside = place[word == number]
            assert masked[row, inside].all(), ids[: len(place)][word == number]
            whole += 1
            several += len(inside) > 1
    assert whole > 300 and several / whole > 0.3
    share = masked.sum() / (batch["segment_ids"] > 0).sum()
    assert 0.12 < share <= 0.16
