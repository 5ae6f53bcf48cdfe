"""A bucket of Amazon's on this machine."""

import contextlib

import fsspec
import pytest

for module in ("s3fs", "flask_cors", "moto"):
    pytest.importorskip(module, reason='pip install s3fs "moto[s3]" flask flask-cors')
server = pytest.importorskip("moto.server")


@contextlib.contextmanager
def serving(monkeypatch, folder):
    """Serves a folder at s3://bucket."""
    store = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    store.start()
    host, port = store.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")
    try:
        system = fsspec.filesystem("s3")
        system.mkdir("bucket")
        system.put(f"{folder}/", "bucket/", recursive=True)
        yield
        system.rm("bucket", recursive=True)  # the emulator keeps its state from server to server
    finally:
        store.stop()
        fsspec.filesystem("s3").clear_instance_cache()
