"""Servers that a user names by URL: which addresses and secrets will do, and what can go wrong.

Shared by the reward ``http`` and the judge ``openai``; the exchange itself is ``rlx.core.http_client``.
"""

from __future__ import annotations

import email.utils
import ipaddress
import random
from urllib.parse import parse_qsl, urlsplit

from rlx.core.errors import ConfigError, RewardError
from rlx.core.text import is_secret, redact, safe_text

FIRST_WAIT = 0.5  # seconds before the first repetition; each further one may wait twice as long
# Metadata services outside the link-local ranges: AWS and Google over IPv6, Alibaba Cloud, Oracle, Azure.
METADATA = frozenset(
    map(
        ipaddress.ip_address,
        ("fd00:ec2::254", "fd20:ce::254", "100.100.100.200", "192.0.0.192", "168.63.129.16"),
    )
)
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # its last 32 bits are an IPv4 address
# Beside what is_secret knows: too common as words to hide them everywhere.
SECRET_PARAMETERS = ("key", "auth", "sig", "signature", "pass", "pwd")
# Not Python's own stream of random numbers: what a run draws must not depend on a server's moods.
_JITTER = random.SystemRandom()


class ServerError(RewardError):
    """What went wrong in one exchange with a server.

    Args:
        what: one sentence.
        passing: another try may do: the server was busy, away or broken.
        busy: it has too much to do.
        wait: seconds that the server asked to wait, None if it did not say.
        more: the rest of what RlxError takes.
    """

    def __init__(
        self,
        what: str,
        *,
        passing: bool = False,
        busy: bool = False,
        wait: float | None = None,
        **more: str,
    ) -> None:
        super().__init__(what, **{"code": "E-REWARD-SERVER", **more})
        self.passing, self.busy, self.wait = passing, busy, wait


def check_url(url: str, who: str, secret: str) -> None:
    """Refuse an address that cannot be one of a server, or that holds a secret.

    Args:
        url: as given.
        who: whose it is: ``the reward server``.
        secret: where a secret goes instead: ``key_variable: NAME``.

    Raises:
        ConfigError: not http or https, no host, a password or key in it, a cloud's metadata service.
    """

    def wrong(what: str, expected: str) -> ConfigError:
        path, query, _ = url.partition("?")  # redact does not know all names of secrets
        got = safe_text(redact(path), 120) + ("?…" if query else "")
        return ConfigError(f"{who}'s URL {what}", code="E-CONFIG-URL", got=got, expected=expected)

    example = "http://127.0.0.1:8000/score"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
        (host or "").encode("idna")  # as it is looked up: no label is empty or too long
    except ValueError as error:  # UnicodeError is one
        raise wrong(f"cannot be read: {safe_text(error, 80)}", example) from None
    if parts.scheme not in ("http", "https"):
        raise wrong("is neither http nor https", example)
    if not host or not url.isascii() or not url.isprintable() or " " in url:
        raise wrong("has no host, or characters that no URL has", example)
    if parts.username is not None or parts.password is not None:
        raise wrong("holds a user or password", f"the URL alone, and {secret}")
    if any(is_secret(name) or name.lower() in SECRET_PARAMETERS for name, _ in parse_qsl(parts.query)):
        raise wrong("holds a secret", f"the URL alone, and {secret}")
    if is_metadata(host):
        raise wrong("is link-local or a metadata service", "an address of a server of yours")


def is_metadata(host: str) -> bool:
    """Whether an address is link-local or a cloud's metadata service; False for a name."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        translated = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if address in NAT64 else None
        address = address.ipv4_mapped or address.sixtofour or translated or address
    return address.is_link_local or address in METADATA


def fits_header(secret: str) -> bool:
    """Whether a token can stand in a header: printable ASCII without blanks, not empty."""
    return bool(secret) and secret.isascii() and secret.isprintable() and " " not in secret


def read_retry_after(text: str, now: float) -> float | None:
    """Seconds that a Retry-After header asks to wait: a number, or a date; None for anything else.

    Args:
        text: the header's value.
        now: seconds since the epoch.
    """
    if text.isascii() and text.isdigit():
        return float(text[:12])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - now)
    except (ValueError, OverflowError):
        return None


def pause(tries: int, asked: float | None, longest: float) -> float:
    """Seconds before the next try: what the server asks for, else a doubling wait, less up to half of it.

    Args:
        tries: how many there were, at least 1.
        asked: seconds that the server asked to wait, None if it did not say.
        longest: seconds, also if the server asks for more.
    """
    if asked is not None:
        return min(asked, longest) + _JITTER.uniform(0, min(FIRST_WAIT, longest))
    most = min(FIRST_WAIT * 2 ** min(tries - 1, 60), longest)
    return _JITTER.uniform(most / 2, most)


def excerpt(body: bytes) -> str:
    """The beginning of a server's answer, safe to print and without secrets."""
    return shown(body[:2000].decode("utf-8", "replace").strip()) or "nothing"


def shown(text: object) -> str:
    """What a server says, safe to print and without secrets."""
    return safe_text(redact(str(text)), 300)
