"""Google Cloud's notices, from a real server: new ones are acted on, once, and nothing waits."""

import contextlib
import http.server
import queue
import socket
import threading
import time
from pathlib import Path

import pytest

from flaxpretrain import program
from flaxpretrain.training.google_notice import ADDRESS, GoogleNotice, metadata_server
from tests.training.processes import ended, reached, started, wait_for, write_recipe

QUIET = {"preempted": "FALSE", "maintenance-event": "NONE"}
NOWHERE = Path("/no/such/product_name")


class Server(http.server.ThreadingHTTPServer):
    """A metadata server; `values` may change, `once` is told to the first that asks alone."""

    def __init__(self, google=True):
        super().__init__(("127.0.0.1", 0), Answers)
        self.values, self.once, self.google = dict(QUIET), queue.SimpleQueue(), google
        self.asked = threading.Semaphore(0)

    @property
    def environment(self):
        return {"GCE_METADATA_IP": f"127.0.0.1:{self.server_port}"}


class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        folder, _, name = self.path.rpartition("/")
        known = folder == "/computeMetadata/v1/instance" and name in self.server.values
        right = self.headers["Metadata-Flavor"] == "Google"
        value = self.server.values.get(name, "")
        if name == "preempted":
            with contextlib.suppress(queue.Empty):
                value = self.server.once.get_nowait()
        self.send_response(200 if known and right else 403)
        if self.server.google:
            self.send_header("Metadata-Flavor", "Google")
        self.end_headers()
        self.wfile.write(value.encode())
        if name == list(QUIET)[-1]:
            self.server.asked.release()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with served() as one:
        yield one


@contextlib.contextmanager
def served(**how):
    with Server(**how) as one:
        thread = threading.Thread(target=one.serve_forever, daemon=True)
        thread.start()
        yield one
        one.shutdown()


@contextlib.contextmanager
def watching(server):
    """The texts acted on so far."""
    acted = []
    notice = GoogleNotice(acted.append, environment=server.environment, poll_seconds=0.01)
    with notice:
        yield acted, notice.thread
    notice.thread.join(20)
    assert not notice.thread.is_alive()


def rounds(server, count=3):
    """Waits until the server was asked so often anew."""
    for _ in range(count):
        assert server.asked.acquire(timeout=20)


@pytest.mark.parametrize(
    ("name", "value"),
    [("preempted", "TRUE"), ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")],
)
def test_a_new_notice_is_acted_on_once(server, name, value):
    with watching(server) as (acted, thread):
        rounds(server)
        assert acted == []
        server.values[name] = value
        thread.join(20)
    assert acted == [f"{name}: {value}"]


def test_a_notice_that_stood_before_is_not_acted_on_until_it_is_given_anew(server):
    server.values["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    with watching(server) as (acted, thread):
        rounds(server)
        assert acted == []
        server.values["maintenance-event"] = "NONE"
        rounds(server)
        server.values["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
        thread.join(20)
    assert len(acted) == 1


def test_a_machine_that_moves_to_another_host_goes_on(server):
    with watching(server) as (acted, _):
        rounds(server)
        server.values["maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"
        rounds(server)
    assert acted == []


def test_another_cloud_s_server_is_left_alone():
    with served(google=False) as server:
        server.values["preempted"] = "TRUE"
        with watching(server) as (acted, thread):
            thread.join(20)
            assert not thread.is_alive()
        assert acted == []


def test_a_server_that_never_answers_keeps_nothing_waiting():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environment = {"GCE_METADATA_IP": f"127.0.0.1:{silent.getsockname()[1]}"}
        since = time.monotonic()
        with GoogleNotice(environment=environment):
            pass
        assert time.monotonic() - since < 1


def test_only_google_s_machines_are_asked(tmp_path):
    product = tmp_path / "product_name"
    product.write_text("Google Compute Engine\n")
    assert metadata_server({}, product) == ADDRESS
    assert metadata_server({"NO_GCE_CHECK": "true"}, product) is None
    product.write_text("PowerEdge R750\n")
    assert metadata_server({}, product) is None
    with GoogleNotice(environment={}, product=NOWHERE) as notice:
        assert notice.thread is None


def test_a_notice_to_one_of_two_hosts_saves_together(tmp_path, server, monkeypatch):
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    recipe, workdir = write_recipe(tmp_path), tmp_path / "w"
    with started(recipe, workdir, 2, "steps=100_000", "checkpoints.every_steps=100_000") as both:
        wait_for(reached(workdir, 3), both)
        server.once.put("TRUE")
        codes, outputs = ended(both)
    assert codes == [program.EXIT_PREEMPTED] * 2, outputs
    (saved,) = (int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert f"stopped on request at step {saved}, saved" in outputs[0]
    told = ["Google Cloud will take this machine away (preempted: TRUE)" in o for o in outputs]
    assert sum(told) == 1
