"""A run whose workdir is in a bucket: objects are written whole, and never renamed."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest
from etils.epath import backend

from flaxpretrain.errors import UserError
from flaxpretrain.training.checkpoints import Checkpoints, restore_params
from flaxpretrain.training.loop import train
from flaxpretrain.training.schedules import Constant
from flaxpretrain.training.shelves import COMMITTED_MARK, DAMAGED_MARK
from flaxpretrain.training.workdirs import NOT_COPIED, local_folder
from tests import toys
from tests.conftest import CACHE

pytest.importorskip("gcsfs", reason="pip install gcsfs gcp-storage-emulator")
pytest.importorskip("gcp_storage_emulator", reason="pip install gcsfs gcp-storage-emulator")

from tests.training.bucket import serving

ROOT = Path(__file__).parent.parent.parent
RUN = "gs://bucket/runs/toy"
# gcsfs asks for credentials that the emulator does not need.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(toys.dataset(tmp_path_factory.mktemp("data") / "toy"))


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    logging.getLogger("gcsfs").setLevel(logging.ERROR)
    logging.getLogger("google.auth._default").setLevel(logging.ERROR)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with serving(monkeypatch) as bucket:
        # Those of the bucket before.
        fsspec.filesystem("gs").clear_instance_cache()
        backend.fsspec_backend._get_filesystem.cache_clear()
        yield bucket
        assert not bucket.renames


def rows(text):
    found = [json.loads(line) for line in text.splitlines()]
    return [(r["step"], r["loss"], r["grad_norm"]) for r in found if "loss" in r]


def equal(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b))


@pytest.mark.slow
def test_a_killed_run_goes_on_from_the_bucket_on_a_fresh_machine_bit_for_bit(
    bucket, data, tmp_path, monkeypatch
):
    recipe = tmp_path / "toy_recipe.py"
    recipe.write_text(
        "from tests import toys\n"
        "from flaxpretrain.training.schedules import Constant\n"
        f"def recipe():\n    return toys.packed_run({data!r}, schedule=Constant())\n"
    )
    command = [sys.executable, ROOT / "run_pretraining.py", recipe, "--workdir", RUN, "--quiet"]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
    }
    command += ["--set", "steps=4000", "--set", "checkpoints.every_steps=4"]
    child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, cwd=ROOT)
    deadline = time.monotonic() + 240
    while f"runs/toy/checkpoints/4/{COMMITTED_MARK}" not in bucket.names("runs/toy/checkpoints"):
        assert child.poll() is None, child.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(1)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stderr.close()
    begun = max(Checkpoints(f"{RUN}/checkpoints").steps())
    assert begun >= 4

    monkeypatch.setenv("HOME", str(tmp_path / "another_home"))
    last = begun + 6
    # A schedule that does not depend on how many steps there will be.
    run = toys.packed_run(data, steps=last, schedule=Constant())
    assert train(run, RUN, quiet=True) == 0
    assert train(run, tmp_path / "whole", quiet=True) == 0
    whole, _, step = restore_params(tmp_path / "whole" / "checkpoints")
    resumed, _, resumed_step = restore_params(f"{RUN}/checkpoints")
    assert step == resumed_step == last
    assert equal(whole, resumed)
    expected = rows((tmp_path / "whole" / "metrics.jsonl").read_text())
    assert rows(bucket.read("runs/toy/metrics.jsonl")) == expected


def test_logs_are_copied_whole_at_each_checkpoint_and_at_the_end(bucket, data):
    train(toys.packed_run(data, steps=6), RUN, quiet=True)
    names = bucket.names("runs/toy")
    for name in ("metrics.jsonl", "config.json", "run.json", "tokenizer/tokenizer.json"):
        assert f"runs/toy/{name}" in names
    assert f"runs/toy/checkpoints/6/{COMMITTED_MARK}" in names
    local = local_folder(RUN)
    assert not (local / "checkpoints").exists()
    for path in local.rglob("*"):
        name = path.relative_to(local).as_posix()
        if path.is_file() and path.relative_to(local).parts[0] not in NOT_COPIED:
            assert bucket.read(f"runs/toy/{name}") == path.read_text()


def test_a_save_without_its_mark_is_none_and_damage_is_marked(bucket, data):
    train(toys.packed_run(data, steps=8), RUN, quiet=True)
    system = fsspec.filesystem("gs")
    system.pipe_file("bucket/runs/toy/checkpoints/12/_METADATA", b"half of it")
    folder = f"{RUN}/checkpoints"
    assert max(Checkpoints(folder).steps()) == 8
    victim = next(n for n in bucket.names("runs/toy/checkpoints/8/params") if "/d/" in n)
    system.pipe_file(f"bucket/{victim}", b"x" * system.info(f"bucket/{victim}")["size"])
    train(toys.packed_run(data, steps=12), RUN, quiet=True)
    names = bucket.names("runs/toy/checkpoints")
    assert f"runs/toy/checkpoints/12/{COMMITTED_MARK}" in names
    assert not any(n.endswith("12/_METADATA") for n in names)
    # Step 8 came again, from step 4, and was saved anew.
    assert f"runs/toy/checkpoints/8/{DAMAGED_MARK}" not in names
    assert Checkpoints(folder).steps()[-2:] == [8, 12]


@pytest.mark.parametrize("path, what", [("/upload/", "written"), ("/o", "written")])
def test_a_bucket_that_refuses_is_told_in_one_line(bucket, data, path, what):
    bucket.refuses = path
    with pytest.raises(UserError, match=f"--workdir {RUN} cannot be {what}") as error:
        train(toys.packed_run(data), RUN, quiet=True)
    assert "\n" not in str(error.value)


def test_a_bucket_that_refuses_a_checkpoint_keeps_those_before(bucket, data):
    train(toys.packed_run(data, steps=4), RUN, quiet=True)
    bucket.refuses = "checkpoints%2F8"
    with pytest.raises(UserError, match="checkpoint of step 8 could not be written") as error:
        train(toys.packed_run(data, steps=8), RUN, quiet=True)
    assert "\n" not in str(error.value)
    bucket.refuses = None
    assert Checkpoints(f"{RUN}/checkpoints").steps() == [4]


def test_other_stores_are_refused(data):
    with pytest.raises(UserError, match="expected a folder or gs://BUCKET/FOLDER"):
        train(toys.packed_run(data), "s3://bucket/run", quiet=True)
