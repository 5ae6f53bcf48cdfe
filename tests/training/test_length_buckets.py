"""A run in length buckets: batches of several shapes, resumed bit for bit, planned and measured."""

import dataclasses
import io

import numpy as np
import pytest
from rich.console import Console

from flaxpretrain.analysis.padding import padding_by_layout
from flaxpretrain.analysis.plan import print_plan
from flaxpretrain.config import Data, Phase
from flaxpretrain.data.buckets import LengthBuckets
from flaxpretrain.data.mixing import MixedData, Part
from flaxpretrain.data.rows import Blocks
from flaxpretrain.data.sentence_pairs import SentencePairs
from flaxpretrain.errors import UserError
from flaxpretrain.training.evaluate import FixedNoise
from flaxpretrain.training.loop import train
from flaxpretrain.training.metrics import read_metrics
from flaxpretrain.training.schedules import Constant
from flaxpretrain.training.session import open_run_dataset
from tests import toys
from tests.training.resuming import as_it_was


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toys.dataset(tmp_path_factory.mktemp("buckets") / "d", documents=120)


def bucketed_run(folder, steps=8, **changes):
    run = toys.packed_run(str(folder), steps=steps, schedule=Constant())
    layout = LengthBuckets((8, 16, 32))
    values = {
        "data": dataclasses.replace(run.data, layout=layout),
        "phases": (Phase(steps=steps, length=64, batch_size=8, microbatches=1),),
        "evaluations": (FixedNoise(batch_size=8),),
    }
    return dataclasses.replace(run, **(values | changes))


def rows_of(workdir, name="loss"):
    rows = read_metrics(workdir / "metrics.jsonl")
    return {row["step"]: row[name] for row in rows if row.get(name) is not None}


def test_a_run_goes_on_bit_for_bit(data, tmp_path):
    assert train(bucketed_run(data), tmp_path / "whole", quiet=True) == 0
    parts = as_it_was(tmp_path / "whole", tmp_path / "parts", step=4)
    assert train(bucketed_run(data), parts, quiet=True) == 0
    losses = rows_of(tmp_path / "whole")
    assert len(losses) == 8 and rows_of(parts) == losses
    assert np.isfinite(rows_of(tmp_path / "whole", "validation/perplexity")[8])


def test_the_plan_tells_the_buckets(data, tmp_path):
    out = io.StringIO()
    print_plan(bucketed_run(data), tmp_path, Console(file=out, width=100))
    said = out.getvalue()
    assert "8 steps of 8 rows of 64 tokens" in said
    for line in ("rows of 16: ", "rows of 32: ", "rows of 64: "):
        assert line in said
    assert "of the steps" in said


def test_layouts_are_compared_by_their_padding(data, tmp_path):
    run = bucketed_run(data)
    dataset = open_run_dataset(run, tmp_path)

    def padding_of(layout):
        here = Data(layout=layout, folder=str(data))
        return {n: share for n, (_, share) in padding_by_layout(run, dataset, here, 64).items()}

    found = padding_of(run.data.layout)
    assert list(found)[0] == "LengthBuckets(8, 16, 32) of PaddedDocuments"
    buckets = found["LengthBuckets(16, 32) of PaddedDocuments"]
    assert found["Documents"] < buckets < found["PaddedDocuments"] and "Blocks" in found
    pairs = padding_of(SentencePairs())
    buckets = pairs["LengthBuckets(16, 32) of SentencePairs(most=1)"]
    assert pairs["SentencePairs(most=8)"] < buckets < pairs["SentencePairs(most=1)"]


def test_a_mixture_has_rows_of_one_length(data, tmp_path):
    parts = (Part(name="d", folder=str(data), layout=LengthBuckets((8,))),)
    run = bucketed_run(data, data=MixedData(layout=Blocks(), parts=parts))
    with pytest.raises(UserError, match="d has rows of several lengths"):
        train(run, tmp_path, quiet=True)
