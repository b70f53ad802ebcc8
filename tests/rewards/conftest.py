"""A reward server that answers as a test says, on this machine: every answer is the bytes that it sends."""

from __future__ import annotations

import json
import socketserver
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from rlx.core.batch import Prompts
from rlx.core.scoring import NamedReward, RewardRunner, Scored
from rlx.plugins.references import make

TLS = Path(__file__).parent / "tls"
RESET = object()  # an answer: the connection is broken off


@dataclass
class Request:
    """What a client sent: the request's number, its headers in lower case, its JSON."""

    number: int
    headers: dict[str, str]
    said: dict[str, Any]


@dataclass
class Stub:
    """A server with what it was asked."""

    answer: Callable[[Request], Any]
    port: int = 0
    scheme: str = "http"
    requests: list[Request] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        host = "localhost" if self.scheme == "https" else "127.0.0.1"
        return f"{self.scheme}://{host}:{self.port}/score"


class _Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        stub: Stub = self.server.stub
        if not self.rfile.readline():
            return  # a connection that was opened and not used
        headers = {}
        while line := self.rfile.readline().strip():
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        said = json.loads(self.rfile.read(int(headers["content-length"])))
        with stub.lock:
            request = Request(len(stub.requests), headers, said)
            stub.requests.append(request)
        answer = stub.answer(request)
        if answer is RESET:
            return
        try:
            for part in [answer] if isinstance(answer, bytes) else answer:
                self.wfile.write(part)
        except OSError:
            pass  # the client has seen enough


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = allow_reuse_address = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that refuses a certificate ends the connection."""


def reply(body: Any = b"", status: int = 200, **headers: str) -> bytes:
    """A whole answer; what is not bytes is sent as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"HTTP/1.1 {status} Any", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in {"Content-Length": str(len(data)), **named}.items()]
    return "\r\n".join([*lines, "", ""]).encode() + data


def lengths(request: Request) -> bytes:
    """The right answer in the native dialect: the length of each completion."""
    said = request.said
    return reply({"scores": [float(len(text)) for text in said["completions"]], "ids": said["ids"]})


def score(url: str, completions: list[str], *, on_error: str = "raise", **options: Any) -> Scored:
    """What a run would get for completions; repetitions come quickly."""
    reward = make("reward", url, {"max_wait": 0.02, **options})
    count = len(completions)
    prompts = Prompts(
        [[1]] * count, ["hi"] * count, [None] * count, {"answer": ["7"] * count}, [*range(count)]
    )
    runner = RewardRunner([NamedReward("http", reward)], on_error=on_error)
    return runner.score(prompts, completions, [[1, 2]] * count)


class Http:
    """What tests of rewards over HTTP need."""

    RESET, TLS = RESET, TLS
    reply, lengths, score = staticmethod(reply), staticmethod(lengths), staticmethod(score)

    def __init__(self) -> None:
        self.servers: list[_Server] = []

    def stub(self, answer: Callable[[Request], Any] = lengths, *, tls: bool = False, port: int = 0) -> Stub:
        """A server that is up."""
        server = _Server(("127.0.0.1", port), _Handler)
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(TLS / "certificate.pem", TLS / "key.pem")
            server.socket = context.wrap_socket(
                server.socket, server_side=True, do_handshake_on_connect=False
            )
        server.stub = Stub(answer, server.server_address[1], "https" if tls else "http")
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        self.servers.append(server)
        return server.stub

    def down(self, stub: Stub) -> None:
        """Take a server away."""
        [server] = [server for server in self.servers if server.stub is stub]
        self.servers.remove(server)
        server.shutdown()
        server.server_close()


@pytest.fixture
def http() -> Iterator[Http]:
    """Stub servers, taken down after the test."""
    tools = Http()
    yield tools
    for server in tools.servers:
        server.shutdown()
        server.server_close()
