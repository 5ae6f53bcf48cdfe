"""A hub on this machine that knows just enough of the protocol to take and give a model."""

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_tokenOfTheTestsOnly"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(ThreadingHTTPServer):
    """Keeps what was pushed in `files`, and the bodies of repositories made in `made`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.made: list[dict] = []
        self.gate = threading.Event()
        self.gate.set()
        self.requests: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextlib.contextmanager
def running() -> Iterator[FakeHub]:
    """The server on a thread."""
    hub = FakeHub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.gate.set()
        hub.shutdown()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Says nothing on the terminal."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append(self.path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid credentials"})
        self.server.gate.wait(30)
        if self.path == "/api/repos/create":
            values = json.loads(body)
            if values.get("organization") == "forbidden":
                return self._answer(403, {"error": "no rights"})
            self.server.made.append(values)
            name = f"{values.get('organization', 'me')}/{values['name']}"
            return self._answer(200, {"url": f"{self.server.address}/{name}", "name": name})
        if self.path == "/api/validate-yaml":
            problem = {"message": '"license" must be one of those listed'}
            errors = [problem] if b"license: nonsense" in body else []
            return self._answer(400 if errors else 200, {"errors": errors, "warnings": []})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
            ]
            return self._answer(200, {"files": modes})
        if "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
            name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            url = f"{self.server.address}/{name}/commit/{COMMIT}"
            return self._answer(200, {"commitUrl": url, "commitOid": COMMIT, "success": True})
        return self._answer(404, {"error": self.path})

    def do_GET(self):
        self.server.requests.append(self.path)
        if self.path.startswith("/api/models/"):
            if "nobody" in self.path or "forbidden" in self.path:
                return self._answer(404, {"error": "no"}, {"X-Error-Code": "RepoNotFound"})
            siblings = [{"rfilename": name} for name in self.server.files]
            if "/tree/" in self.path:
                return self._answer(
                    200,
                    [
                        {"type": "file", "path": n, "size": len(b), "oid": COMMIT}
                        for n, b in self.server.files.items()
                    ],
                )
            return self._answer(200, {"id": "me/model", "sha": COMMIT, "siblings": siblings})
        return self._file(send=True)

    def do_HEAD(self):
        self.server.requests.append(self.path)
        return self._file(send=False)

    def _file(self, send: bool):
        name = self.path.rpartition("/")[2]
        if name not in self.server.files:
            return self._answer(404, {"error": name}, {"X-Error-Code": "EntryNotFound"})
        content = self.server.files[name]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{abs(hash(content)):x}"'}
        return self._send(200, content, headers, send)

    def _answer(self, status: int, values, headers=None):
        self._send(status, json.dumps(values).encode(), headers or {}, self.command != "HEAD")

    def _send(self, status: int, content: bytes, headers: dict, with_body: bool):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)
