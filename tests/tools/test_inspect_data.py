"""tools/inspect_data.py on recipes of every family."""

import dataclasses
from pathlib import Path

import pytest

from flaxpretrain.errors import UserError
from tests import toys

CONFIGS = Path(__file__).parent.parent.parent / "configs"
VOCABULARY = dataclasses.replace(toys.VOCABULARY, sentinels=tuple(range(299, 269, -1)))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toys.dataset(tmp_path_factory.mktemp("data") / "d", vocabulary=VOCABULARY)


@pytest.fixture
def inspect(tool, data, capsys):
    def run(recipe, *arguments):
        main = tool("inspect_data").main
        main([str(CONFIGS / f"{recipe}.py"), "--data-dir", str(data), *map(str, arguments)])
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    ("recipe", "shown"),
    [
        ("bert_tiny", "reads: [CLS]"),
        ("bert_base_wwm", "reads: [CLS]"),
        ("electra_tiny", "reads: [CLS]"),
        ("bert_base_nsp", "reads: [CLS]"),
        ("gpt2_tiny", "says: w"),
        ("t5_tiny", "says: w299"),
        ("ul2_tiny", "says: w"),
        ("bart_tiny", "says: [CLS]"),
    ],
)
def test_rows_and_counts_of_every_family(inspect, recipe, shown):
    said = inspect(recipe, "--batches", 2, "--rows", 2, "--set", "phases.0.batch_size=8")
    assert said.count("reads:") == 2 and shown in said
    for part in ("16 rows of", "% padding", "unknown tokens: 0 of", "tokens a piece", "an epoch"):
        assert part in said, part


def test_a_picture_beside_the_text(inspect, tmp_path):
    said = inspect("bert_tiny", "--batches", 1, "--rows", 0, "--picture", tmp_path / "p.png")
    assert f"wrote {tmp_path / 'p.png'}" in said and "reads:" not in said
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_mistakes_are_named(inspect):
    with pytest.raises(UserError, match="--phase 3: the recipe has 1 phases"):
        inspect("bert_tiny", "--phase", 3)
    with pytest.raises(UserError, match="--batches must be positive"):
        inspect("bert_tiny", "--batches", 0)
    with pytest.raises(UserError, match="no split 'test'"):
        inspect("bert_tiny", "--split", "test")
