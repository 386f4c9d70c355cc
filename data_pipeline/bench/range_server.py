"""Small object server on loopback: ranges, ETags and listings as S3 and plain HTTP have them, for benchmarks and tests.

Objects are the files below a folder; `/BUCKET/KEY` is the file BUCKET/KEY, whoever asks: nothing is signed. A delay, a
bandwidth and faults can be set, so that the same server stands for a distant store or a broken one.
"""

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape, unescape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from urllib.parse import parse_qs, unquote, urlsplit

_PIECE = 1 << 16  # bytes that are sent at a time where the bandwidth is bounded


class RangeServer(ThreadingHTTPServer):
    """Server of the files below `root`."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, root: Path, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.root = root
        self.delay_s = 0.0
        """Time before each answer."""
        self.bytes_per_s = 0.0
        """Bandwidth that all connections share; 0 is without bound."""
        self.fault: Callable[[str, str], str | None] = lambda method, path: None
        """Fault of a request, by its method and path: a status as "500", "cut" (half of the body), "stall" (none of it), or
        "flip" (what is to be stored has a wrong bit)."""
        self.stall_s = 5.0
        """Time for which a stalled answer keeps its connection open."""
        self.seen: list[tuple[str, str, str]] = []
        """Method, path and range of each request."""
        self._turn, self._free_s = Lock(), 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of a client that has gone."""

    def wait_for(self, size: int) -> None:
        """Wait until `size` bytes may leave."""
        if self.bytes_per_s:
            with self._turn:
                self._free_s = max(self._free_s, time.monotonic()) + size / self.bytes_per_s
                wait_s = self._free_s - time.monotonic()
            time.sleep(max(wait_s, 0))


@contextmanager
def serving(root: Path) -> Iterator[RangeServer]:
    """Serve the folder from a thread of this process."""
    with RangeServer(root) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16
    server: RangeServer

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        place = urlsplit(self.path)
        asked = parse_qs(place.query)
        if "list-type" in asked:
            self._answer(self._list(unquote(place.path), asked), {"Content-Type": "application/xml"})
        else:
            self._get(unquote(place.path))

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        path = unquote(urlsplit(self.path).path)
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((self.command, path, ""))
        fault = self.server.fault(self.command, path)
        if fault == "flip":
            data, fault = bytes([data[0] ^ 1]) + data[1:], None
        if not self._fail(fault, b"", {}):
            file = self._file(path)
            file.parent.mkdir(parents=True, exist_ok=True)
            beside = file.with_name(f".{file.name}.partial")
            beside.write_bytes(data)
            beside.replace(file)
            self._answer(b"", {"ETag": _etag(file)})

    def _get(self, path: str) -> None:
        self.server.seen.append((self.command, path, self.headers.get("Range", "")))
        time.sleep(self.server.delay_s)
        file = self._file(path)
        if not file.is_file():
            return self._answer(b"", status=404)
        etag, size = _etag(file), file.stat().st_size
        if self.headers.get("If-Match", etag) != etag:
            return self._answer(b"", status=412)
        headers = {"ETag": etag, "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT", "Accept-Ranges": "bytes"}
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, end = (int(found[1]), min(int(found[2]) + 1, size)) if found else (0, size)
        if found:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        if self.command == "HEAD":
            return self._answer(b"", headers, length=size)
        with open(file, "rb") as stream:
            stream.seek(start)
            data = stream.read(end - start)
        if not self._fail(self.server.fault(self.command, path), data, headers):
            self._answer(data, headers, status=206 if found else 200)

    def _list(self, path: str, asked: dict[str, list[str]]) -> bytes:
        bucket = self.server.root / path.strip("/")
        prefix = asked.get("prefix", [""])[0]
        files = sorted(file for file in bucket.rglob("*") if file.is_file())
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>{escape(_etag(file))}</ETag><Size>{file.stat().st_size}</Size></Contents>"
            for file in files
            if (key := file.relative_to(bucket).as_posix()).startswith(prefix)
        )
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>".encode()

    def do_POST(self) -> None:
        """Remove the objects that the request lists, which is the only use of POST here."""
        bucket = unquote(urlsplit(self.path).path)
        listed = self.rfile.read(int(self.headers["Content-Length"])).decode()
        keys = re.findall("<Key>(.*?)</Key>", listed)
        for key in keys:
            path = f"{bucket.rstrip('/')}/{unescape(key)}"
            self.server.seen.append(("DELETE", path, ""))
            self._file(path).unlink(missing_ok=True)
        removed = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
        self._answer(f"<DeleteResult>{removed}</DeleteResult>".encode(), {"Content-Type": "application/xml"})

    def _fail(self, fault: str | None, data: bytes, headers: dict[str, str]) -> bool:
        """Fail as `fault` says. Returns True where that has ended the request."""
        if fault is None:
            return False
        if fault.isdecimal():
            self._answer(b"<Error><Code>InternalError</Code></Error>", status=int(fault))
            return True
        self.close_connection = True
        self.send_response_only(206 if "Content-Range" in headers else 200)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault == "cut" else b"")
        self.wfile.flush()
        if fault == "stall":
            time.sleep(self.server.stall_s)
        return True

    def _answer(
        self, data: bytes, headers: dict[str, str] | None = None, status: int = 200, length: int | None = None
    ) -> None:
        self.send_response_only(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        for start in range(0, len(data), _PIECE if self.server.bytes_per_s else len(data) or 1):
            piece = memoryview(data)[start : start + (_PIECE if self.server.bytes_per_s else len(data))]
            self.server.wait_for(len(piece))
            self.wfile.write(piece)
        self.wfile.flush()

    def _file(self, path: str) -> Path:
        return self.server.root / Path(path.lstrip("/"))


def _etag(file: Path) -> str:
    entry = file.stat()
    return f'"{hashlib.md5(f"{entry.st_mtime_ns} {entry.st_size} {entry.st_ino}".encode(), usedforsecurity=False).hexdigest()}"'
