"""A bucket of Google's on this machine, in which nothing can be appended to or renamed."""

import contextlib
import http.server
import threading

from gcp_storage_emulator import server as emulator

NAME = "bucket"


class Bucket:
    """Serves gs://bucket; counts what was refused, and refuses everything if told to."""

    def __init__(self) -> None:
        self.renames: list[str] = []
        self.refuses: str | None = None
        self.url = ""

    def names(self, prefix=""):
        """The objects whose names begin so."""
        import fsspec

        system = fsspec.filesystem("gs")
        system.invalidate_cache()
        found = system.find(f"{NAME}/{prefix}") if system.exists(f"{NAME}/{prefix}") else []
        return [path.removeprefix(f"{NAME}/") for path in found]

    def read(self, name):
        import fsspec

        return fsspec.filesystem("gs").cat_file(f"{NAME}/{name}").decode()


@contextlib.contextmanager
def serving(monkeypatch):
    """A bucket that this process, and those it starts, find at gs://bucket."""
    bucket, lock = Bucket(), threading.Lock()
    handle = emulator.Router.handle

    def one_at_a_time(router, method):
        handler = router._request_handler
        with lock:
            if "/copyTo/" in handler.path or "/rewriteTo/" in handler.path:
                bucket.renames.append(handler.path)
            refused = bucket.renames[-1:] == [handler.path]
            if refused or (bucket.refuses is not None and bucket.refuses in handler.path):
                length = int(handler.headers.get("Content-Length") or 0)
                handler.rfile.read(length)
                handler.send_response(403)
                handler.send_header("Content-Length", "0")
                handler.end_headers()
                return
            handle(router, method)

    # The emulator answers one connection after another, and clients keep theirs open.
    monkeypatch.setattr(emulator.server, "HTTPServer", http.server.ThreadingHTTPServer)
    monkeypatch.setattr(http.server.ThreadingHTTPServer, "daemon_threads", True)
    monkeypatch.setattr(emulator.Router, "handle", one_at_a_time)
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket=NAME)
    server.start()
    bucket.url = f"http://127.0.0.1:{server._api._httpd.server_address[1]}"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", bucket.url)
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", bucket.url)
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    try:
        yield bucket
    finally:
        server.stop()
