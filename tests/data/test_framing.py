"""Framing: special tokens, segments and positions of packed rows, and the masked batch."""

import pickle
import subprocess
import sys

import numpy as np
import pytest

from flaxpretrain.data.framing import MaskedFraming, frame_pieces
from flaxpretrain.data.masking import BernoulliMasking, TokenMasking
from flaxpretrain.data.randomness import row_keys
from flaxpretrain.data.vocabulary import Vocabulary
from flaxpretrain.errors import UserError
from tests.data.streams import DIGITS, VOCABULARY, drawn, recognisable, undrawn


def rows_of(texts, width):
    """Rows of pieces given as text: "12 345" is two pieces."""
    pieces = [text.split() for text in texts]
    most = max(1, max(map(len, pieces)))
    ids = np.zeros((len(texts), width), np.int32)
    lengths = np.zeros((len(texts), most), np.int32)
    for row, parts in enumerate(pieces):
        joined = undrawn("".join(parts))
        ids[row, : len(joined)] = joined
        lengths[row, : len(parts)] = [len(part) for part in parts]
    return {"ids": ids, "word_starts": np.zeros(ids.shape, bool), "piece_lengths": lengths}


def random_rows(batch, length, specials=2, seed=0):
    """Rows packed with random pieces of text, some short, one empty."""
    random = np.random.default_rng(seed)
    lengths = np.zeros((batch, 6), np.int32)
    for row in range(1, batch):
        room = length
        for slot in range(6):
            if room > specials and random.random() < 0.8:
                lengths[row, slot] = random.integers(1, room - specials + 1)
                room -= lengths[row, slot] + specials
    lengths = -np.sort(-lengths, axis=1)
    ids = np.tile(recognisable(length - specials).astype(np.int32), (batch, 1))
    ids[np.arange(length - specials) >= lengths.sum(1)[:, None]] = 0
    return {"ids": ids, "word_starts": ids % 3 > 0, "piece_lengths": lengths}


def keys_of(rows, seed=0):
    return row_keys(seed, np.zeros(rows, np.int64), np.arange(rows))


def test_golden_rows_of_packed_pieces():
    rows = rows_of(["1234 56 7", "12345678", "", "9"], width=12)
    framed = frame_pieces(rows, 14, first=DIGITS.cls, last=DIGITS.sep, pad=DIGITS.pad)
    lines = [
        line
        for row in range(4)
        for line in (
            drawn(framed.input_ids[row]),
            "".join(map(str, framed.segment_ids[row])),
            "".join(map(str, framed.position_ids[row])),
        )
    ]
    assert lines == [
        "<1234><56><7>.",
        "11111122223330",
        "01234501230120",
        "<12345678>....",
        "11111111110000",
        "01234567890000",
        "..............",
        "00000000000000",
        "00000000000000",
        "<9>...........",
        "11100000000000",
        "01200000000000",
    ]
    assert framed.real.tolist() == [13, 10, 0, 3]


def test_pieces_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match="14 tokens does not fit in a length of 13"):
        frame_pieces(rows_of(["1234 123456"], 12), 13, first=11, last=12, pad=10)


FRAMINGS = [
    MaskedFraming(vocabulary=VOCABULARY, length=length, masking=masking)
    for length in (3, 16, 65)
    for masking in (
        TokenMasking(),
        TokenMasking(count="fairseq"),
        TokenMasking(count="exact", rate=0.4),
        TokenMasking(count="electra", max_predictions=7),
        BernoulliMasking(rate=0.3),
    )
]
EVERY = pytest.mark.parametrize("framing", FRAMINGS, ids=lambda f: f"{f.length} {f.masking}")


@EVERY
@pytest.mark.parametrize("batch", [1, 9])
def test_the_spec_is_what_comes(framing, batch):
    made = framing.examples(random_rows(batch, framing.length), keys_of(batch), 0)
    assert {name: (a.shape, a.dtype) for name, a in made.items()} == framing.spec(batch)


