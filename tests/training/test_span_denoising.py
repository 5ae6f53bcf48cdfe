"""A T5 and a BART train, stop, go on bit for bit, and are evaluated under fixed noise."""

import dataclasses

import pytest

from flaxpretrain.config import Checkpoints, Data, Phase
from flaxpretrain.data.infilling import BartNoise
from flaxpretrain.data.noising import SpanCorruption
from flaxpretrain.data.rows import Blocks, Documents
from flaxpretrain.objectives.span_denoising import SpanDenoising
from flaxpretrain.training.evaluate import FixedNoise
from flaxpretrain.training.loop import train
from flaxpretrain.training.metrics import read_metrics
from flaxpretrain.training.optimizers import Adafactor, AdamW
from flaxpretrain.training.schedules import Constant, InverseSquareRoot
from tests import toys
from tests.training.resuming import as_it_was

VOCABULARY = dataclasses.replace(toys.VOCABULARY, sentinels=tuple(range(299, 279, -1)))

BLOCKS = Blocks()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(toys.dataset(tmp_path_factory.mktemp("data") / "d", vocabulary=VOCABULARY))


def toy(folder, steps, layout=BLOCKS, **changes):
    values = dict(
        model=toys.t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        objective=SpanDenoising(noise=SpanCorruption(), terms={"denoising": 1.0, "z_loss": 1e-4}),
        data=Data(layout=layout, folder=folder),
        optimizer=Adafactor(0.03),
        schedule=InverseSquareRoot(warmup_steps=10),
        phases=(Phase(steps=steps, length=32, batch_size=8),),
        checkpoints=Checkpoints(every_steps=4, keep_last=2),
    )
    return toys.run(**(values | changes))


def losses(workdir):
    return [row["loss"] for row in read_metrics(workdir / "metrics.jsonl") if "loss" in row]


def test_t5_trains_and_goes_on_bit_for_bit(tmp_path, data):
    evaluation = FixedNoise(every_steps=12, batch_size=8, max_rows=16)
    run = toy(data, 12, evaluations=(evaluation,))
    assert train(run, tmp_path / "whole", quiet=True) == 0
    assert train(run, as_it_was(tmp_path / "whole", tmp_path / "w", step=8), quiet=True) == 0
    resumed, whole = losses(tmp_path / "w"), losses(tmp_path / "whole")
    assert resumed == whole and len(whole) == 12
    assert whole[-1] < whole[0] - 0.5
    rows = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert rows[0]["loss/z_loss"] > 0 and rows[0]["loss/denoising"] > 0
    assert any("validation/denoising_accuracy" in row for row in rows)


def test_bart_trains_on_packed_documents(tmp_path, data):
    run = toy(
        data,
        6,
        Documents(),
        model=toys.bart(encoder_layers=1, decoder_layers=1),
        objective=SpanDenoising(noise=BartNoise()),
        optimizer=AdamW(1e-2),
        schedule=Constant(warmup_steps=1),
    )
    assert train(run, tmp_path / "w", quiet=True) == 0
    assert losses(tmp_path / "w")[-1] < losses(tmp_path / "w")[0]
