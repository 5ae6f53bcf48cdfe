"""The logistic probe of a frozen encoder."""

import json

import numpy as np
import pytest

from flaxpretrain.data.store import open_dataset
from flaxpretrain.errors import UserError
from flaxpretrain.evaluation.probe import (
    STRENGTHS,
    choose_strength,
    documents_among,
    fit_probe,
    sentence_features,
    token_ids,
)
from flaxpretrain.evaluation.subject import open_subject
from tests.evaluation import speech
from tests.tools.conftest import tool as tool


@pytest.fixture(scope="module")
def model(workdir):
    subject = open_subject(workdir)
    return subject.run.model, subject.params, subject.tokenizer


def clouds(count=400, seed=0):
    """Two clouds of points in five dimensions, apart along the first."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, count)
    points = random.normal(size=(count, 5)) * [1, 9, 1, 1, 1] + 3.0 * np.outer(
        labels, [1, 0, 0, 0, 0]
    )
    return points.astype(np.float32), labels


def test_a_probe_is_the_minimum_of_its_loss():
    points, labels = clouds()
    probe = fit_probe(points, labels, 0.1)
    x = (points - probe.mean) / probe.scale
    errors = probe.chances(points) - labels
    slope = x.T @ errors / len(x) + 0.1 * probe.weights
    np.testing.assert_allclose(slope, 0, atol=1e-6)
    np.testing.assert_allclose(errors.mean(), 0, atol=1e-6)


def test_a_probe_tells_clouds_apart_that_it_has_not_seen():
    points, labels = clouds()
    probe = fit_probe(points, labels, choose_strength(points, labels))
    assert 0.88 < probe.accuracy(*clouds(seed=1)) < 0.98  # Bayes: 93.3 %


def test_the_strength_is_chosen_by_what_generalises():
    """A hundred features, of which each tells a little: only a strong penalty finds the sum."""
    random = np.random.default_rng(0)
    labels = np.arange(150) % 2
    points = random.normal(size=(150, 100)) + 0.25 * (2 * labels - 1)[:, None]
    assert choose_strength(points.astype(np.float32), labels) == max(STRENGTHS)


def test_one_class_is_refused():
    with pytest.raises(UserError, match="texts of both classes"):
        fit_probe(np.zeros((4, 2), np.float32), np.zeros(4, np.int64), 0.1)


def test_features_do_not_depend_on_the_texts_beside(model):
    texts = ["the cat sees milk .", "the king", "a dog hears the bird ."]
    together = sentence_features(*model, texts)
    assert together.shape == (3, model[0].hidden_size)
    for text, row in zip(texts, together, strict=True):
        np.testing.assert_allclose(sentence_features(*model, [text])[0], row, atol=1e-5)


def test_a_model_without_tokenizer_is_refused(model):
    with pytest.raises(UserError, match="without a tokenizer"):
        sentence_features(model[0], model[1], None, ["the"])


def test_texts_are_found_among_the_documents_of_a_split(data):
    dataset = open_dataset(data)
    texts = [" ".join(speech.sentences(4, seed)) for seed in range(78, 83)]
    ids = token_ids(speech.tokenizer(), [*texts, "the cat"])
    in_train = documents_among(dataset.split("train"), ids)
    assert in_train.tolist() == [True, True, False, False, False, False]
    assert documents_among(dataset.split("validation"), ids).tolist()[2:] == [
        True,
        True,
        True,
        False,
    ]


def test_the_tool_tells_kinds_of_sentences_apart(tool, workdir, data, tmp_path, capsys):
    for word in ("cat", "dog"):
        lines = [f"the {word} {does} {what} ." for does in speech.DOES for what in speech.WHAT[:-1]]
        (tmp_path / word).write_text("\n".join(lines) + "\n")
    files = [part for word in ("cat", "dog") for part in ("--class", str(tmp_path / word))]
    tool("probe").main([str(workdir), *files, "--json"])
    result = json.loads(capsys.readouterr().out)
    assert sum(result["texts"].values()) == 40
    assert result["models"][0]["accuracy"] == 1.0
    with pytest.raises(UserError, match="no text of --class is a document of its validation"):
        tool("probe").main([str(workdir), *files, "--data-dir", str(data)])
    with pytest.raises(UserError, match="expected two files"):
        tool("probe").main([str(workdir), *files[:2]])