@EVERY
@pytest.mark.parametrize("seed", range(4))
def test_labels_put_back_restore_the_framed_text(framing, seed):
    rows = random_rows(30, framing.length, seed=seed)
    made = framing.examples(rows, keys_of(30, seed), 0)
    framed = frame_pieces(rows, framing.length, first=2, last=3, pad=0)
    used = made["masked_weights"] > 0
    row, _ = np.nonzero(used)
    restored = made["input_ids"].copy()
    restored[row, made["masked_positions"][used]] = made["masked_labels"][used]
    assert (restored == framed.input_ids).all()
    assert not np.isin(made["masked_labels"][used], VOCABULARY.special_ids).any()
    text = framed.input_ids[~np.isin(framed.input_ids, VOCABULARY.special_ids)]
    given = np.concatenate(
        [i[:n] for i, n in zip(rows["ids"], rows["piece_lengths"].sum(1), strict=True)]
    )
    assert text.tolist() == given.tolist()


@EVERY
def test_a_row_of_length_zero_weighs_nothing_and_is_all_padding(framing):
    made = framing.examples(random_rows(5, framing.length), keys_of(5), 0)
    for name in ("input_ids", "segment_ids", "position_ids", "masked_weights", "masked_labels"):
        assert (made[name][0] == 0).all()
    assert made["segment_ids"][1:].any(axis=1).all()


@EVERY
def test_a_row_is_framed_alone_as_among_others(framing):
    rows, keys = random_rows(12, framing.length), keys_of(12)
    together = framing.examples(rows, keys, 0)
    some = np.array([7, 2])
    alone = framing.examples({n: a[some] for n, a in rows.items()}, keys[some], 0)
    for name, array in alone.items():
        assert (array == together[name][some]).all()


def test_special_ids_within_a_text_are_never_masked():
    rows = rows_of(["??????1???????"], width=14)
    framing = MaskedFraming(vocabulary=DIGITS, length=16, masking=TokenMasking(rate=0.5))
    for seed in range(20):
        made = framing.examples(rows, keys_of(1, seed), 0)
        assert made["masked_weights"].sum() == 1
        assert made["masked_positions"][0, 0] == 7 and made["masked_labels"][0, 0] == 1


def test_masks_spread_over_the_pieces_of_a_row_in_proportion():
    rows = rows_of(["0123456789" * 3 + " " + "0123456789"], width=60)
    rows = {name: np.repeat(array, 2000, axis=0) for name, array in rows.items()}
    framing = MaskedFraming(vocabulary=DIGITS, length=64, masking=TokenMasking(rate=0.2))
    made = framing.examples(rows, keys_of(2000), 0)
    assert (made["masked_weights"].sum(1) == round(0.2 * 44)).all()
    used = made["masked_weights"] > 0
    in_first = (made["masked_positions"] < 32)[used].mean()
    assert in_first == pytest.approx(0.75, abs=5 * 0.5 / np.sqrt(used.sum()))


def test_special_tokens_are_those_of_the_vocabulary():
    """RoBERTa's: <s> 0, <pad> 1, </s> 2, <mask> last."""
    roberta = Vocabulary(size=50, cls=0, bos=0, pad=1, sep=2, eos=2, unk=3, mask=49)
    rows = {
        "ids": np.arange(10, 16, dtype=np.int32)[None],
        "word_starts": np.ones((1, 6), bool),
        "piece_lengths": np.array([[6]], np.int32),
    }
    masking = TokenMasking(rate=0.1, mask_share=1.0, random_share=0.0)
    made = MaskedFraming(vocabulary=roberta, length=10, masking=masking).examples(
        rows, keys_of(1), 0
    )
    line = made["input_ids"][0].tolist()
    at = made["masked_positions"][0, 0]
    assert line[at] == 49
    line[at] = made["masked_labels"][0, 0]
    assert line == [0, 10, 11, 12, 13, 14, 15, 2, 1, 1]


def test_a_vocabulary_without_mask_is_named():
    with pytest.raises(UserError, match="no mask token"):
        MaskedFraming(
            vocabulary=Vocabulary(size=9, pad=0, cls=1, sep=2), length=8, masking=TokenMasking()
        )


def test_a_length_without_room_for_text_is_named():
    with pytest.raises(UserError, match="length 2 leaves no room for text beside the 2 special"):
        MaskedFraming(vocabulary=VOCABULARY, length=2, masking=TokenMasking())


def test_a_framing_travels_to_a_process_that_never_imports_jax(tmp_path):
    path = tmp_path / "framing.pickle"
    path.write_bytes(pickle.dumps(FRAMINGS[0]))
    program = (
        "import pickle, sys; f = pickle.load(open(sys.argv[1], 'rb')); "
        "assert 'jax' not in sys.modules and 'torch' not in sys.modules; print(f.length)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, path], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "3"
