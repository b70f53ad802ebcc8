"""One exchange with a server that a user named, with limits on everything that the server decides.

No redirect is followed, no cookie kept, no proxy of the environment used, no address of a cloud's metadata
service spoken to. An answer is read up to a size and a time, unpacked or not.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
import zlib
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpcore2

from rlx.core.servers import ServerError, excerpt, is_metadata, read_retry_after
from rlx.core.text import redact, safe_text

# 501 and 505 say that the server will never do it; these and every other 5xx may pass.
PASSING = frozenset({408, 425, 429, *range(500, 600)} - {501, 505})
ERROR_HEAD = 2_000  # bytes read of an answer that is an error
LEAST_SECRET = 8  # bytes; a shorter one, as servers of one's own may have, could stand in any right answer


class _Guarded(httpcore2.AnyIOBackend):
    """Connects only to addresses that were looked at: the name is resolved once, then its addresses tried."""

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        loop, failure = asyncio.get_running_loop(), "no address"
        try:
            async with asyncio.timeout(timeout):
                found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, TimeoutError) as error:
            raise httpcore2.ConnectError(f"the name is not resolved: {error}") from error
        addresses = dict.fromkeys(str(entry[4][0]) for entry in found)
        for address in addresses:
            if is_metadata(address):
                raise ServerError(
                    f"the server's address {address} is link-local or a metadata service",
                    expected="an address of a server of yours",
                )
        for address in addresses:
            try:
                return await super().connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = f"{address}: {_innermost(error)}"
        raise httpcore2.ConnectError(failure)


@dataclass(frozen=True, repr=False)  # repr would show the secret
class Client:
    """Speaks to one server.

    Attributes:
        url: where to.
        pool: its connections.
        headers: of every request; they may hold a secret.
        secret: text that is taken out of what the server answers, empty for none.
        connect_timeout, read_timeout: seconds, None for no limit.
        who: what messages call the server.
        hints: status of a refusal, ``size`` or ``certificate`` → what to do about it.
    """

    url: str
    pool: httpcore2.AsyncConnectionPool
    headers: tuple[tuple[bytes, bytes], ...]
    secret: bytes
    connect_timeout: float | None
    read_timeout: float | None
    who: str
    hints: Mapping[int | str, str]

    async def post(self, body: bytes, limit: int) -> bytes:
        """Send a body and return that of the answer.

        Args:
            body: JSON.
            limit: largest answer, bytes.

        Raises:
            ServerError: no answer, one that is no success, or one that is too large.
        """
        timeouts = {
            "connect": self.connect_timeout,
            "read": self.read_timeout,
            "write": self.read_timeout,
            "pool": None,
        }
        try:
            async with self.pool.stream(
                "POST", self.url, headers=list(self.headers), content=body, extensions={"timeout": timeouts}
            ) as response:
                known = {name.lower(): value for name, value in response.headers}
                if not 200 <= response.status < 300:
                    raise self._refusal(response.status, known, self._clean(await _head(response)))
                reply = await self._read(response, known, limit)
                return self._clean(reply) if len(self.secret) >= LEAST_SECRET else reply
        except (httpcore2.TimeoutException, httpcore2.NetworkError, httpcore2.ProtocolError) as error:
            raise self._broken(error) from error

    def _clean(self, body: bytes) -> bytes:
        """A body without the secret, should the server repeat it, also as JSON may write it."""
        for form in {self.secret, self.secret.replace(b"/", rb"\/")} - {b""}:
            body = body.replace(form, b"<redacted>")
        return body

    def _refusal(self, status: int, headers: Mapping[bytes, bytes], body: bytes) -> ServerError:
        """The error for an answer that is no success."""
        if 300 <= status < 400:
            target = safe_text(
                redact(self._clean(headers.get(b"location", b"nowhere")).decode("latin-1")), 200
            )
            return ServerError(
                f"{self.who} answered {status}: it redirects to {target}",
                hint="redirects are not followed; give the server's own address",
            )
        asked = headers.get(b"retry-after")
        return ServerError(
            f"{self.who} answered {status}",
            passing=status in PASSING,
            busy=status == 429 or asked is not None,
            wait=None if asked is None else read_retry_after(asked.decode("latin-1").strip(), time.time()),
            got=excerpt(body),
            hint=self.hints.get(status, ""),
        )

    async def _read(self, response: httpcore2.Response, headers: Mapping[bytes, bytes], limit: int) -> bytes:
        """A body, unpacked, that never takes more than limit bytes."""
        encoding = headers.get(b"content-encoding", b"identity").lower().strip()
        if encoding not in (b"identity", b"gzip", b"deflate"):
            raise ServerError(
                f"{self.who}'s answer is packed: {safe_text(encoding.decode('latin-1'), 40)}",
                expected="Content-Encoding identity, as the request asks for, gzip or deflate",
            )
        unpack = None if encoding == b"identity" else zlib.decompressobj(wbits=47)  # gzip and zlib alike
        body, received = bytearray(), 0
        async for chunk in response.aiter_stream():
            received += len(chunk)
            try:
                body += chunk if unpack is None else unpack.decompress(chunk, limit + 1 - len(body))
            except zlib.error as error:
                raise ServerError(f"{self.who}'s packed answer is damaged", got=str(error)) from None
            if len(body) > limit or received > limit:
                raise ServerError(
                    f"{self.who}'s answer is larger than {limit} bytes",
                    hint=self.hints.get("size", ""),
                )
        return bytes(body)

    def _broken(self, error: Exception) -> ServerError:
        """The error for an exchange that did not come to its end."""
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ssl.SSLCertVerificationError):
                return ServerError(
                    f"{self.who}'s certificate is not trusted",
                    got=safe_text(cause.verify_message),
                    hint=self.hints.get("certificate", ""),
                )
            cause = cause.__cause__ or cause.__context__
        kinds = {httpcore2.ConnectError: "cannot be reached", httpcore2.ConnectTimeout: "cannot be reached",
                 httpcore2.ReadTimeout: "is silent for too long"}  # fmt: skip
        told = safe_text(self._clean(str(error).encode()).decode(), 200) or type(error).__name__
        return ServerError(
            f"{self.who} {kinds.get(type(error), 'broke the connection off')}: {told}", passing=True
        )


@asynccontextmanager
async def connect(
    url: str,
    *,
    token: tuple[str, str] | None,
    ca_file: str | None,
    connections: int,
    connect_timeout: float | None,
    read_timeout: float | None,
    who: str,
    hints: Mapping[int | str, str],
) -> AsyncIterator[Client]:
    """A client whose connections are closed at the end of the block.

    Args:
        url: where to.
        token: header and the secret that it holds, or None.
        ca_file: certificates that are trusted, in the place of the system's.
        connections: at most so many at once.
        connect_timeout: seconds, None for no limit.
        read_timeout: longest silence, seconds, None for no limit.
        who: what messages call the server.
        hints: status of a refusal, ``size`` or ``certificate`` → what to do about it.
    """
    headers = [
        (b"Host", urlsplit(url).netloc.encode("ascii")),
        (b"Content-Type", b"application/json"),
        (b"Accept", b"application/json"),
        (b"Accept-Encoding", b"identity"),
        (b"User-Agent", b"rlx"),
    ]
    if token is not None:
        header, word = token
        value = f"Bearer {word}" if header.lower() == "authorization" else word
        headers.append((header.encode(), value.encode()))
    # Checking certificates is never switched off.
    context = ssl.create_default_context(cafile=ca_file) if url.lower().startswith("https:") else None
    pool = httpcore2.AsyncConnectionPool(
        ssl_context=context, max_connections=connections, network_backend=_Guarded()
    )
    async with pool:
        secret = token[1].encode() if token else b""
        yield Client(url, pool, tuple(headers), secret, connect_timeout, read_timeout, who, hints)


async def _head(response: httpcore2.Response) -> bytes:
    """The beginning of a body."""
    body = b""
    async for chunk in response.aiter_stream():
        body += chunk
        if len(body) >= ERROR_HEAD:
            break
    return body[:ERROR_HEAD]


def _innermost(error: BaseException) -> str:
    """What the system says of a connection that failed, below what libraries make of it."""
    while isinstance(error.__cause__, OSError | TimeoutError):
        error = error.__cause__
    return str(error) or type(error).__name__
