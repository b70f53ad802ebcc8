"""``rlx reward serve``: a reward behind HTTP, for runs elsewhere and for other trainers' clients.

What is asked and answered stands in ``rlx.core.reward_requests``; here are limits on what a client may do.
Bodies are neither logged nor kept.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rlx.core.errors import ConfigError
from rlx.core.reward_requests import Refusal, Served, read_request
from rlx.core.text import safe_text

SILENCE = 30.0  # seconds that a client may be silent, also between two requests of one connection
BODY_TIME = 60.0  # seconds in which a body must have come
QUEUE_TIME = 60.0  # seconds that a request waits for its turn
GRACE = 5.0  # seconds that requests under way get when the server is stopped


@dataclass(frozen=True)
class Limits:
    """What a client may ask for.

    Attributes:
        body: largest request, bytes.
        items: completions of one request.
        calls: calls of the reward at a time.
        connections: at a time; further ones are turned away.
        hosts: names, beside localhost and any address, by which clients may call a server without a token.
    """

    body: int = 16 * 2**20
    items: int = 1024
    calls: int = 1
    connections: int = 64
    hosts: frozenset[str] = frozenset()


class RewardServer(ThreadingHTTPServer):
    """Serves one reward.

    Args:
        address: host and port; port 0 takes a free one.
        served: the reward.
        token: what a client must show; empty for nothing.
        limits: what a client may ask for.
        label_column: the column that the labels of an openrlhf request become.

    Raises:
        ConfigError: an address beyond this machine without a token; one that cannot be had.
    """

    daemon_threads = True

    def __init__(
        self,
        address: tuple[str, int],
        served: Served,
        *,
        token: str = "",
        limits: Limits | None = None,
        label_column: str = "answer",
    ) -> None:
        self.served, self.token, self.label_column = served, token.encode(), label_column
        self.limits = limits or Limits()
        self.turns = threading.BoundedSemaphore(self.limits.calls)
        self._places = threading.BoundedSemaphore(self.limits.connections)
        self._idle, self._answering = threading.Condition(), 0
        if not token and not is_loopback(address[0]):
            raise ConfigError(
                "a server that other machines can reach needs a token",
                code="E-CONFIG-TOKEN",
                got=f"host {safe_text(address[0], 80)}, no token in the environment",
                hint="put one into the environment variable RLX_REWARD_TOKEN, or leave --host at 127.0.0.1",
            )
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        try:
            super().__init__(address, _Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"the address {safe_text(address[0], 80)}:{address[1]} cannot be had",
                code="E-CONFIG-ADDRESS",
                got=str(error),
                hint="take another port: --port 0 takes a free one",
            ) from error

    @property
    def url(self) -> str:
        """Where clients find it."""
        host, port = str(self.server_address[0]), self.server_address[1]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Take a connection, or turn it away if there are too many."""
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        try:
            request.sendall(
                b"HTTP/1.1 503 Busy\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            )
        except OSError:
            pass  # whoever is turned away may have gone already
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """One connection, to its end."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke off says so in a line; no body is quoted."""
        self.say(f"connection ended by {type(sys.exception()).__name__}")

    def say(self, line: str) -> None:
        """Log a line."""
        print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)

    def serve(self) -> None:
        """Serve until SIGINT or SIGTERM; requests under way get a few seconds, after a second signal none."""

        def stop(signum: int, frame: Any) -> None:
            # Not by an exception: it could come between a connection and its thread.
            signal.signal(signum, signal.default_int_handler)
            threading.Thread(target=self.shutdown, daemon=True).start()

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self.serve_forever(poll_interval=0.1)
            self.say("stopped")
            with self._idle:
                self._idle.wait_for(lambda: not self._answering, GRACE)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.server_close()
            self.served.close()

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Within it a request is under way."""
        with self._idle:
            self._answering += 1
        try:
            yield
        finally:
            with self._idle:
                self._answering -= 1
                self._idle.notify_all()


def is_loopback(host: str) -> bool:
    """Whether an address to listen at is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def called_name(host: str) -> str | None:
    """The name by which a client calls a server; None for an address.

    Args:
        host: a Host header: a name or an address, perhaps with a port.
    """
    named = re.fullmatch(r"(\[[^\[\]]*\]|[^:\[\]]*)(:[0-9]*)?", host.strip())
    name = host if named is None else named[1].strip("[]").lower().removesuffix(".")
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name
    return None


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: RewardServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "rlx", ""
    timeout = SILENCE

    def do_GET(self) -> None:
        """Whether the server is there."""
        try:
            self._check_name()
        except Refusal as refusal:
            self._send(refusal.status, {"error": refusal.why})
            return
        if self.path == "/health":
            self._send(200, {"status": "ok"})
        else:
            self._send(404, {"error": "GET /health, or POST a request for scores"})

    def do_POST(self) -> None:
        """Scores."""
        with self.server.answering():
            self._score()

    def _score(self) -> None:
        began, note = time.perf_counter(), ""
        try:
            asked = read_request(self._body(), self.server.label_column)
            if len(asked.completions) > self.server.limits.items:
                raise Refusal(413, f"more than {self.server.limits.items} completions in one request")
            if not self.server.turns.acquire(timeout=QUEUE_TIME):
                raise Refusal(503, "too many requests at a time")
            try:
                answer = self.server.served.answer(asked)
            finally:
                self.server.turns.release()
            status, note = 200, f"{len(asked.completions)} items, {asked.dialect}"
        except Refusal as refusal:
            status, answer = refusal.status, {"error": refusal.why}
        self._send(status, answer)
        self.server.say(f"{status} {note} {time.perf_counter() - began:.3f} s")

    def _check_name(self) -> None:
        """Without a token, see that the client calls this server by a name that is the server's.

        A page from elsewhere can have its own name lead to this machine, and its scripts may then read the
        answers. The browser still sends the page's name, and knows no token.

        Raises:
            Refusal: it calls by another name.
        """
        if self.server.token:
            return
        for name in map(called_name, self.headers.get_all("Host", [])):
            if name not in (None, "localhost", *self.server.limits.hosts):
                shown = safe_text(name, 80)
                allow = f"its owner can allow the name: --allow-host {shown}"
                raise Refusal(421, f"this server is not called {shown}; {allow}")

    def _body(self) -> bytes:
        """The request's body, once it is known that it may be read."""
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()) or "Transfer-Encoding" in self.headers:
            self.close_connection = True
            raise Refusal(411, "a Content-Length is needed")
        size = int(length[:20])
        try:
            self._check_name()
        except Refusal:
            self._drop(size)
            raise
        shown = self.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if self.server.token and not hmac.compare_digest(shown, b"Bearer " + self.server.token):
            self._drop(size)
            raise Refusal(401, "a token is needed: Authorization: Bearer …")
        if self.headers.get_content_type() != "application/json":
            # A page in a browser cannot send this type to another origin without asking first.
            self._drop(size)
            raise Refusal(415, "Content-Type must be application/json")
        if size > self.server.limits.body:
            self._drop(size)
            raise Refusal(413, f"more than {self.server.limits.body} bytes in one request")
        return self._receive(size)

    def _receive(self, size: int) -> bytes:
        """As many bytes, within their time."""
        ends, parts = time.monotonic() + BODY_TIME, []
        while size:
            part = self.rfile.read1(min(size, 2**16))
            if not part or time.monotonic() > ends:
                self.close_connection = True
                raise Refusal(408, "the body did not come in time")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _drop(self, size: int) -> None:
        """Let a body that is not wanted pass, so that the client reads why; and end the connection."""
        self.close_connection = True
        ends, size = time.monotonic() + 1.0, min(size, 2 * self.server.limits.body)
        while size and time.monotonic() < ends and (part := self.rfile.read1(min(size, 2**16))):
            size -= len(part)

    def _send(self, status: int, answer: Mapping[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in {401: [("WWW-Authenticate", "Bearer")], 503: [("Retry-After", "1")]}.get(
            status, []
        ):
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: paths may hold secrets, and http.server quotes what it could not read."""
