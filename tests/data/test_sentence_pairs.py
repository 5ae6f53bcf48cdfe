"""Pairs for next-sentence and sentence-order prediction, packed, with a label for each."""

import numpy as np
import pytest

from flaxpretrain.config import Phase
from flaxpretrain.data.framing import MaskedFraming
from flaxpretrain.data.masking import TokenMasking
from flaxpretrain.data.pipeline import Pipeline, Share, evaluation_batches
from flaxpretrain.data.randomness import Stream, bits, fold, integers, row_keys, uniform, words
from flaxpretrain.data.rows import epoch_keys
from flaxpretrain.data.sentence_pairs import PairedFraming, SentencePairs
from flaxpretrain.data.store import open_dataset
from flaxpretrain.data.store_writer import write_dataset
from flaxpretrain.data.vocabulary import Vocabulary
from flaxpretrain.errors import UserError
from tests.data.streams import DIGITS, drawn, undrawn

VOCABULARY = Vocabulary(size=9000, pad=0, unk=1, cls=2, sep=3, mask=4)
BERT = SentencePairs()
ALBERT = SentencePairs(negatives="swapped")
CHINESE = SentencePairs(negatives="swapped", lone="alone", short_share=0.0)
EVERY = pytest.mark.parametrize("layout", [BERT, ALBERT, CHINESE], ids=["bert", "albert", "zh"])


def documents_of(seed=0, count=12, longest=20, most=14):
    """Documents of sentences of tokens, each token another one."""
    random = np.random.default_rng(seed)
    fresh = iter(range(5, VOCABULARY.size))
    return [
        [
            [next(fresh) for _ in range(random.integers(1, longest))]
            for _ in range(random.integers(1, most))
        ]
        for _ in range(count)
    ]


def split_of(folder, documents):
    write_dataset(folder, VOCABULARY, {"train": documents}, shard_bytes=300)
    return open_dataset(folder).split("train")


def plan_of(layout, split, length):
    framing = MaskedFraming(vocabulary=VOCABULARY, length=length, masking=TokenMasking())
    return layout.fill(split, layout.framing(framing).room())


def pairs_of(plan, epoch, seed=3):
    """(A, B, label) of all rows of an epoch, and how many pairs each row has."""
    index = np.arange(plan.rows_per_epoch)
    rows = plan.rows(seed, np.full_like(index, epoch), index)
    pairs = []
    for ids, pieces, second, labels in zip(
        rows["ids"], rows["piece_lengths"], rows["second_lengths"], rows["pair_labels"], strict=True
    ):
        begin = 0
        for piece, b, label in zip(pieces, second, labels, strict=True):
            text = ids[begin : begin + piece].tolist()
            begin += piece
            if piece:
                pairs.append((text[: piece - b - (b > 0)], text[piece - b :] if b else [], label))
        assert not ids[begin:].any()
    return pairs, np.count_nonzero(rows["piece_lengths"], axis=1)


def plain_texts(layout, documents, capacity):
    """(document, first sentence, sentences, size) as google-research/bert cuts documents."""
    texts = []
    for number, sentences in enumerate(documents):
        key = fold(np.array([layout.seed], np.uint64), np.array([number]))
        target = capacity
        if uniform(key, Stream.SEGMENTS, 1)[0, 0] < layout.short_share:
            target = 2 + int(integers(key, Stream.SEGMENT_LENGTH, 1, capacity - 1)[0, 0])
        held = []
        for ordinal, sentence in enumerate(sentences):
            held.append(sentence)
            total = sum(map(len, held))
            if total >= target or ordinal == len(sentences) - 1:
                size = min(total, capacity)
                if layout.lone == "random" and len(held) == 1:
                    size = target if total < target else capacity
                texts.append((number, ordinal + 1 - len(held), held, size))
                held = []
    return sorted(texts, key=lambda text: text[3])


