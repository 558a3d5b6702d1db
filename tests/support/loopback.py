"""HTTP servers on loopback that answer by routes, and go wrong where a test wants them to."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import struct
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit


@dataclass
class Request:
    """`path` is without the query and still quoted; the names of `headers` are in lower case."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: Mapping[str, str]
    body: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")


@dataclass
class Response:
    """`body` is sent as it is if it is bytes, else as JSON."""

    body: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """An answer that says no, in the Hub's words: `code` is what the client tells its errors apart by."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        named = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.response = Response({"error": message}, status, {**named, **headers})


#: A method, a regular expression that the whole path matches, and what answers, given the request and its groups. A
#: `HEAD` is a `GET` whose body is not sent.
Route = tuple[str, str, Callable[..., Response]]


@dataclass
class _Fault:
    method: str
    pattern: str
    nth: int
    #: The status to answer with; `None`: the connection breaks in the middle of the request.
    status: int | None
    #: Set in the middle of the request, which is then not answered before its client is gone.
    held: threading.Event | None = None
    seen: int = 0


class Traffic:
    """
    What the servers have in common: a lock, so that one request at a time is answered, what is to go wrong, and the
    method, path and status (0: broken off) of each request so far.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, int]] = []
        self.faults: list[_Fault] = []
        self.lock = threading.Lock()

    def fail(self, method: str, pattern: str, status: int | None, nth: int = 1) -> None:
        """
        Answer the `nth` request from now on with `status`, or break the connection in its middle where it is `None`.

        Args:
            method (`str`): Such as `"POST"`.
            pattern (`str`): A regular expression that the whole path matches.
        """
        self.faults.append(_Fault(method, pattern, nth, status))

    def hold(self, method: str, pattern: str, nth: int = 1) -> threading.Event:
        """
        Leave the `nth` request from now on without an answer until its client is gone.

        Returns:
            `threading.Event`: Set once the request is under way.
        """
        held = threading.Event()
        self.faults.append(_Fault(method, pattern, nth, None, held))
        return held

    def fault(self, request: Request) -> _Fault | None:
        """What goes wrong with this request."""
        with self.lock:
            for fault in self.faults:
                if fault.method == request.method and re.fullmatch(fault.pattern, request.path):
                    fault.seen += 1
                    if fault.seen == fault.nth:
                        return fault
        return None


class Server(ThreadingHTTPServer):
    """
    A server on a free port of 127.0.0.1, that runs in a thread of its own from `start` to `stop`.

    Args:
        routes (`list[Route]`): What it answers.
        traffic ([`Traffic`]): What it is asked, and where it is to fail.
        host (`str`): What it calls itself.
    """

    daemon_threads = True

    def __init__(self, routes: list[Route], traffic: Traffic, host: str = "127.0.0.1") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.host = host
        self.routes = routes
        self.traffic = traffic

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.server_port}"

    def start(self) -> None:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that are gone: tests kill them."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def answer(self, request: Request) -> Response:
        method = "GET" if request.method == "HEAD" else request.method
        for wanted, pattern, respond in self.routes:
            match = re.fullmatch(pattern, request.path)
            if match and method == wanted:
                with self.traffic.lock:
                    try:
                        return respond(request, **match.groupdict())
                    except Refusal as refusal:
                        return refusal.response
        return Response({"error": f"the stand-in knows no {request.method} {request.path}"}, 501)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def _handle(self) -> None:
        split, traffic = urlsplit(self.path), self.server.traffic
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, split.path, parse_qs(split.query), headers)
        fault = traffic.fault(request)
        if fault is not None and fault.status is None:
            self.rfile.read(int(headers.get("content-length", 0)) // 2)
            traffic.requests.append((request.method, request.path, 0))
            if fault.held is not None:
                fault.held.set()
                with contextlib.suppress(OSError):
                    self.rfile.read()
            self._break_off()
            return
        request.body = self._read_body(headers)
        if fault is not None and fault.status is not None:
            response = Refusal(fault.status, "Something went wrong").response
        else:
            response = self.server.answer(request)
        traffic.requests.append((request.method, request.path, response.status))
        self._send(response)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _read_body(self, headers: Mapping[str, str]) -> bytes:
        if headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(headers.get("content-length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, response: Response) -> None:
        is_json = not isinstance(response.body, bytes)
        body = json.dumps(response.body).encode() if is_json else response.body
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json" if is_json else "application/octet-stream")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _break_off(self) -> None:
        # With this the connection is reset, not closed in order.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Keep the tests' output clean."""
