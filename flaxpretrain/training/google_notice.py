"""Google Cloud's notice that it will take a machine away, answered as a SIGTERM is.

A machine learns of it from its metadata server: 30 seconds before a spot machine goes, up to an
hour before maintenance ends one with accelerators.
Reference: cloud.google.com/compute/docs, instances/spot and metadata/getting-live-migration-notice
"""

import http.client
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ADDRESS = "169.254.169.254"
"""Of the metadata server; asked for by number, so that no start waits for a name."""

PRODUCT = Path("/sys/class/dmi/id/product_name")
"""What the machine says it is, which tells without a network whether it is Google's."""

NOTICES = {"preempted": "TRUE", "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}
"""What the server says when the machine will go; one that migrates to another host goes on."""

POLL_SECONDS = 1.0
ANSWER_SECONDS = 5.0

_FLAVOR = {"Metadata-Flavor": "Google"}


class _NotGoogleError(Exception):
    """Another server answers at the address."""


def metadata_server(environment: Mapping[str, str], product: Path = PRODUCT) -> str | None:
    """HOST or HOST:PORT of the metadata server; None on machines that are not Google's.

    GCE_METADATA_HOST and GCE_METADATA_IP name another one, NO_GCE_CHECK=true none, as they do for
    Google's own libraries.
    """
    if environment.get("NO_GCE_CHECK", "").lower() == "true":
        return None
    told = environment.get("GCE_METADATA_HOST") or environment.get("GCE_METADATA_IP")
    if told:
        return told
    try:
        return ADDRESS if product.read_text().startswith("Google") else None
    except OSError:
        return None


def terminate(notice: str) -> None:
    """Tells this process to save and leave, as a SIGTERM from elsewhere does."""
    print(f"Google Cloud will take this machine away ({notice})", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)


class GoogleNotice:
    """Looks for notices from a thread while its context lasts; acts on the first new one.

    One that stood before is not acted on: the run was started again in spite of it, and goes on
    until the machine stops.
    """

    def __init__(
        self,
        act: Callable[[str], Any] = terminate,
        *,
        environment: Mapping[str, str] = os.environ,
        product: Path = PRODUCT,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        """Nothing is asked before the context is entered."""
        self._act, self._poll_seconds = act, poll_seconds
        self._server = metadata_server(environment, product)
        self._over = threading.Event()
        self.thread: threading.Thread | None = None

    def __enter__(self) -> "GoogleNotice":
        """Starts the thread on Google's machines, and waits for nothing."""
        if self._server is not None:
            self.thread = threading.Thread(
                target=self._watch, args=(self._server,), name="google notice", daemon=True
            )
            self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Lets the thread end."""
        self._over.set()

    def _watch(self, server: str) -> None:
        before: dict[str, str] | None = None
        while not self._over.is_set():
            try:
                seen = {name: _read(server, name) for name in NOTICES}
            except _NotGoogleError:
                return
            except (OSError, http.client.HTTPException):
                pass  # asked again: the server may be late
            else:
                before = seen if before is None else before
                for name, value in seen.items():
                    if value == NOTICES[name] != before[name] and not self._over.is_set():
                        self._act(f"{name}: {value}")
                        return
                before = seen
            self._over.wait(self._poll_seconds)


def _read(server: str, name: str) -> str:
    """A value of the machine's metadata; empty where the server does not know it."""
    connection = http.client.HTTPConnection(server, timeout=ANSWER_SECONDS)  # past any proxy
    try:
        connection.request("GET", f"/computeMetadata/v1/instance/{name}", headers=_FLAVOR)
        answer = connection.getresponse()
        if answer.getheader("Metadata-Flavor") != _FLAVOR["Metadata-Flavor"]:
            raise _NotGoogleError
        text = answer.read().decode().strip()
        return text if answer.status == http.HTTPStatus.OK else ""
    finally:
        connection.close()
