"""A batch that was dumped is scored as the batch of its step is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flaxpretrain.training.loop import train
from tests import toys

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replay")
    data = toys.dataset(folder / "data")
    train(toys.packed_run(str(data), steps=4), folder / "w", quiet=True)
    return folder / "w"


def start(*arguments):
    return subprocess.run(
        [sys.executable, "tools/replay_batch.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_a_dumped_batch_is_scored_like_the_batch_of_its_step(workdir, tmp_path):
    file = tmp_path / "batch.npz"
    dumped = start(workdir, "--batch-step", 3, "--dump", file)
    assert dumped.returncode == 0, dumped.stderr
    replayed = start(workdir, "--replay", file)
    assert json.loads(replayed.stdout) == json.loads(dumped.stdout)
    assert json.loads(dumped.stdout)["figures"]["masked_lm"] > 0
    with np.load(file) as arrays:
        assert arrays["input_ids"].shape == (8, 32)


def test_a_step_that_the_run_does_not_have(workdir):
    wrong = start(workdir, "--batch-step", 99)
    assert wrong.returncode == 2
    assert "expected 1 to 4" in wrong.stderr and wrong.stderr.count("\n") == 1