def plain_pair(layout, documents, text, number, epoch, seed):
    """A, B and label of a text in one epoch."""
    document, first, sentences, size = text
    key = fold(epoch_keys(seed, np.array([epoch]), Stream.PAIRS), np.array([number]))
    draws = (words(key, Stream.PAIRS, 7)[0] / 2.0**32).tolist()
    end = 1 if len(sentences) == 1 else 1 + int(draws[0] * (len(sentences) - 1))
    a = [token for sentence in sentences[:end] for token in sentence]
    b = [token for sentence in sentences[end:] for token in sentence]
    label = 0
    if len(sentences) == 1 and layout.lone == "alone":
        pass
    elif len(sentences) == 1 or (layout.negatives == "random" and draws[1] < 0.5):
        others = [i for i in range(len(documents)) if i != document]
        candidates = [documents[others[int(draw * len(others))]] for draw in draws[3:]]
        wanted, label = max(size - len(a), 1), 1
        other = max(candidates, key=lambda one: min(sum(map(len, one)), wanted))
        remaining = [sum(map(len, other[begin:])) for begin in range(len(other))]
        enough = max(1, sum(left >= wanted for left in remaining))
        b = []
        for sentence in other[int(draws[2] * enough) :]:
            b = b + sentence
            if len(b) >= wanted:
                break
    elif layout.negatives == "swapped" and draws[1] < 0.5:
        a, b, label = b, a, 1
    cut = {"a": 0, "b": 0}
    while len(a) - cut["a"] + len(b) - cut["b"] > size:
        cut["a" if len(a) - cut["a"] > len(b) - cut["b"] else "b"] += 1
    for name, stream in (("a", Stream.PAIR_CUT_A), ("b", Stream.PAIR_CUT_B)):
        coins = "".join(f"{word:064b}" for word in bits(key, stream, 4)[0].tolist())
        # Of the n-th 64 coins the first ones.
        front = sum(
            coins[64 * n :][: min(64, cut[name] - 64 * n)].count("1")
            for n in range(-(-cut[name] // 64))
        )
        kept = {"a": a, "b": b}[name][front:]
        kept = kept[: len(kept) - (cut[name] - front)]
        a, b = (kept, b) if name == "a" else (a, kept)
    return a, b, label


@EVERY
@pytest.mark.parametrize("length", [5, 16, 48, 200])
@pytest.mark.parametrize("epoch", [0, 1])
def test_pairs_are_those_of_the_plain_algorithm(layout, length, epoch, tmp_path):
    documents = documents_of(length, longest=90 if length == 48 else 20)
    plan = plan_of(layout, split_of(tmp_path, documents), length)
    texts = plain_texts(layout, documents, length - 3)
    wanted = [
        plain_pair(layout, documents, text, number, epoch, 3) for number, text in enumerate(texts)
    ]
    found, counts = pairs_of(plan, epoch)
    assert sorted(found) == sorted(wanted)
    assert counts.min() > 0 and counts.max() <= layout.most
    tokens = sum(len(a) + len(b) + 2 + (len(b) > 0) for a, b, _ in found)
    assert all(len(a) + len(b) <= length - 3 for a, b, _ in found)
    exact = layout == CHINESE
    assert plan.real_tokens_per_epoch == pytest.approx(tokens, rel=0.0 if exact else 0.15)


def test_half_of_the_pairs_are_negative_and_epochs_differ(tmp_path):
    split = split_of(tmp_path, documents_of(count=40, most=20))
    for layout in (BERT, ALBERT, CHINESE):
        plan = plan_of(layout, split, 40)
        epochs = [pairs_of(plan, epoch)[0] for epoch in range(12)]
        labels = [label for pairs in epochs for a, b, label in pairs if b]
        lone = layout.lone == "random"
        assert np.mean(labels) == pytest.approx(0.5, abs=0.12 if lone else 0.04)
        swaps = layout.negatives == "swapped"
        labels_of = [
            {min(a[0], b[0]) if swaps else a[0]: label for a, b, label in pairs if b}
            for pairs in epochs[:2]
        ]
        both = labels_of[0].keys() & labels_of[1].keys()
        assert len(both) > 20 and any(labels_of[0][k] != labels_of[1][k] for k in both)


def test_sentence_order_loses_no_text_that_fits(tmp_path):
    documents = documents_of(longest=4)
    split = split_of(tmp_path, documents)
    found, _ = pairs_of(plan_of(CHINESE, split, 400), epoch=0)
    assert sum(len(a) + len(b) for a, b, _ in found) == split.tokens


def test_packing_leaves_little_padding_and_keeps_to_the_number_of_pairs(tmp_path):
    split = split_of(tmp_path, documents_of(count=30, most=30))
    alone, packed = (
        plan_of(SentencePairs(negatives="swapped", lone="alone", most=n), split, 96) for n in (1, 8)
    )
    assert packed.rows_per_epoch < alone.rows_per_epoch
    assert packed.padding_share < alone.padding_share
    assert max(pairs_of(alone, 0)[1]) == 1


def test_a_random_text_is_as_long_as_its_row_has_room_for(tmp_path):
    """Wherever one of four documents is: ends of documents would leave rows unfilled."""
    split = split_of(tmp_path, documents_of(count=30, longest=9, most=60))
    for layout in (BERT, ALBERT):
        plan = plan_of(layout, split, 64)
        padding = [
            1
            - sum(len(a) + len(b) + 2 + (len(b) > 0) for a, b, _ in pairs_of(plan, epoch)[0])
            / (64 * plan.rows_per_epoch)
            for epoch in range(4)
        ]
        assert max(padding) < 0.03
        assert plan.padding_share == pytest.approx(padding[0], abs=0.01)


def framed(texts, seconds, length=20, most=3):
    """Rows of digits, the middle [SEP] drawn as a space: "12 34" is a pair, "|" divides pairs."""
    pieces = [text.split("|") for text in texts]
    ids = np.zeros((len(texts), length), np.int32)
    lengths, second, labels = np.zeros((3, len(texts), 2), np.int32)
    for row, parts in enumerate(pieces):
        joined = undrawn("".join(parts).replace(" ", "0"))
        ids[row, : len(joined)] = joined
        for slot, part in enumerate(parts):
            lengths[row, slot] = len(part)
            second[row, slot] = len(part.partition(" ")[2])
            labels[row, slot] = seconds[row][slot]
    inner = MaskedFraming(vocabulary=DIGITS, length=length, masking=TokenMasking(max_predictions=1))
    framing = PairedFraming(vocabulary=DIGITS, length=length, inner=inner, most=most)
    rows = {
        "ids": ids,
        "word_starts": np.ones(ids.shape, bool),
        "piece_lengths": lengths,
        "second_lengths": second,
        "pair_labels": labels,
    }
    keys = row_keys(0, np.zeros(len(texts), np.int64), np.arange(len(texts)))
    batch = framing.examples(rows, keys, 0)
    for name, (shape, dtype) in framing.spec(len(texts)).items():
        assert batch[name].shape == shape and batch[name].dtype == dtype, name
    restored = batch["input_ids"].copy()
    for row, slot in zip(*np.nonzero(batch["masked_weights"]), strict=True):
        restored[row, batch["masked_positions"][row, slot]] = batch["masked_labels"][row, slot]
    return restored, batch


def test_golden_rows_of_pairs():
    ids, batch = framed(["123 45|6 789", "1234", "12 3"], [[1, 0], [0, 0], [0, 0]])
    lines = [
        line
        for row in range(3)
        for line in (
            drawn(ids[row]),
            "".join(map(str, batch["segment_ids"][row])),
            "".join(map(str, batch["token_type_ids"][row])),
        )
    ]
    assert lines == [
        "<123>45><6>789>.....",
        "11111111222222200000",
        "00000111000111100000",
        "<1234>..............",
        "11111100000000000000",
        "00000000000000000000",
        "<12>3>..............",
        "11111100000000000000",
        "00001100000000000000",
    ]
    assert batch["pair_positions"].tolist() == [[0, 8, 0], [0, 0, 0], [0, 0, 0]]
    assert batch["pair_labels"].tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert batch["pair_weights"].tolist() == [[1, 1, 0], [0, 0, 0], [1, 0, 0]]


@EVERY
def test_batches_are_the_same_on_any_number_of_hosts_and_in_evaluation(layout, tmp_path):
    split = split_of(tmp_path, documents_of())

    def framing(length):
        return MaskedFraming(vocabulary=VOCABULARY, length=length, masking=TokenMasking())

    phases = (Phase(steps=4, length=32, batch_size=8),)
    pipeline = Pipeline(split, layout, framing, phases, order_seed=1, noise_seed=2)
    whole = pipeline.batch(2)
    parts = [pipeline.batch(2, Share(host, 2)) for host in range(2)]
    for name, array in whole.items():
        np.testing.assert_array_equal(array, np.concatenate([part[name] for part in parts]))
    # [CLS] stands where the labels say.
    row, slot = np.nonzero(whole["pair_weights"])
    at = whole["pair_positions"][row, slot]
    assert (whole["input_ids"][row, at] == VOCABULARY.cls).all()
    assert (whole["position_ids"][row, at] == 0).all()
    sums = [
        sum(
            float(b["pair_weights"].sum())
            for b in evaluation_batches(split, layout, framing(32), n, 5)
        )
        for n in (3, 7)
    ]
    assert sums[0] == sums[1] > 0


def test_what_cannot_be_paired_is_said(tmp_path):
    split = split_of(tmp_path, documents_of(count=1))
    with pytest.raises(UserError, match="has one document, and SentencePairs takes random texts"):
        plan_of(BERT, split, 32)
    assert plan_of(CHINESE, split, 32).rows_per_epoch > 0
    with pytest.raises(UserError, match="length 4 is too small for SentencePairs"):
        plan_of(CHINESE, split, 4)
    with pytest.raises(UserError, match="data.layout.negatives must be random or swapped"):
        SentencePairs(negatives="next")
    with pytest.raises(UserError, match="data.layout.short_share must be in"):
        SentencePairs(short_share=2.0)
