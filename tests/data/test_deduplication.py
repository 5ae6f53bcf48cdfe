"""Duplicates: found where runs of words agree, not where they do not; memory is as said."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaxpretrain.data.decontamination import collect
from flaxpretrain.data.deduplication import (
    Duplicates,
    MinHash,
    Table,
    digest_of,
    prints_of,
)
from flaxpretrain.data.shingles import shingles, word_hashes
from flaxpretrain.data.sources import TextFiles
from flaxpretrain.errors import UserError

WORDS = [f"word{number}" for number in range(3000)]


def text(start, length=200, changed=()):
    words = WORDS[start : start + length]
    return " ".join("other" if n in changed else word for n, word in enumerate(words))


def judge(texts, exact=True, near=MinHash()):  # noqa: B008
    duplicates = Duplicates(exact, near)
    words = [word_hashes(one) for one in texts]
    return duplicates.judge(prints_of(texts, words, near)), duplicates


def test_words_are_compared_without_case_and_punctuation():
    assert len(word_hashes("The river, the TOWN!")) == 4
    np.testing.assert_array_equal(word_hashes("The river."), word_hashes("the — RIVER"))
    assert len(word_hashes("北京是 capital")) == 4 and not len(word_hashes("... !"))


def test_runs_of_words():
    words = word_hashes("a b c a b c")
    assert len(shingles(words, 3)) == 3  # abc bca cab
    assert len(shingles(words, 9)) == 1 and not len(shingles(words[:0], 3))
    assert len(shingles(word_hashes("a b"), 1)) == 2
    assert not set(shingles(word_hashes("a b"), 2)) & set(shingles(word_hashes("b a"), 2))


def test_exact_and_near_duplicates_are_told_apart():
    texts = [text(0), text(0).upper(), text(0, changed=(50,)), text(1000), text(0, 100)]
    assert judge(texts)[0] == [None, "duplicate", "near-duplicate", None, None]
    assert judge(texts, exact=False)[0][1] == "near-duplicate"
    assert judge(texts, near=None)[0] == [None, "duplicate", None, None, None]


def test_texts_without_words_are_duplicates_only_where_equal():
    assert judge(["...", "!!!", "..."])[0] == [None, None, "duplicate"]


def test_the_share_that_is_found_follows_the_resemblance():
    # So many changed words in 200 leave 196 - 5 of each run: a resemblance of 0.95, 0.86, 0.6, 0.3.
    found = []
    for count in (1, 3, 10, 25):
        gap = 200 // count
        hits = 0
        for start in range(0, 2800, 80):
            pair = [text(start), text(start, changed=range(gap // 2, 200, gap))]
            hits += judge(pair, exact=False)[0][1] is not None
        found.append(hits / 35)
    assert found[0] == 1 and found[1] > 0.8 and found[2] < 0.1 and found[3] == 0


def test_going_on_from_what_was_kept():
    near = MinHash()
    prints = prints_of([text(0)], [word_hashes(text(0))], near)
    later = Duplicates(True, near)
    later.keep(prints)
    again = [text(0), text(0, changed=(3,)), text(500)]
    words = [word_hashes(one) for one in again]
    assert later.judge(prints_of(again, words, near)) == ["duplicate", "near-duplicate", None]


def test_memory_is_as_documented():
    texts = [" ".join(f"w{n}x{i}" for i in range(12)) for n in range(2048)]
    _, duplicates = judge(texts)
    assert duplicates.bytes / len(texts) < 1000
    _, duplicates = judge(texts, near=None)
    assert duplicates.bytes / len(texts) <= 50


def test_boilerplate_does_not_crowd_a_band():
    table = Table()
    near = Duplicates(False, MinHash(threshold=1.0)).near
    bands = np.arange(16, dtype=np.uint64)
    for number in range(50):
        low = np.full((1, 128), number, np.uint8)
        near.keep(bands[None], low)
    assert near._table.find(bands)[1].max() <= 8
    assert table.bytes == 12 << 12


@given(st.lists(st.integers(0, 40), max_size=300))
def test_a_table_finds_what_was_added(numbers):
    table, expected = Table(), {}
    for owner, number in enumerate(numbers):
        table.add(np.array([number * 7919], np.uint64), np.array([owner], np.uint32))
        expected.setdefault(number, set()).add(owner)
    for number in range(41):
        owners, counts = table.find(np.array([number * 7919], np.uint64))
        assert set(owners.tolist()) == expected.get(number, set())
        assert counts[0] == len(expected.get(number, ()))


def test_settings_are_checked():
    with pytest.raises(UserError, match="resemblance lies above 0"):
        MinHash(threshold=0.0)
    with pytest.raises(UserError, match="multiple of the bands"):
        MinHash(hashes=100, bands=16)


def test_digests_ignore_case_and_spaces():
    assert digest_of("A  b\nc") == digest_of("a b C") != digest_of("a bc")


def test_runs_of_words_with_test_sets(tmp_path):
    for name, content in {"one": text(0, 20) + "\n\nshort one\n", "two": text(100, 30)}.items():
        (tmp_path / name).write_text(content)
    sources = {name: TextFiles(name, (tmp_path / name,)) for name in ("one", "two")}
    tests = collect(sources, 13, word_hashes)
    assert tests.names == ("one", "two") and tests.short == {"one": 1, "two": 0}
    assert tests.overlaps(word_hashes("x " + text(3, 14) + " y")).tolist() == [2, 0]
    assert tests.overlaps(word_hashes(text(110, 13) + " " + text(0, 12))).tolist() == [0, 1]
    assert not tests.overlaps(word_hashes(text(0, 12))).any()
    with pytest.raises(UserError, match="test set one: none of 2 documents has 50 words"):
        collect({"one": sources["one"]}, 50, word_hashes)
    with pytest.raises(UserError, match="1 word or more"):
        collect(sources, 0, word_hashes)
