"""What the inspection of batches counts and shows, on rows small enough to count by hand."""

import dataclasses

import numpy as np
import pytest

from flaxpretrain.analysis.inspection import (
    Kind,
    coloured_row,
    inspect,
    kinds_of,
    picture,
    report,
    run_lengths,
)
from flaxpretrain.errors import UserError
from tests import toys

# pad 0, unk 1, [CLS] 2, [SEP] 3, [MASK] 4
WORDS = dataclasses.replace(toys.VOCABULARY, sentinels=(299, 298))

# Two rows of eight:       [CLS] w   [M] [M]  w  rnd kept [SEP] | [CLS] unk [SEP], padding
IDS = np.array([[2, 10, 4, 4, 13, 99, 15, 3], [2, 1, 3, 0, 0, 0, 0, 0]], np.int32)
SEGMENTS = np.array([[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0, 0]], np.int32)
MASKED = {
    "input_ids": IDS,
    "segment_ids": SEGMENTS,
    "masked_positions": np.array([[2, 3, 5, 6], [0, 0, 0, 0]], np.int32),
    "masked_labels": np.array([[11, 12, 14, 15], [0, 0, 0, 0]], np.int32),
    "masked_weights": np.array([[1, 1, 1, 1], [0, 0, 0, 0]], np.float32),
}
# Reads `w <298+1> w </s>`, says `<299> a b <298> c </s>`.
DENOISED = {
    "input_ids": np.array([[10, 299, 13, 298, 3, 0]], np.int32),
    "segment_ids": np.array([[1, 1, 1, 1, 1, 0]], np.int32),
    "decoder_input_ids": np.array([[0, 299, 11, 12, 298, 14]], np.int32),
    "labels": np.array([[299, 11, 12, 298, 14, 3]], np.int32),
    "label_weights": np.ones((1, 6), np.float32),
}
CAUSAL = {
    "input_ids": np.array([[3, 10, 11, 12, 0, 0]], np.int32),
    "segment_ids": np.array([[1, 1, 1, 1, 0, 0]], np.int32),
    "labels": np.array([[10, 11, 12, 3, 0, 0]], np.int32),
    "label_weights": np.array([[1, 1, 1, 1, 0, 0]], np.float32),
}


def test_the_kinds_of_tokens():
    K = Kind
    kept_and_hidden = [
        [K.SPECIAL, K.TEXT, K.MASKED, K.MASKED, K.TEXT, K.RANDOM, K.KEPT, K.SPECIAL],
        [K.SPECIAL, K.SPECIAL, K.SPECIAL, *[K.PADDING] * 5],
    ]
    assert kinds_of(MASKED, WORDS).tolist() == kept_and_hidden
    sources = [[K.TEXT, K.MASKED, K.TEXT, K.MASKED, K.SPECIAL, K.PADDING]]
    assert kinds_of(DENOISED, WORDS).tolist() == sources


def test_runs_do_not_go_on_from_row_to_row():
    inside = np.array([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    assert run_lengths(inside).tolist() == [2, 1, 1]


def test_the_counts_of_a_masked_batch():
    found = inspect([MASKED, MASKED], WORDS)
    assert found.row_tokens.tolist() == [8, 3, 8, 3]
    assert found.piece_tokens.tolist() == [8, 3, 8, 3]
    assert found.padding_share == pytest.approx(5 / 16)
    assert found.runs == {2: 4}  # [MASK] [MASK], and the random one beside the kept one
    assert (found.unknown, found.text) == (2, 14)  # w w unk and four labels, twice
    assert found.kinds[Kind.MASKED] == 4 and found.kinds[Kind.PADDING] == 10
    assert found.predictions == 8


def test_the_counts_of_an_encoder_decoder_and_of_a_causal_batch():
    found = inspect([DENOISED], WORDS)
    assert found.runs == {1: 1, 2: 1}  # what the two sentinels stand for
    assert found.target_tokens.tolist() == [6] and found.row_tokens.tolist() == [5]
    assert found.padding_share == pytest.approx(1 / 12)
    found = inspect([CAUSAL], WORDS)
    assert found.runs == {} and found.predictions == 4 and found.target_length == 0


def test_pieces_of_a_packed_row_are_told_apart():
    packed = CAUSAL | {"segment_ids": np.array([[1, 2, 2, 2, 0, 0]], np.int32)}
    assert inspect([packed], WORDS).piece_tokens.tolist() == [1, 3]


def test_no_batches_are_refused():
    with pytest.raises(UserError, match="no batches"):
        inspect([], WORDS)


def test_the_report_tells_padding_unknown_tokens_and_masks():
    lines = report(inspect([MASKED], WORDS))
    text = "\n".join(lines)
    assert lines[0].startswith("2 rows of 8 tokens: 31.25% padding, 1.00 pieces a row, 2.0 predic")
    assert "unknown tokens: 1 of 7, 14.286%" in text
    assert "of these 50.0% masked, 25.0% random, 25.0% kept" in text
    assert "tokens hidden in one go (mean 2.00)" in text


def test_rows_are_shown_with_what_stood_there(tmp_path):
    backend = toys.tokenizer(tmp_path / "t").backend
    (line,) = coloured_row(MASKED, 0, WORDS, backend)
    shown = "[CLS] w10 [MASK]‹w11› [MASK]‹w12› w13 w99‹w14› w15‹=› [SEP]"
    assert line.plain == f"reads: {shown}"
    styles = {line.plain[span.start : span.end]: str(span.style) for span in line.spans}
    assert styles[" w99"] == "bold yellow" and styles["‹w14›"] == "green"
    (padded,) = coloured_row(MASKED, 1, WORDS, backend)
    assert padded.plain == "reads: [CLS] [UNK] [SEP] + 5 padding"
    source, target = coloured_row(DENOISED, 0, WORDS, backend)
    assert source.plain == "reads: w10 w299 w13 w298 [SEP] + 1 padding"
    assert target.plain == "says: w299 w11 w12 w298 w14 [SEP]"


@pytest.mark.parametrize("batch", [MASKED, DENOISED, CAUSAL], ids=["masked", "denoised", "causal"])
def test_a_picture_is_drawn_of_any_batch(batch, tmp_path):
    picture(inspect([batch], WORDS), tmp_path / "p.png", "title")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match="--picture .*missing/p.png cannot be written"):
        picture(inspect([MASKED], WORDS), tmp_path / "missing" / "p.png", "title")
