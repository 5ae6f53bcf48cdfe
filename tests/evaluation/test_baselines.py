"""The n-gram baselines of a recipe: at the positions of its own evaluation, told in one line."""

import dataclasses
import types

import pytest

from flaxpretrain.data.store import open_dataset
from flaxpretrain.errors import UserError
from flaxpretrain.evaluation.baselines import NgramBaselines, comparison
from flaxpretrain.evaluation.fixed_masks import baselines, settings_of
from flaxpretrain.evaluation.subject import open_subject
from flaxpretrain.training.evaluate import FixedNoise
from tests.evaluation import speech


def session(data, **changes):
    run = dataclasses.replace(speech.run(data), **changes)
    said = []
    return types.SimpleNamespace(
        run=run,
        phases=run.phases,
        dataset=open_dataset(data),
        figures={"validation/masked_lm": 2.0},
        say=said.append,
        said=said,
    )


def test_the_value_scores_the_positions_of_the_evaluation_it_names(data, workdir):
    opened = session(data)
    figures = NgramBaselines().run(opened)
    nats = baselines(open_dataset(data), settings_of(open_subject(workdir)))
    assert figures == {"validation/unigram": nats.unigram, "validation/bigram": nats.bigram}
    assert opened.figures == {"validation/masked_lm": 2.0} | figures
    assert opened.said == [comparison("validation", 2.0, nats.unigram, nats.bigram)]


def test_the_evaluations_own_noise_and_rows_are_taken(data):
    from tests import toys

    other = FixedNoise(
        name="hard", batch_size=8, objective=toys.masked_lm(rate=0.5), max_rows=9, length=12, seed=4
    )
    figures = NgramBaselines(of="hard").run(
        session(data, evaluations=(FixedNoise(batch_size=8), other))
    )
    assert set(figures) == {"hard/unigram", "hard/bigram"}
    assert figures["hard/bigram"] != NgramBaselines().run(session(data))["validation/bigram"]


def test_without_such_an_evaluation_it_is_refused(data):
    with pytest.raises(UserError, match="no FixedNoise of that name"):
        NgramBaselines(of="test").run(session(data))


def test_the_line_says_how_far_under_or_over():
    assert comparison("validation", 5.2, 6.2, 4.9) == (
        "validation loss 5.2000 nat, unigram 6.2000 (1.00 nat under), bigram 4.9000 (0.30 nat over)"
    )
    assert (
        comparison("validation", None, 6.2, 4.9) == "validation: unigram 6.2000, bigram 4.9000 nat"
    )
