"""An HTTP proxy in front of an S3 endpoint: it checks checksums as S3 does, and injects faults."""

from __future__ import annotations

import base64
import hashlib
import http.client
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

WRITES = {"PUT", "POST", "DELETE"}


@dataclass(kw_only=True)
class Fault:
    """What happens to some of the requests: `times` of those whose method and path fit."""

    method: str
    part: str
    """A part of the path with its query, such as a file's name."""
    times: float = float("inf")
    status: int = 0
    """Answered instead of S3, with `code` as S3 would word it."""
    code: str = ""
    cut: int = -1
    """Bytes of the answer's body after which the connection is reset."""
    end: bool = False
    """Instead of a reset the answer ends there, and says that it was meant to."""
    stall: bool = False
    """At `cut`, silence until the peer gives up."""
    drop: bool = False
    """The connection is reset in the middle of the request: S3 sees none of it."""
    flip: bool = False
    """One bit of the body differs: of a request's during upload, of an answer's during download."""
    call: Callable[[], object] | None = None
    """Called before the request goes on."""
    seen: int = field(default=0)
    """Requests that fitted."""

    def fits(self, method: str, path: str) -> bool:
        if method != self.method or self.part not in path:
            return False
        self.seen += 1
        return self.seen <= self.times


class Proxy:
    """Forwards to `target`; while `refused` holds a method, that is answered with 503."""

    def __init__(self, target: str, certificate: tuple[str, str] | None = None) -> None:
        """`certificate` is (certificate, key), two files, for HTTPS."""
        host = urlsplit(target).netloc
        self.refused: set[str] = set()
        self.refusals = 0
        self.faults: list[Fault] = []
        self.stripped: set[str] = set()
        """Lower-case headers that are removed from requests."""
        self.requests: list[tuple[str, str]] = []
        self.closing = threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _forward(self) -> None:
                body = self._body()
                proxy.requests.append((self.command, self.path))
                if self.command in proxy.refused:
                    proxy.refusals += 1
                    self._answer(503, [], b"")
                    return
                fault = next((it for it in proxy.faults if it.fits(self.command, self.path)), None)
                if fault and fault.call:
                    fault.call()
                if fault and fault.drop:
                    self._break_off(stall=False)
                    return
                if fault and fault.status:
                    self._refuse(fault.status, fault.code)
                    return
                up = self.command in WRITES
                if fault and fault.flip and up and body:
                    body = body[:-1] + bytes([body[-1] ^ 1])
                promised = self.headers.get("x-amz-checksum-sha256")
                if (
                    promised
                    and base64.b64encode(hashlib.sha256(body).digest()).decode() != promised
                ):
                    # moto trusts the header; S3 computes the checksum.
                    self._refuse(400, "BadDigest")
                    return
                onward = http.client.HTTPConnection(host, timeout=60)
                left = {"expect", "transfer-encoding", "content-length", *proxy.stripped}
                headers = {k: v for k, v in self.headers.items() if k.lower() not in left}
                onward.request(self.command, self.path, body, headers)
                answer = onward.getresponse()
                content = answer.read()
                kept = [
                    (name, value)
                    for name, value in answer.getheaders()
                    if name.lower() not in ("transfer-encoding", "connection", "content-length")
                ]
                length = answer.getheader("Content-Length") or str(len(content))
                if fault and fault.flip and not up and content:
                    content = content[:-1] + bytes([content[-1] ^ 1])
                if fault and fault.cut >= 0 and content:
                    content = content[: fault.cut]
                    if fault.end:
                        length = str(len(content))
                self._answer(answer.status, [*kept, ("Content-Length", length)], content)
                if fault and fault.cut >= 0 and not fault.end:
                    self._break_off(fault.stall)
                onward.close()

            def _break_off(self, stall: bool) -> None:
                self.wfile.flush()
                if stall:
                    proxy.closing.wait(600)
                # No orderly end: a reset.
                self.connection.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
                self.connection.close()
                self.close_connection = True

            def _refuse(self, status: int, code: str) -> None:
                text = f"<Error><Code>{code}</Code><Message>injected</Message></Error>"
                kind = ("Content-Type", "application/xml")
                self._answer(status, [kind, ("Content-Length", str(len(text)))], text.encode())

            def _body(self) -> bytes:
                """Also of a body in chunks, as pyarrow sends it."""
                if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                while self.rfile.readline().strip():  # trailers
                    pass
                return b"".join(parts)

            def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
                self.send_response_only(status)
                for name, value in headers or [("Content-Length", "0")]:
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128  # a client gives up a connection after 5 s

            def handle_error(self, request: object, client_address: object) -> None:
                pass  # peers that give up are what is tested

        self._server = Server(("127.0.0.1", 0), Handler)
        scheme = "http"
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            scheme = "https"
        self.endpoint = f"{scheme}://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
