"""Evaluation of a workdir or a model from elsewhere: the same figures anywhere, or a clear no."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from flaxpretrain.conversion.card import Facts
from flaxpretrain.conversion.export import export
from flaxpretrain.data.store import open_dataset
from flaxpretrain.errors import UserError
from flaxpretrain.evaluation.fixed_masks import check_dataset, evaluate, settings_of
from flaxpretrain.evaluation.subject import open_subject
from flaxpretrain.objectives.objective import perplexity
from flaxpretrain.training import sharding
from flaxpretrain.training.evaluate import FixedNoise
from flaxpretrain.training.metrics import read_metrics
from tests import toys
from tests.tolerances import EVALUATION_ANYWHERE


def mesh(*sizes):
    return sharding.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])


@pytest.fixture(scope="module")
def subject(workdir):
    return open_subject(workdir)


@pytest.fixture(scope="module")
def folder(subject, tmp_path_factory):
    """The same model as a Hugging Face folder."""
    target = tmp_path_factory.mktemp("exported") / "hf"
    export(
        subject.run.model, subject.params, subject.tokenizer, target, Facts(name="x"), compare=False
    )
    return target


def figures(subject, data, sizes=(1, 1, 1), batch_size=64, **changes):
    settings = settings_of(subject, **changes)
    return evaluate(subject, open_dataset(data), settings, mesh(*sizes), batch_size)


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=EVALUATION_ANYWHERE)


@pytest.mark.parametrize(
    ("sizes", "batch_size"), [((1, 1, 1), 3), ((1, 1, 1), 8), ((8, 1, 1), 3), ((2, 2, 2), 64)]
)
def test_the_figures_depend_neither_on_batch_size_nor_on_devices(subject, data, sizes, batch_size):
    assert_same(figures(subject, data, sizes, batch_size), figures(subject, data))


def test_a_workdir_is_evaluated_as_its_own_run_evaluates(subject, workdir, data):
    last = read_metrics(workdir / "metrics.jsonl")[-1]
    own = figures(subject, data)
    for name in ("masked_lm", "masked_lm_accuracy", "perplexity"):
        np.testing.assert_allclose(own[name], last[f"validation/{name}"], rtol=EVALUATION_ANYWHERE)
    assert own["loss"] == own["masked_lm"]
    assert own["perplexity"] == perplexity(own["loss"])


def test_a_hugging_face_folder_gives_the_figures_of_its_workdir(subject, folder, data):
    other = open_subject(folder)
    assert not other.trained and other.step is None
    assert settings_of(other).length == 64  # all that this model has positions for
    assert_same(figures(other, data, length=16), figures(subject, data))


def test_rate_length_rows_and_seed_may_be_chosen(subject, data):
    settings = settings_of(subject, rate=0.4, length=12, max_rows=5, seed=3, split="train")
    assert settings.objective.masking.rate == 0.4
    assert settings.rows(open_dataset(data)) == 5
    masked = [b["masked_weights"].sum() for b in settings.batches(open_dataset(data), 5)]
    assert masked == [5 * round(0.4 * 12)]


def test_the_runs_own_evaluation_of_the_split_gives_the_defaults(subject, data):
    other = toys.masked_lm(rate=0.5)
    own = FixedNoise(batch_size=8, objective=other, length=12, max_rows=7, seed=3)
    run = dataclasses.replace(subject.run, evaluations=(own,))
    settings = settings_of(dataclasses.replace(subject, run=run))
    assert (settings.objective, settings.length) == (other, 12)
    assert (settings.max_rows, settings.seed) == (7, 3)
    settings = settings_of(dataclasses.replace(subject, run=run), split="train")
    assert (settings.objective, settings.length) == (subject.run.objective, 16)
    assert (settings.max_rows, settings.seed) == (None, 0)


def test_bfloat16_is_near(subject, data):
    settings = settings_of(subject)
    rough = evaluate(subject, open_dataset(data), settings, mesh(1, 1, 1), 64, compute="bfloat16")
    np.testing.assert_allclose(rough["loss"], figures(subject, data)["loss"], rtol=0.02)


def test_an_earlier_checkpoint_may_be_named(workdir):
    assert open_subject(workdir, step=4).step == 4
    with pytest.raises(UserError, match="5"):
        open_subject(workdir, step=5)


def test_a_step_of_what_is_no_workdir_is_refused(folder):
    with pytest.raises(UserError, match="--step 3: .* is no workdir"):
        open_subject(folder, step=3)


def test_a_source_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not there"):
        open_subject(tmp_path / "nothing")


def test_a_length_beyond_the_positions_is_refused(subject):
    with pytest.raises(UserError, match="--length 65: .* has positions for 64 tokens"):
        settings_of(subject, length=65)


def test_a_rate_for_an_objective_without_masks_is_refused(subject):
    other = dataclasses.replace(subject.run, objective=toys.bert())
    with pytest.raises(UserError, match="--rate 0.2: .* without a rate"):
        settings_of(dataclasses.replace(subject, run=other), rate=0.2)


def test_a_dataset_of_another_size_is_refused(subject, tmp_path):
    dataset = open_dataset(toys.dataset(tmp_path / "toy", documents=4))
    with pytest.raises(UserError, match="a tokenizer of 300 tokens"):
        check_dataset(subject, dataset)


def test_a_dataset_of_another_tokenizer_of_the_same_size_is_refused(folder, data, tmp_path):
    content = (folder / "tokenizer.json").read_text()
    other = tmp_path / "other"
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    swapped = json.loads(content)
    words = swapped["model"]["vocab"]
    words["cat"], words["dog"] = words["dog"], words["cat"]
    (other / "tokenizer.json").write_text(json.dumps(swapped))
    with pytest.raises(UserError, match="trained with another tokenizer"):
        check_dataset(open_subject(other), open_dataset(data))


def test_a_split_that_is_not_there_is_refused(subject, data):
    with pytest.raises(UserError, match="no split 'test'"):
        figures(subject, data, split="test")
