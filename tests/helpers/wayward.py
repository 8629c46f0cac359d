"""A web server on the loopback that answers as told: well, cut off, stalled, lying, or with something else."""

import http.server
import random
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

DATA = random.Random(0).randbytes(640_000)  # no two parts of it are alike
OTHER = random.Random(1).randbytes(len(DATA))


@dataclass(frozen=True)
class Answer:
    """How one request is answered; the default is what a good server does, ranges and If-Range included."""

    body: bytes = DATA
    status: int = 0  # an answer of this status without a body
    version: tuple[str, str] | None = ("ETag", '"one"')
    ranges: str = "honest"  # honest | ignored | blind (to If-Range) | shifted | short | unnamed | refused
    headers: dict[str, str] = field(default_factory=dict)
    announce: int | None = 0  # added to the Content-Length; None: no length, the end of the connection is the end
    chunked: bool = False
    cut: int | None = None  # bytes of this answer's body, after which the connection ends
    hold: threading.Event | None = None  # falls silent until then, and ends
    drip: float = 0.0  # seconds between hundreds of bytes
    raw: bytes | None = None  # instead of HTTP
    to: str = ""  # a redirect


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        answers = self.server.answers[self.path]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if answer.raw is not None:
            self._note(0)
            self.wfile.write(answer.raw)
            if answer.hold:
                answer.hold.wait(30)
        elif answer.to:
            self._head(302, {"Location": answer.to})
        elif answer.status:
            self._head(answer.status, {"Content-Length": "0", **answer.headers})
        else:
            self._serve(answer)

    def _note(self, status):
        self.server.asked.append((self.path, status, self.headers["Range"]))

    def _serve(self, answer):
        start, status, body = self._range(answer)
        headers = dict([answer.version] if answer.version else [])
        if status == 206 and answer.ranges != "unnamed":
            first, total = start - (answer.ranges == "shifted"), len(answer.body) - (answer.ranges == "short")
            headers["Content-Range"] = f"bytes {first}-{total - 1}/{total}"
        if status == 416:
            body = b""
        if answer.chunked:
            headers["Transfer-Encoding"] = "chunked"
        elif answer.announce is not None:
            headers["Content-Length"] = str(len(body) + answer.announce)
        self._head(status, {**headers, **answer.headers})
        with suppress(ConnectionError):  # the other side has heard enough
            self._body(answer, body)

    def _range(self, answer):
        """Where to start, the status, and the body."""
        if "Range" not in self.headers or answer.ranges == "ignored":
            return 0, 200, answer.body
        if answer.ranges == "refused":
            return 0, 416, b""
        same = answer.version is not None and self.headers["If-Range"] == answer.version[1]
        if not same and answer.ranges == "honest":
            return 0, 200, answer.body
        start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        return (start, 206, answer.body[start:]) if start < len(answer.body) else (0, 416, b"")

    def _head(self, status, headers):
        self._note(status)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _body(self, answer, body):
        body = body[: answer.cut]
        if answer.chunked:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(body), body))
            if answer.cut is None:
                self.wfile.write(b"0\r\n\r\n")
        elif answer.drip:
            for start in range(0, len(body), 100):
                self.wfile.write(body[start : start + 100])
                time.sleep(answer.drip)
        else:
            self.wfile.write(body)
        if answer.hold:
            answer.hold.wait(30)

    def log_message(self, *_):
        pass


@contextmanager
def serving():
    """A running server: `answers` {path: [Answer, ...]}, the last of which stays; `asked` [(path, status, Range)]."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    server.answers, server.asked = {}, []
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
