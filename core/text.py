"""Text from outside, made harmless: for terminals, log lines, error messages and config dumps.

Prompts, completions, file names and server answers are data. Shown raw they can move a cursor, colour a screen, reorder
a line or forge a log entry; ``safe_text`` shows such characters instead of sending them. ``redact`` takes secrets out of
what is written down. Standard library only.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

REDACTED = "<redacted>"

# Zero-width and invisible characters beyond Unicode's control (Cc), format (Cf), surrogate (Cs), line-separator (Zl)
# and paragraph-separator (Zp) categories: they take no room on the screen or are fillers drawn as blank.
_INVISIBLE = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0"
) | frozenset(chr(code) for code in (*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)))
_UNSAFE_CATEGORIES = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
_MAX_MARKS = 4  # combining marks in a row; more of them climb over the lines above ("zalgo")

_SECRET_KEY = re.compile(
    r"(?<![a-z])(access|auth|api|bearer|hf|hub)?[_-]?(token|secret|password|passwd|authorization|credential|api_?key)s?$",
    re.IGNORECASE,
)
_URL_USERINFO = re.compile(r"(?P<scheme>[a-zA-Z][a-zA-Z0-9+.-]*://)[^/?#\s@]*(?:@[^/?#\s@]*)*@")
_SECRET_PAIR = re.compile(
    r"(?P<key>[\w-]*(?:token|secret|password|passwd|api[_-]?key)|authorization)"
    r"(?P<sign>['\"]?\s*[=:]\s*['\"]?)(?P<value>(?:(?:bearer|basic)\s+)?[^\s'\",;&}]+)",
    re.IGNORECASE,
)


def safe_text(text: object, limit: int = 300, *, keep_newlines: bool = False) -> str:
    """Any text as something that a terminal, a log line or an error message can show.

    Control characters, bidirectional controls, invisible and zero-width characters and lone surrogates become their
    escapes (``\\x1b``, ``\\u202e``). A tab stays; a newline stays only on request. No markup is interpreted or removed:
    print the result with markup off.

    Args:
        text: what to show; anything that is no text is shown by ``str``.
        limit: longest result, in characters; what is cut is counted at the end.
        keep_newlines: leave line breaks (``\\r\\n`` becomes ``\\n``) instead of showing ``\\n``.

    Returns:
        Text without any character that acts on a terminal.
    """
    raw = text if isinstance(text, str) else str(text)
    if keep_newlines:
        raw = raw.replace("\r\n", "\n")
    out: list[str] = []
    length = marks = 0
    for position, char in enumerate(raw):
        marks = marks + 1 if unicodedata.combining(char) else 0
        shown = _shown(char, keep_newlines) if marks <= _MAX_MARKS else _escape(char)
        length += len(shown)
        if length > limit:
            return "".join(out) + f"… (+{len(raw) - position} characters)"
        out.append(shown)
    return "".join(out)


def _shown(char: str, keep_newlines: bool) -> str:
    if char == "\t" or (char == "\n" and keep_newlines):
        return char
    if unicodedata.category(char) in _UNSAFE_CATEGORIES or char in _INVISIBLE:
        return _escape(char)
    return char


def _escape(char: str) -> str:
    named = {"\n": "\\n", "\r": "\\r"}
    code = ord(char)
    if char in named:
        return named[char]
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def is_secret(key: str) -> bool:
    """True for a key whose value is never written down: ``hub_token``, ``API-Key``, ``authorization``, …"""
    return bool(_SECRET_KEY.search(key))


def redact(value: Any, key: str = "") -> Any:
    """The value with secrets taken out, for files, logs and messages.

    Args:
        value: text, or a mapping or list of such at any depth; anything else is returned as it is.
        key: the key under which the value stands; a secret's name hides the value whole.

    Returns:
        A copy: values of secret keys, ``key=value`` pairs of that kind inside a text, and the user part of URLs are
        replaced by ``<redacted>``.
    """
    if is_secret(key) and value not in (None, "", [], {}):
        return REDACTED
    if isinstance(value, str):
        hidden = _URL_USERINFO.sub(rf"\g<scheme>{REDACTED}@", value)
        return _SECRET_PAIR.sub(rf"\g<key>\g<sign>{REDACTED}", hidden)
    if isinstance(value, Mapping):
        return {name: redact(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redact(item) for item in value)
    return value
