"""Rows of google-research/electra: the same as a plain telling of its algorithm, token by token."""

import itertools
import pickle
import textwrap

import numpy as np
import pytest

from flaxpretrain.config import Phase
from flaxpretrain.data import offsets, tokenizers
from flaxpretrain.data.building import BuildSettings, build
from flaxpretrain.data.framing import MaskedFraming
from flaxpretrain.data.masking import BernoulliMasking, TokenMasking
from flaxpretrain.data.pipeline import Pipeline, evaluation_batches
from flaxpretrain.data.randomness import Stream, fold, integers, row_keys, uniform
from flaxpretrain.data.rows import Documents
from flaxpretrain.data.segments import ElectraSegments, SegmentPairs, recorded_layout
from flaxpretrain.data.sources import text_files
from flaxpretrain.data.store import open_dataset
from flaxpretrain.data.store_writer import write_dataset
from flaxpretrain.errors import UserError
from tests.data.streams import DIGITS, VOCABULARY, drawn, undrawn


def make_split(folder, documents, vocabulary=VOCABULARY, shard_bytes=1 << 26):
    """A split of documents, each a list of sentences of ids."""
    write_dataset(folder, vocabulary, {"train": documents}, shard_bytes=shard_bytes)
    return open_dataset(folder).split("train")


def random_documents(seed, count=60, longest_sentence=40):
    random = np.random.default_rng(seed)
    return [
        [
            random.integers(5, 500, random.integers(1, longest_sentence + 1)).tolist()
            for _ in range(random.integers(1, 40))
        ]
        for _ in range(count)
    ]


def draws(seed, document, number, length):
    """What one example draws: single, coin and short in [0, 1), and a short example's length."""
    key = fold(np.array([seed], np.uint64), np.array([document]))
    key = fold(key, number)
    single, coin, short = uniform(key, Stream.SEGMENTS, 3)[0]
    drawn = 5 + integers(key, Stream.SEGMENT_LENGTH, 1, length - 4)[0, 0]
    return single, coin, drawn if short < 0.05 else length


def plainly(documents, length, seed):
    """ExampleBuilder of the original, one sentence at a time: (A, B) of every example."""
    examples = []
    for document, sentences in enumerate(documents):
        number, held = 0, []

        def cut(held, number, document=document):
            single, coin, target = draws(seed, document, number, length)
            first_target = 100000 if single < 0.1 else (target - 3) // 2
            a, b = [], []
            for sentence in held:
                if (
                    len(a) == 0
                    or len(a) + len(sentence) < first_target
                    or (len(b) == 0 and len(a) < first_target and coin < 0.5)
                ):
                    a = a + sentence
                else:
                    b = b + sentence
            a = a[: length - 2]
            return a, b[: max(0, length - len(a) - 3)]

        for sentence in sentences:
            held.append(sentence)
            if sum(map(len, held)) >= draws(seed, document, number, length)[2]:
                examples.append(cut(held, number))
                number, held = number + 1, []
        if sum(map(len, held)):
            examples.append(cut(held, number))
    return examples


def rows_of(plan):
    index = np.arange(plan.rows_per_epoch)
    return plan.rows(0, np.zeros_like(index), index)


def pairs_of(plan):
    """(A, B) of every row."""
    rows = rows_of(plan)
    found = []
    for ids, piece, second in zip(
        rows["ids"], rows["piece_lengths"][:, 0], rows["second_lengths"], strict=True
    ):
        first = piece - second - (second > 0)
        if second:
            assert ids[first] == 0
        assert not ids[piece:].any()
        found.append((ids[:first].tolist(), ids[piece - second : piece].tolist()))
    return found


@pytest.mark.parametrize("length", [5, 6, 16, 64, 200])
@pytest.mark.parametrize("longest_sentence", [3, 40])
def test_rows_are_those_of_the_plain_algorithm(tmp_path, length, longest_sentence):
    documents = random_documents(length, longest_sentence=longest_sentence)
    split = make_split(tmp_path, documents, shard_bytes=700)
    plan = ElectraSegments(seed=7).plan(split, length, 2)
    expected = plainly(documents, length, seed=7)
    assert pairs_of(plan) == expected
    kept = sum(len(a) + len(b) for a, b in expected)
    two = sum(bool(b) for _, b in expected)
    assert plan.tokens_lost == split.tokens - kept and plan.rows_of_two == two
    assert plan.real_tokens_per_epoch == kept + 2 * len(expected) + two
    if length == 64:
        # What makes the algorithm awkward: segments that are no neighbours in the text.
        assert 0 < two < len(expected) and 0 < plan.tokens_lost and max(plan.most) > 1


