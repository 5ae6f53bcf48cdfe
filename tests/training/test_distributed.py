"""Several processes: how they find each other, what each loads, and how none is left behind."""

import dataclasses
import http.server
import signal
import threading
import time

import numpy as np
import psutil
import pytest

from flaxpretrain import program
from flaxpretrain.config import Checkpoints, load
from flaxpretrain.errors import UserError
from flaxpretrain.training import distributed
from flaxpretrain.training.distributed import initialize_distributed
from flaxpretrain.training.loop import train
from flaxpretrain.training.metrics import read_events
from tests.tolerances import LOSS_REORDERED
from tests.training.processes import ended, losses, reached, started, wait_for, write_recipe

SHORT = ("watchdog.peer_seconds=3",)
RARE = "checkpoints.every_steps=1000"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("several"))


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory):
    """The losses of one process."""
    workdir = tmp_path_factory.mktemp("alone") / "w"
    run = dataclasses.replace(load(recipe), checkpoints=Checkpoints(every_steps=60))
    assert train(run, workdir, quiet=True) == 0
    return losses(workdir)


def assert_same(workdir, alone):
    got = losses(workdir)
    assert sorted(got) == sorted(alone)
    np.testing.assert_allclose(
        [got[step] for step in alone], list(alone.values()), rtol=LOSS_REORDERED
    )


# Settings.


@pytest.mark.parametrize(
    ("environment", "arguments", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, (), "need all of JAX_COORDINATOR_ADDRESS"),
        ({"JAX_PROCESS_ID": "one"}, (), "JAX_PROCESS_ID must be a number; got 'one'"),
        ({}, ("a:1", 2, 2), "JAX_PROCESS_ID must lie in 0 to 1; got 2"),
        ({}, (None, 2, None), "need all of"),
        ({}, ("a", 2, 0), "must be host:port; got a"),
    ],
)
def test_half_told_settings_are_refused(environment, arguments, message):
    with pytest.raises(UserError, match=message):
        initialize_distributed(*arguments, environment=environment)


def test_a_lone_process_stays_alone():
    for environment in ({}, {"TPU_WORKER_HOSTNAMES": "localhost"}, {"SLURM_STEP_NUM_TASKS": "1"}):
        assert not initialize_distributed(environment=environment)


@pytest.fixture
def joins(monkeypatch):
    """What JAX would be asked to join."""
    calls = []
    monkeypatch.setattr(distributed, "_join", lambda *a, **k: calls.append(k))
    return calls


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, None),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "a:1"}, None),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, None),
        (
            {
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
                "SLURM_GPUS_ON_NODE": "4",
            },
            [0, 1, 2, 3],
        ),
    ],
)
def test_launchers_are_recognised_by_their_variables(joins, environment, devices):
    initialize_distributed(environment=environment)
    assert [call["local_device_ids"] for call in joins] == [devices]


@pytest.mark.parametrize(
    ("endpoints", "several"), [("a:1:10.0.0.1,b:2:10.0.0.2", True), ("a:1:10.0.0.1", False)]
)
def test_a_tpu_slice_without_variables_is_recognised_by_its_metadata(
    monkeypatch, joins, endpoints, several
):
    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            known = self.path.endswith("/attributes/worker-network-endpoints")
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(endpoints.encode() if known else b"")

        def log_message(self, *arguments):
            pass

    monkeypatch.setattr(program, "has_tpu", lambda: True)
    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        initialize_distributed(environment={"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"})
        server.shutdown()
    assert len(joins) == several


# Two processes.


