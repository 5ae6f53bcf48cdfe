"""Rows of whole sentences: as the plain algorithm cuts them, with a token between documents."""

import numpy as np
import pytest

from flaxpretrain.config import Phase
from flaxpretrain.data import full_sentences
from flaxpretrain.data.framing import MaskedFraming
from flaxpretrain.data.full_sentences import FullSentences
from flaxpretrain.data.masking import TokenMasking
from flaxpretrain.data.pipeline import Pipeline
from tests.data.test_sentence_pairs import VOCABULARY, documents_of, split_of

SEP = -1


def plainly(documents, capacity, separate):
    """Rows as fairseq fills them; a sentence longer than a row is cut into rows first."""
    rows, row = [], []
    for number, sentences in enumerate(documents):
        pending = [SEP] if number and separate else []
        for sentence in sentences:
            for begin in range(0, len(sentence), capacity):
                part = sentence[begin : begin + capacity]
                if row and len(row) + len(pending) + len(part) > capacity:
                    rows.append(row)
                    row = []
                row = row + (pending if row else []) + part
                pending = []
    return [*rows, row]


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize(("capacity", "longest"), [(3, 9), (20, 12), (64, 30), (50, 150), (900, 9)])
def test_rows_are_those_of_the_plain_algorithm(tmp_path, monkeypatch, separate, capacity, longest):
    documents = documents_of(capacity, longest=longest)
    split = split_of(tmp_path, documents)
    wanted = plainly(documents, capacity, separate)
    for at_once in (1 << 20, 7):
        monkeypatch.setattr(full_sentences, "AT_ONCE", at_once)
        plan = FullSentences(separate).plan(split, capacity + 2, 2)
        assert plan.rows_per_epoch == len(wanted)
        index = np.arange(plan.rows_per_epoch)
        rows = plan.rows(0, index * 0, index)
        ids = np.where(rows["separators"], SEP, rows["ids"]) if separate else rows["ids"]
        found = [row[:n].tolist() for row, n in zip(ids, rows["piece_lengths"][:, 0], strict=True)]
        assert found == wanted
        assert plan.real_tokens_per_epoch == sum(map(len, wanted)) + 2 * len(wanted)


def test_the_separator_is_seen_and_never_masked(tmp_path):
    split = split_of(tmp_path, documents_of(count=40, most=3, longest=6))
    pipeline = Pipeline(
        split,
        FullSentences(),
        lambda n: MaskedFraming(
            vocabulary=VOCABULARY, length=n, masking=TokenMasking(rate=1.0, random_share=0.0)
        ),
        (Phase(steps=2, length=48, batch_size=4),),
        order_seed=0,
        noise_seed=0,
    )
    ids = pipeline.batch(0)["input_ids"]
    assert (np.count_nonzero(ids == VOCABULARY.sep, axis=1) > 1).any()
    assert set(np.unique(pipeline.batch(0)["segment_ids"])) <= {0, 1}