def test_sentences_and_documents_without_tokens_leave_no_trace(tmp_path):
    documents = [[[], [5, 6], [], [7], []], [], [[]], [[8] * 9, [], []], [[], [9]]]
    split = make_split(tmp_path, documents)
    plan = ElectraSegments().plan(split, 8, 2)
    assert pairs_of(plan) == plainly(documents, 8, 0) and plan.rows_per_epoch == 3


def test_portions_of_a_large_corpus_make_no_difference(tmp_path, monkeypatch):
    documents = random_documents(3)
    split = make_split(tmp_path, documents)
    whole = pairs_of(ElectraSegments().plan(split, 32, 2))
    for size in (1, 7, 100):
        monkeypatch.setattr(offsets, "AT_ONCE", size)
        assert pairs_of(ElectraSegments().plan(split, 32, 2)) == whole


def test_every_epoch_has_the_same_examples_and_a_seed_makes_others(tmp_path):
    split = make_split(tmp_path, random_documents(0))
    plan = ElectraSegments().plan(split, 32, 2)
    index = np.arange(4)
    early, late = (plan.views(epoch, np.full(4, epoch), index) for epoch in (0, 9))
    assert all((a == b).all() for a, b in zip(early, late, strict=True))
    assert pairs_of(ElectraSegments(seed=1).plan(split, 32, 2)) != pairs_of(plan)


GOLDEN = """
<1234>567>...
0000001111000
<123>........
0000000000000
<12345678901>
0000000000000
<1>2>........
0001100000000
.............
0000000000000
"""


def test_golden_rows():
    """`<` is [CLS], `>` [SEP], `.` padding. Type 1 is the second segment with its [SEP]."""
    texts = [("1234", "567"), ("123", ""), ("12345678901", ""), ("1", "2"), ("", "")]
    ids = np.zeros((5, 11), np.int32)
    piece, second = np.zeros((5, 1), np.int32), np.zeros(5, np.int32)
    for row, (a, b) in enumerate(texts):
        ids[row, : len(a)] = undrawn(a)
        piece[row], second[row] = len(a), len(b)
        if b:
            ids[row, len(a) + 1 : len(a) + 1 + len(b)] = undrawn(b)
            piece[row] += 1 + len(b)
    kept = BernoulliMasking(rate=0.1, mask_share=0.0, random_share=0.0)
    inner = MaskedFraming(vocabulary=DIGITS, length=13, masking=kept)
    framing = ElectraSegments().framing(inner)
    rows = {"ids": ids, "piece_lengths": piece, "second_lengths": second}
    keys = row_keys(0, np.zeros(5, np.int64), np.arange(5))
    batch = framing.examples(rows, keys, 0)
    lines = [
        line
        for row in range(5)
        for line in (
            drawn(batch["input_ids"][row]),
            "".join(map(str, batch["token_type_ids"][row])),
        )
    ]
    assert "\n" + "\n".join(lines) + "\n" == GOLDEN
    assert (rows["ids"] == ids).all()


def framing_of(length):
    return MaskedFraming(vocabulary=VOCABULARY, length=length, masking=TokenMasking(rate=0.3))


def test_the_pipeline_gives_token_types_and_never_masks_the_separator(tmp_path):
    split = make_split(tmp_path, random_documents(1))
    phases = (Phase(length=32, batch_size=16, steps=4),)
    pipeline = Pipeline(split, ElectraSegments(), framing_of, phases, order_seed=0, noise_seed=0)
    for step in range(4):
        batch = pipeline.batch(step)
        spec = pipeline.spec(step)
        assert {n: (a.shape, a.dtype) for n, a in batch.items()} == dict(spec)
        ids, types, segment = (
            batch[name] for name in ("input_ids", "token_type_ids", "segment_ids")
        )
        two = types.any(1)
        separators = ids == VOCABULARY.sep
        assert (separators.sum(1) == 1 + two).all() and two.any() and not two.all()
        # One segment of attention; positions run on over both.
        assert set(np.unique(segment)) <= {0, 1} and not types[segment == 0].any()
        assert (batch["position_ids"] == np.arange(32) * segment).all()
        # The second segment begins after a [SEP] and ends with one.
        assert (separators[:, :-1] & (types[:, :-1] == 0) & (types[:, 1:] == 1)).sum() == two.sum()
        chosen = np.take_along_axis(separators, batch["masked_positions"], 1)
        assert not (chosen & (batch["masked_weights"] > 0)).any()


