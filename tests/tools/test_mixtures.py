"""The programs on a mixture: a figure for each part's validation set, rows to look at."""

import dataclasses
import json

import pytest

from flaxpretrain.training.evaluate import FixedNoise
from flaxpretrain.training.loop import train
from tests.training.test_mixtures import data as data
from tests.training.test_mixtures import mixed_run, rows


@pytest.fixture(scope="module")
def workdir(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("work")
    run = mixed_run(data, steps=2)
    evaluations = (FixedNoise(batch_size=8, max_rows=8),)
    train(dataclasses.replace(run, evaluations=evaluations), workdir, quiet=True)
    return workdir


def test_evaluate_gives_figures_of_each_part_as_the_run_did(tool, workdir, data, capsys):
    tool("evaluate").main([str(workdir), "--json", "--batch-size", "8"])
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [result["split"] for result in results] == ["wiki/validation", "books/validation"]
    for result in results:
        name = f"validation/{result['split'].partition('/')[0]}/perplexity"
        here = result["figures"]["perplexity"]
        assert here == pytest.approx(rows(workdir, name)[2], rel=1e-4)
    given = ["--data-dir", str(data), "--split", "books/validation,wiki/train", "--max-rows", "4"]
    tool("evaluate").main([str(workdir), "--json", "--baselines", *given])
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [result["split"] for result in results] == ["books/validation", "wiki/train"]
    tool("evaluate").main([str(workdir), "--json", "--data-dir", str(data / "books")])
    assert json.loads(capsys.readouterr().out)["split"] == "validation"


def test_a_batch_of_a_mixture_is_written_again(tool, workdir, tmp_path, capsys):
    flags = [str(workdir), "--batch-step", "2", "--dump", str(tmp_path / "b.npz")]
    tool("replay_batch").main(flags)
    assert "masked_lm" in json.loads(capsys.readouterr().out)["figures"]
