"""A web server of one folder that serves ranges of bytes, after a delay: a store far away.

    python benchmarks/range_server.py FOLDER --delay-ms 50

Prints its address. It can be told to fail: every n-th request with a status, or cut off answers.
"""

import argparse
import http.server
import itertools
import re
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flaxpretrain import program


class RangeServer(http.server.ThreadingHTTPServer):
    """Serves the files of a folder on a free port of this machine."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path, delay_seconds: float = 0.0) -> None:
        """Binds a port; `serve_forever` answers."""
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.delay_seconds = Path(folder), delay_seconds
        self.fail_every, self.fail_status = 0, 503
        self.cut_bytes, self.ranges = 0, True
        self.requests: list[str] = []
        self._number = itertools.count(1)

    @property
    def url(self) -> str:
        """The address of the folder."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fails(self) -> bool:
        """Whether the next answer is a failure."""
        return bool(self.fail_every) and next(self._number) % self.fail_every == 0

    def __enter__(self) -> "RangeServer":
        """Serves from a thread until the context ends."""
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stops."""
        self.shutdown()
        self.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: RangeServer

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        server, path = self.server, self.server.folder / self.path.lstrip("/")
        server.requests.append(f"{self.command} {self.path}")
        time.sleep(server.delay_seconds)
        if server.fails():
            self._say(server.fail_status, b"", {})
            return
        if path.is_dir():
            names = sorted(p.name + "/" * p.is_dir() for p in path.iterdir())
            links = "".join(f'<a href="{name}">{name}</a>\n' for name in names)
            self._say(200, links.encode() if body else b"", {"Content-Type": "text/html"})
            return
        if not path.is_file():
            self._say(404, b"", {})
            return
        size = path.stat().st_size
        begin, end, status, headers = 0, size, 200, {"Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and server.ranges:
            begin, status = int(asked[1]), 206
            end = min(int(asked[2]) + 1, size) if asked[2] else size
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
        with path.open("rb") as file:
            file.seek(begin)
            content = file.read(end - begin) if body else b""
        if body:
            self._say(status, content[: len(content) - server.cut_bytes], headers)
        else:
            self._say(status, b"", headers | {"Content-Length": str(end - begin)})

    def _say(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Quiet."""


def main(argv: list[str]) -> None:
    """Serves until it is ended."""
    parser = program.Parser(__doc__)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="what to serve")
    parser.add_argument("--delay-ms", type=float, default=50.0, help="before each answer")
    arguments: argparse.Namespace = parser.parse_args(argv)
    server = RangeServer(arguments.folder, arguments.delay_ms / 1000)
    print(server.url, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    program.run(main)