def test_sigterm_on_one_of_two_saves_together_and_one_process_goes_on(tmp_path, recipe, alone):
    workdir = tmp_path / "w"
    with started(recipe, workdir, 2, RARE) as both:
        wait_for(reached(workdir, 3), both)
        both[1].send_signal(signal.SIGTERM)
        codes, outputs = ended(both)
    assert codes == [program.EXIT_PREEMPTED] * 2, outputs
    (saved,) = (int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert saved == max(losses(workdir)) < 60
    assert f"stopped on request at step {saved}, saved" in outputs[0]
    with started(recipe, workdir, 1, RARE) as processes:
        codes, outputs = ended(processes)
    assert codes == [0], outputs
    assert_same(workdir, alone)
    told = [(row["event"], row["step"]) for row in read_events(workdir / "events.jsonl")]
    assert told == [("start", 0), ("preempted", saved), ("restart", saved), ("trained", 60)]


def test_when_one_of_two_is_killed_the_other_stops_and_both_go_on_later(tmp_path, recipe, alone):
    workdir = tmp_path / "w"
    with started(recipe, workdir, 2, *SHORT) as processes:
        wait_for(reached(workdir, 9), processes)
        killed = time.monotonic()
        processes[1].kill()
        output = processes[0].communicate(timeout=120)[0]
        seconds = time.monotonic() - killed
    assert processes[0].returncode == program.EXIT_PEER_GONE, output
    assert "process 0 of 2 stops: process 1 gave no sign of life for" in output
    assert seconds < 30
    with started(recipe, workdir, 2, RARE) as processes:
        codes, outputs = ended(processes)
    assert codes == [0, 0], outputs
    assert_same(workdir, alone)


@pytest.mark.slow
def test_four_processes_train_what_one_trains_and_end_when_the_first_is_killed(
    tmp_path, recipe, alone
):
    workdir = tmp_path / "w"
    with started(recipe, workdir, 4, *SHORT) as processes:
        wait_for(reached(workdir, 9), processes)
        killed = time.monotonic()
        processes[0].kill()
        codes, outputs = ended(processes[1:])
        assert time.monotonic() - killed < 30
    # JAX's own end, or ours, whichever is first.
    assert set(codes) <= {-signal.SIGABRT, program.EXIT_PEER_GONE}, outputs
    with started(recipe, workdir, 4, "mesh.fsdp=2") as processes:  # another mesh, too
        codes, outputs = ended(processes)
    assert codes == [0] * 4, outputs
    assert_same(workdir, alone)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_supervised_processes_find_each_other_again_after_one_is_killed(
    tmp_path, recipe, alone, victim
):
    workdir = tmp_path / "w"
    with started(recipe, workdir, 2, *SHORT, extra=("--restarts", "8")) as supervisors:
        wait_for(reached(workdir, 9), supervisors)
        (child,) = psutil.Process(supervisors[victim].pid).children()
        child.kill()
        codes, outputs = ended(supervisors)
    assert codes == [0, 0], outputs
    assert "supervisor: exit code 137: it was killed" in outputs[victim]
    assert "supervisor: exit code" in outputs[1 - victim]
    assert_same(workdir, alone)


def test_a_host_that_never_arrives_is_told_within_the_deadline(tmp_path, recipe):
    flags = ("--join-seconds", "4")
    for index, message in (
        (0, "process 0 of 2: not all other processes of the run arrived within 4 s"),
        (1, "process 1 of 2: process 0 did not arrive at 127.0.0.1:"),
    ):
        with started(recipe, tmp_path / "w", 2, extra=flags, only=(index,)) as processes:
            (code,), (output,) = ended(processes, 60)
        assert code == program.EXIT_WATCHDOG and message in output
        assert "Traceback" not in output
    assert not (tmp_path / "w").exists()


def test_a_mistake_on_one_host_stops_all_with_its_line(tmp_path, recipe):
    (tmp_path / "file").write_text("")
    workdirs = [tmp_path / "w", tmp_path / "file" / "w"]
    with started(recipe, workdirs, 2, *SHORT) as processes:
        codes, outputs = ended(processes, 60)
    assert codes == [program.EXIT_USER] * 2, outputs
    assert "process 0 of 2 stops: process 1 stopped: --workdir" in outputs[0]
    assert "cannot be written" in outputs[1] and "Traceback" not in outputs[1]
