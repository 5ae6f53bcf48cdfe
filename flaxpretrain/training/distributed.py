"""The processes of a run on several hosts: how they find each other, and how none is left behind.

JAX's own coordination notices a lost process late and then aborts (exit code 134). Here each
process gives a sign of life through the coordination service's key-value store, the first one
looks who is late, and a process that ends by a mistake leaves its reason for the others.
"""

import contextlib
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping
from typing import Any, NoReturn

import jax

from flaxpretrain import program
from flaxpretrain.errors import UserError

JOIN_SECONDS = 300.0
"""How long the processes of a run wait for each other at the start, unless told."""

PEER_SECONDS = 60.0
"""Without a sign of life after which a process is lost, unless told."""

_LONGER = 600
"""Seconds by which JAX's own limits, which abort, lie behind ours."""


def initialize_distributed(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    environment: Mapping[str, str] | None = None,
    *,
    join_seconds: float = JOIN_SECONDS,
) -> bool:
    """Joins the processes of a run on several hosts, where arguments or the environment say so.

    Must run before anything touches a device. Arguments win over JAX_COORDINATOR_ADDRESS
    (HOST:PORT), JAX_NUM_PROCESSES and JAX_PROCESS_ID; Cloud TPU slices (by the machine's metadata,
    on GKE by variables), Slurm and Open MPI are recognised and need none. The program ends with
    code 124 when not all have arrived after `join_seconds`.

    Returns:
        Whether there are several processes.

    Raises:
        UserError: some but not all of the three settings are given, or they are not numbers.
    """
    environment = os.environ if environment is None else environment
    address = coordinator or environment.get("JAX_COORDINATOR_ADDRESS")
    count = _setting("JAX_NUM_PROCESSES", processes, environment)
    index = _setting("JAX_PROCESS_ID", process, environment)
    if address is not None or count is not None or index is not None:
        if not address or count is None or index is None:
            raise UserError(
                "several processes need all of JAX_COORDINATOR_ADDRESS (host:port of process 0), "
                f"JAX_NUM_PROCESSES and JAX_PROCESS_ID; got {address}, {count} and {index}"
            )
        if not re.fullmatch(r".+:\d+", address):
            raise UserError(f"JAX_COORDINATOR_ADDRESS must be host:port; got {address}")
        if not 0 <= index < count:
            raise UserError(f"JAX_PROCESS_ID must lie in 0 to {count - 1}; got {index}")
        _join(join_seconds, address, count, index)
        return count > 1
    if _in_a_cluster(environment):
        _join(join_seconds, local_device_ids=_all_devices_of_one_task(environment))
        return jax.process_count() > 1
    return False


def _setting(name: str, value: int | None, environment: Mapping[str, str]) -> int | None:
    if value is not None or name not in environment:
        return value
    try:
        return int(environment[name])
    except ValueError as error:
        raise UserError(f"{name} must be a number; got {environment[name]!r}") from error


def _in_a_cluster(environment: Mapping[str, str]) -> bool:
    """Whether a launcher that JAX knows tells of more than one process."""
    names = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
    if any("," in environment.get(name, "") for name in names):
        return True
    if environment.get("MEGASCALE_COORDINATOR_ADDRESS"):
        return True
    counts = [environment.get(n, "1") for n in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")]
    if any(count.isdigit() and int(count) > 1 for count in counts):
        return True
    # A slice made with gcloud sets no variables; what its machine knows is asked for.
    if "TPU_SKIP_MDS_QUERY" in environment or not program.has_tpu():
        return False
    several = "," in _metadata("worker-network-endpoints", environment)
    return several or "MEGASCALE_COORDINATOR_ADDRESS" in _metadata("tpu-env", environment)


def _metadata(name: str, environment: Mapping[str, str]) -> str:
    """An attribute of this Google Cloud machine; empty where there is none."""
    host = environment.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{host}/computeMetadata/v1/instance/attributes/{name}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read().decode()
    except OSError:
        return ""


def _all_devices_of_one_task(environment: Mapping[str, str]) -> list[int] | None:
    """All GPUs of the node, where Slurm starts one task a node; JAX would take the first alone."""
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0]
    gpus = environment.get("SLURM_GPUS_ON_NODE", "")
    if tasks != "1" or not gpus.isdigit() or "JAX_LOCAL_DEVICE_IDS" in environment:
        return None
    return list(range(int(gpus)))


def _join(
    seconds: float,
    address: str | None = None,
    count: int | None = None,
    index: int | None = None,
    local_device_ids: list[int] | None = None,
) -> None:
    arrived = threading.Event()

    def watch() -> None:
        if not arrived.wait(seconds):
            who = "" if index is None else f"process {index} of {count}: "
            _die(f"{who}{_who_is_missing(address, index)} within {seconds:g} s; {_ADVICE}")

    threading.Thread(target=watch, daemon=True, name="join").start()
    try:
        jax.distributed.initialize(
            address,
            count,
            index,
            local_device_ids=local_device_ids,
            initialization_timeout=int(seconds) + _LONGER,
            # One process may write for long what the others have no part in.
            shutdown_timeout_seconds=24 * 3600,
        )
    finally:
        arrived.set()


_ADVICE = (
    "look at its log, whether it runs the same command, and whether the port is open "
    "(--join-seconds waits longer)"
)


def _die(text: str) -> NoReturn:
    print(f"run_pretraining.py: error: {text}", file=sys.stderr, flush=True)
    os._exit(program.EXIT_WATCHDOG)


def _who_is_missing(address: str | None, index: int | None) -> str:
    if address is None or index == 0:
        return "not all other processes of the run arrived"
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        return f"process 0 did not arrive at {address} ({error.strerror or error})"
    return f"process 0 is at {address}, but not all others arrived"


