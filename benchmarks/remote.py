"""What is far away, on this machine: a slow server of pictures, and a store that takes what S3 takes.

One process for both, with a thread for each connection. It prints its port. The store keeps nothing but counts, so
that it does not dominate what it measures; moto keeps all of an object in memory and hashes it.

- ``GET /picture/<n>``: the file named on the command line, after a delay.
- ``PUT /<bucket>/<key>``, and a multipart upload of the same: taken and thrown away.
- ``GET /stored``: how many bytes were taken, as JSON.
"""

import argparse
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

_PIECE_BYTES: Final = 1 << 20
_ETAG: Final = '"00000000000000000000000000000000"'
_INITIATED: Final = (
    b'<InitiateMultipartUploadResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
    b"<UploadId>1</UploadId></InitiateMultipartUploadResult>"
)
_COMPLETED: Final = (
    b'<CompleteMultipartUploadResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
    b"<ETag>" + _ETAG.encode() + b"</ETag></CompleteMultipartUploadResult>"
)


class Remote(ThreadingHTTPServer):
    """The server; *delay_s* is how long it takes to think of an answer to a GET."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, picture: bytes, delay_s: float) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.picture = picture
        self.delay_s = delay_s
        self.stored_bytes = 0
        self.lock = threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Remote

    def do_GET(self) -> None:
        if self.path == "/stored":
            self._answer(json.dumps({"bytes": self.server.stored_bytes}).encode())
            return
        time.sleep(self.server.delay_s)
        self._answer(self.server.picture, "image/png")

    def do_PUT(self) -> None:
        left = int(self.headers["Content-Length"])
        piece = memoryview(bytearray(_PIECE_BYTES))
        taken = 0
        while taken < left:
            some = self.rfile.readinto(piece[: min(_PIECE_BYTES, left - taken)])
            if not some:
                self.close_connection = True
                return
            taken += some
        with self.server.lock:
            self.server.stored_bytes += taken
        self._answer(b"")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._answer(_INITIATED if self.path.endswith("?uploads") else _COMPLETED, "application/xml")

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the base class calls it so
        """Say nothing."""

    def _answer(self, body: bytes, content_type: str = "text/plain") -> None:
        self.send_response(200)
        self.send_header("ETag", _ETAG)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--delay-s", type=float, default=0.0)
    options = parser.parse_args()
    remote = Remote(options.picture.read_bytes() if options.picture else b"", options.delay_s)
    print(remote.server_port, flush=True)
    remote.serve_forever()


if __name__ == "__main__":
    main()
