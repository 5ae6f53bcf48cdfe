"""The launchers are shell that a shell can read, and say what they miss."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAUNCHERS = sorted((ROOT / "launchers").iterdir())

STUB = """#!/usr/bin/env bash
printf '%s\\n' "$(basename "$0")" "$@" >>"$RECORD"
[[ $* == *describe* ]] && echo ACTIVE
exit 0
"""


@pytest.fixture
def launch(tmp_path):
    """Runs a launcher where gcloud, xpk, srun and scontrol write down how they are called."""
    for name in ("gcloud", "xpk", "srun", "scontrol"):
        stub = tmp_path / "bin" / name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(STUB)
        stub.chmod(0o755)

    def run(launcher, *arguments, **variables):
        record = tmp_path / "record"
        record.write_text("")
        done = subprocess.run(
            ["bash", str(ROOT / "launchers" / launcher), *arguments],
            env={
                "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
                "HOME": str(tmp_path),
                "RECORD": str(record),
                **variables,
            },
            capture_output=True,
            text=True,
        )
        return done, record.read_text()

    return run


GOOGLE = {"PROJECT": "p", "ZONE": "z"}
RECIPE = ("configs/bert_tiny.py", "--workdir", "a dir")


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.name)
def test_launchers_are_sound_shell(path):
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    assert os.access(path, os.X_OK)


def test_a_slice_is_asked_for_and_waited_for(launch):
    done, calls = launch("tpu_queued_resource.sh", "bert", "v5litepod-16", **GOOGLE)
    assert done.returncode == 0, done.stderr
    assert "--accelerator-type=v5litepod-16\n--runtime-version=v2-alpha-tpuv5-lite" in calls
    assert "--node-id=bert\n--spot\n" in calls and "bert: ACTIVE" in done.stdout
    _, calls = launch("tpu_queued_resource.sh", "b", "v6e-16", NODES="2", SPOT="0", **GOOGLE)
    assert "--node-count=2\n--node-prefix=b\n" in calls and "--spot" not in calls


def test_all_hosts_of_a_slice_train_under_supervision(launch):
    done, calls = launch("tpu_run.sh", "bert", *RECIPE, **GOOGLE)
    assert done.returncode == 0, done.stderr
    assert "--worker=all\n" in calls
    assert r"run_pretraining.py configs/bert_tiny.py --workdir a\ dir " in calls
    assert "--restarts 20 " in calls
    done, calls = launch("tpu_run.sh", "bert", "stop", **GOOGLE)
    assert "kill -TERM" in calls and "scp" not in calls


def test_xpk_gets_the_command(launch):
    more = {"CLUSTER": "c", "IMAGE": "i", "NODES": "2", "RESTARTS": "3"}
    done, calls = launch("gke_xpk.sh", "bert", "v5litepod-16", *RECIPE, **GOOGLE, **more)
    assert done.returncode == 0, done.stderr
    assert "--num-slices=2\n" in calls and "--max-restarts=3\n" in calls
    assert r"run_pretraining.py configs/bert_tiny.py --workdir a\ dir --restarts 3" in calls


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (2, False)])
def test_a_slurm_job_that_saved_goes_back_into_the_queue(launch, tmp_path, code, requeued):
    srun = tmp_path / "bin" / "srun"
    srun.write_text(STUB.replace("exit 0", f"exit {code}"))
    done, calls = launch("slurm.sbatch", *RECIPE, SLURM_JOB_ID="7")
    assert done.returncode == code
    assert "python\nrun_pretraining.py\nconfigs/bert_tiny.py\n--workdir\na dir\n" in calls
    assert ("scontrol\nrequeue\n7\n" in calls) is requeued


@pytest.mark.parametrize(
    ("launcher", "arguments", "missing"),
    [
        ("tpu_queued_resource.sh", ("a", "b"), "PROJECT"),
        ("tpu_run.sh", (), "the name of the slice is missing"),
        ("tpu_run.sh", ("a",), "PROJECT"),
        ("gke_xpk.sh", ("a", "b"), "PROJECT"),
        ("slurm.sbatch", (), "give a recipe"),
    ],
)
def test_what_is_missing_is_said(launch, launcher, arguments, missing):
    done, calls = launch(launcher, *arguments)
    assert done.returncode != 0 and missing in done.stderr and not calls
