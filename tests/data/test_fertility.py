"""Words are counted alike for every tokenizer and script; figures are of tokens a word."""

import pytest

from flaxpretrain.data import fertility
from flaxpretrain.data.tokenizer_training import train_wordpiece


@pytest.mark.parametrize(
    "text, words",
    [
        ("", 0),
        ("   ", 0),
        ("the old town", 3),
        ("the town.", 3),
        ("don't", 3),
        ("20 km2", 3),
        ("中国 的", 3),
        ("नमस्ते दुनिया", 2),
        ("caf\u0065\u0301 a", 2),
    ],
)
def test_words(text, words):
    assert fertility.count_words(text) == words


def test_figures_and_table():
    tokenizer = train_wordpiece(["the town"] * 3, 40)
    found = fertility.measure(tokenizer, "en", ["the town", "the", "~ town"])
    assert (found.sentences, found.words, found.characters) == (3, 5, 17)
    assert (found.tokens, found.unknown) == (5, 1)
    assert found.tokens_per_word == 1 and found.unknown_share == 0.2
    head, line = fertility.table([found])
    assert "tokens/word" in head and line.split() == ["en", "3", "1.000", "0.294", "20.000%"]