def test_evaluation_sees_every_row_once_and_fills_up_with_empty_ones(tmp_path):
    split = make_split(tmp_path, random_documents(2, count=9))
    rows = ElectraSegments().plan(split, 32, 2).rows_per_epoch
    batches = list(evaluation_batches(split, ElectraSegments(), framing_of(32), 8, 0))
    real = np.concatenate([batch["segment_ids"].any(1) for batch in batches])
    assert real.sum() == rows and rows % 8 and real[:rows].all()
    assert not batches[-1]["token_type_ids"][~batches[-1]["segment_ids"].any(1)].any()


def test_the_separator_ends_a_word(tmp_path):
    """What masks whole words must not take the ends of both segments for one."""
    split = make_split(tmp_path, random_documents(1))
    rows = rows_of(ElectraSegments().plan(split, 32, 2))
    pairs = np.flatnonzero(rows["second_lengths"])
    gap = rows["piece_lengths"][pairs, 0] - rows["second_lengths"][pairs] - 1
    assert rows["word_starts"][pairs, gap].all() and rows["word_starts"][pairs, gap + 1].all()


def test_the_framing_crosses_processes():
    framing = ElectraSegments().framing(framing_of(32))
    assert isinstance(framing, SegmentPairs) and not framing.reads_word_starts
    assert pickle.loads(pickle.dumps(framing)) == framing


def test_mistakes(tmp_path):
    split = make_split(tmp_path / "some", [[[5, 6]]])
    with pytest.raises(UserError, match="length 4 is too small for ElectraSegments: use 5 or more"):
        ElectraSegments().plan(split, 4, 2)
    with pytest.raises(UserError, match=r"have 1 special tokens a piece: choose another layout"):
        ElectraSegments().plan(split, 32, 1)
    with pytest.raises(UserError, match="is empty"):
        ElectraSegments().plan(make_split(tmp_path / "none", []), 32, 2)


def paragraphs(sentences):
    """Of 1, 3, 2, 4, 1, 3... sentences."""
    left = iter(sentences)
    for size in itertools.cycle((1, 3, 2, 4)):
        some = list(itertools.islice(left, size))
        if not some:
            return
        yield " ".join(some)


LAID_OUT = {
    "a sentence a line": lambda documents: "\n\n".join(map("\n".join, documents)),
    "a paragraph a line": lambda documents: "\n\n".join(
        "\n".join(paragraphs(document)) for document in documents
    ),
    "hard-wrapped, blank lines between paragraphs": lambda documents: "\n\n".join(
        "\n".join(textwrap.wrap(paragraph, 72))
        for document in documents
        for paragraph in paragraphs(document)
    ),
}
MEASURED = {
    "a sentence a line": (13.9, 3.1, 86.1),
    "a paragraph a line": (26.1, 2.0, 64.3),
    "hard-wrapped, blank lines between paragraphs": (1.4, 46.8, 44.2),
}
"""Per cent of tokens lost, of padding, and of rows of two segments: the original's ExampleBuilder
itself, run on this text at length 128."""


@pytest.mark.parametrize("laid_out", list(LAID_OUT))
def test_loss_and_padding_are_the_originals_and_ours_are_none(tmp_path, test_data, laid_out):
    """One text in three layouts. Another seed moves the figures by up to 0.3 of a per cent.

    On five novels the original loses 16.8 % and 45.3 % and pads 49.9 %: the shape is that of the
    text, the order is the same.
    """
    text = (test_data / "en_wikipedia_2018" / "train.txt").read_text(encoding="utf-8")
    documents = [document.splitlines() for document in text[:2_000_000].split("\n\n")]
    (tmp_path / "text.txt").write_text(LAID_OUT[laid_out](documents), encoding="utf-8")
    vocabulary = str(test_data / "vocab" / "bert-base-uncased" / "vocab.txt")
    settings = BuildSettings(validation_share=0, compat="electra")
    source = text_files(tmp_path / "text.txt")
    tokenizer = tokenizers.load(vocabulary, None, None)
    dataset = build([source], tokenizer, tmp_path / "data", settings)
    layout, split = recorded_layout(dataset), dataset.split("train")
    assert layout == ElectraSegments(seed=0)
    plan = layout.plan(split, 128, 2)
    found = (
        100 * plan.tokens_lost / split.tokens,
        100 * plan.padding_share,
        100 * plan.rows_of_two / plan.rows_per_epoch,
    )
    assert found == pytest.approx(MEASURED[laid_out], abs=1.5)
    ours = Documents().plan(split, 128, 2)
    assert ours.real_tokens_per_epoch == split.tokens + 2 * ours.items.histogram.sum()
    assert ours.padding_share < 0.03


def test_nothing_is_recorded_unless_asked_for(tmp_path):
    make_split(tmp_path, [[[5]]])
    assert recorded_layout(open_dataset(tmp_path)) is None
    with pytest.raises(UserError, match="compat is electra, or None; got 'bert'"):
        BuildSettings(compat="bert")
