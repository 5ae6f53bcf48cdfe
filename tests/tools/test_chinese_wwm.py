"""configs/chinese_wwm_base.py on real Chinese text, its model shrunk: it learns to guess words."""

import dataclasses
import os
import subprocess
import sys

import pytest

from flaxpretrain.data.masking import TokenMasking
from flaxpretrain.data.store import open_dataset
from flaxpretrain.evaluation.fixed_masks import baselines, evaluate, settings_of
from flaxpretrain.evaluation.subject import open_subject
from flaxpretrain.training import sharding
from tests.tools.conftest import TOOLS

pytestmark = pytest.mark.slow

ROOT = TOOLS.parent
STEPS, ROWS = 500, 512
LEARNT_NATS = 0.15
"""Under the counted unigram model: more than how frequent characters are. It came to 0.28 (6.33 and
6.61 nats); exact frequencies instead of counts plus one would gain log(1 + V / N) = 0.014 at most.
"""
SHRUNK = """
import dataclasses

from chinese_wwm_base import recipe as base
from quickstart import recipe as quickstart

from flaxpretrain.config import Phase, Precision


def recipe():
    run, small = base(), quickstart()
    return dataclasses.replace(
        run,
        # The quickstart's network and optimizer, which leave the unigram plateau early.
        model=dataclasses.replace(small.model, vocab_size=run.model.vocab_size),
        optimizer=small.optimizer,
        schedule=small.schedule,
        phases=(Phase(steps={steps}, length=64, batch_size=64),),
        precision=Precision(),
        remat="none",
        evaluations=(),
        device="any",
    )
"""


def run(*command):
    """A program in a process of its own, on the one device that its users have."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(ROOT / "configs")
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout


@pytest.fixture(scope="module")
def trained(test_data, tmp_path_factory):
    """Folder with `data` and a workdir `w`."""
    pytest.importorskip("jieba")
    folder = tmp_path_factory.mktemp("chinese")
    (folder / "chinese_small.py").write_text(SHRUNK.format(steps=STEPS))
    run(
        *("tools/build_pretraining_dataset.py", "--language", "zh", "--words", "jieba"),
        *("--corpus-dir", test_data / "zh_wikipedia_2023_simplified" / "train.txt"),
        *("--vocab-file", test_data / "vocab" / "bert-base-chinese" / "vocab.txt"),
        *("--output-dir", folder / "data", "--validation-share", 0.05, "--limit", 1000),
    )
    run(
        *("run_pretraining.py", folder / "chinese_small.py", "--data-dir", folder / "data"),
        *("--workdir", folder / "w", "--quiet"),
    )
    return folder


def test_whole_words_are_guessed_better_than_by_frequency(trained, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "configs")
    subject, dataset = open_subject(trained / "w"), open_dataset(trained / "data")
    masking = subject.run.objective.masking
    assert masking.reads_word_starts and not isinstance(masking, TokenMasking)
    # No token is left as it was, for to copy it is no achievement.
    hidden = dataclasses.replace(masking, mask_share=1.0, random_share=0.0)
    settings = dataclasses.replace(
        settings_of(subject, max_rows=ROWS),
        objective=dataclasses.replace(subject.run.objective, masking=hidden),
    )
    counted = baselines(dataset, settings)
    figures = evaluate(subject, dataset, settings, sharding.make_mesh(8), 64)
    assert counted.positions > 2_000
    assert figures["masked_lm"] < counted.unigram - LEARNT_NATS
