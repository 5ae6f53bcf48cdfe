"""What the tests of evaluation share: a dataset of a tiny language and a workdir trained on it."""

import pytest

from flaxpretrain.training.loop import train
from tests.evaluation import speech


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return speech.dataset(tmp_path_factory.mktemp("speech") / "dataset")


@pytest.fixture(scope="session")
def workdir(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("speech") / "workdir"
    assert train(speech.run(data), folder, quiet=True) == 0
    return folder