_meetings = itertools.count()


def meet() -> None:
    """Waits until all processes are here; a watchdog and `Peers` end the wait for a lost one."""
    if jax.process_count() > 1:
        _store().wait_at_barrier(f"flaxpretrain/meeting/{next(_meetings)}", 24 * 3600 * 1000)


def told_by_all(text: str) -> list[str]:
    """What each process says, in their order; all must take part."""
    if jax.process_count() == 1:
        return [text]
    prefix, store = f"flaxpretrain/told/{next(_meetings)}", _store()
    store.key_value_set(f"{prefix}/{jax.process_index()}", text)
    meet()
    keys = [f"{prefix}/{index}" for index in range(jax.process_count())]
    return [store.blocking_key_value_get(key, 10_000) for key in keys]


def _store() -> Any:
    """JAX's coordination service; None where this process is alone."""
    # It has no public name; Orbax reads it at the same place.
    from jax._src import distributed

    return distributed.global_state.client


class Peers:
    """The other processes of the run.

    A thread gives signs of life and looks for theirs. When one is lost or has ended by a mistake,
    this process says so and ends: with the other's code if the user must act (2, 3), else with 69.
    """

    def __init__(self, seconds: float = PEER_SECONDS) -> None:
        """`seconds` without a sign of life make a process lost; they may be changed later."""
        self.seconds = seconds
        self._client = _store()
        self._index, self._count = 0, 1
        if self._client is not None:
            self._index, self._count = jax.process_index(), jax.process_count()
        self.several = self._count > 1
        self._beat = 0
        self._seen: dict[int, tuple[str, float]] = {}
        self._ended = threading.Event()

    def __enter__(self) -> "Peers":
        """Starts to watch."""
        if self.several:
            threading.Thread(target=self._watch, daemon=True, name="peers").start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stops, and tells the others that no more signs of life will come."""
        if self.several and not self._ended.is_set():
            self._ended.set()
            with contextlib.suppress(Exception):
                self._set(f"done/{self._index}", "")

    def leave(self, code: int, reason: str) -> None:
        """Ends this process with `code`, and the others with the reason; returns if it is alone."""
        if not self.several:
            return
        self._ended.set()
        with contextlib.suppress(Exception):
            self._set(f"left/{self._index}", json.dumps({"code": code, "reason": reason}))
        self._linger()
        self._exit(code)

    def wait_for_the_lost(self) -> None:
        """After a failed exchange: gives the watch the time to find out which process is gone."""
        time.sleep(1.5 * self.seconds + 3 * self._every)

    @property
    def _every(self) -> float:
        return min(2.0, self.seconds / 6)

    def _set(self, name: str, value: str) -> None:
        self._client.key_value_set(f"flaxpretrain/{name}", value, allow_overwrite=True)

    def _all(self, name: str) -> dict[int, str]:
        found = self._client.key_value_dir_get(f"flaxpretrain/{name}/")
        return {int(key.rpartition("/")[2]): value for key, value in found}

    def _watch(self) -> None:
        while not self._ended.wait(self._every):
            try:
                self._beat += 1
                self._set(f"beat/{self._index}", str(self._beat))
                if self._index == 0:
                    self._look_for_the_late()
                left = self._all("left")
            except Exception as error:  # whatever gRPC made of it
                if not self._ended.is_set():
                    self._end(program.EXIT_PEER_GONE, f"process 0 is gone ({_first_line(error)})")
                return
            for process, text in sorted(left.items()):
                told = json.loads(text)
                mistake = told["code"] in (program.EXIT_USER, program.EXIT_NOT_FINITE)
                code = told["code"] if mistake else program.EXIT_PEER_GONE
                self._end(code, f"process {process} {told['reason']}")

    def _look_for_the_late(self) -> None:
        """Of those that have begun to give signs of life; the join has its own deadline."""
        now, done = time.monotonic(), self._all("done")
        for process, beat in self._all("beat").items():
            if self._seen.get(process, ("", 0.0))[0] != beat:
                self._seen[process] = (beat, now)
            late = now - self._seen[process][1]
            if late > self.seconds and process not in done and process != 0:
                reason = (
                    f"gave no sign of life for {late:.0f} s: it was killed, or its host is gone"
                )
                told = {"code": program.EXIT_PEER_GONE, "reason": reason}
                self._set(f"left/{process}", json.dumps(told))

    def _end(self, code: int, reason: str) -> None:
        if self._ended.is_set():
            return
        self._ended.set()
        print(
            f"run_pretraining.py: process {self._index} of {self._count} stops: {reason}; "
            "earlier checkpoints are whole, run the same command again to go on",
            file=sys.stderr,
            flush=True,
        )
        self._linger()
        self._exit(code)

    def _linger(self) -> None:
        """The first process leaves last: with it goes the store that tells the others why."""
        with contextlib.suppress(Exception):
            self._set(f"bye/{self._index}", "")
            deadline = time.monotonic() + 3 * self._every + 2
            while self._index == 0 and time.monotonic() < deadline:
                here = set(range(self._count)) - self._all("bye").keys() - self._all("done").keys()
                if not here:
                    time.sleep(0.2)  # until their exits are through
                    return
                time.sleep(0.1)

    def _exit(self, code: int) -> NoReturn:
        # Not by an exception: JAX would wait at its shutdown for processes that are gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def is_failed_exchange(error: BaseException) -> bool:
    """Whether an error may come from another process that is gone."""
    text = f"{type(error).__name__}: {error}"
    return bool(re.search(r"gloo|nccl|UNAVAILABLE|coordination|DEADLINE_EXCEEDED", text, re.I))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
