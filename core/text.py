"""Text from outside, made harmless: for terminals, log lines, error messages and config dumps.

Prompts, completions, file names and server answers are data. Shown raw they can move a cursor, colour a
screen, reorder a line or forge a log entry; ``safe_text`` shows such characters instead of sending them.
``redact`` takes secrets out of what is written down. Standard library only.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

REDACTED = "<redacted>"

# Invisible characters outside Unicode's control (Cc), format (Cf), surrogate (Cs), line-separator (Zl) and
# paragraph-separator (Zp) categories: they take no room on the screen or are fillers drawn as blank.
_INVISIBLE = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0"
) | frozenset(chr(code) for code in (*range(0xFE00, 0xFE0F), *range(0xE0100, 0xE01F0)))
_UNSAFE_CATEGORIES = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
_MAX_MARKS = 4  # combining marks in a row; more of them climb over the lines above ("zalgo")

_SECRET_KEY = re.compile(
    r"secret|password|passwd|passphrase|authorization|credential|api[_-]?key|private[_-]?key|token$",
    re.IGNORECASE,
)
_NO_SECRET = re.compile(r"^(pad|eos|bos|unk|mask|sep|cls|stop|image|end|start)[_-]token$", re.IGNORECASE)
# Names are bounded: searched in a line of a million letters, [\w-]* would take a minute.
_URL_USERINFO = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]{0,40}://)[^/?#\s]*@")
_PAIR = re.compile(
    r"([\w-]{0,40}(?:secret|passw|passphrase|authorization|credential|key|token)[\w-]{0,40})"
    r"""(['"]?\s*[=:]\s*['"]?)((?:(?:bearer|basic)\s+)?[^\s'",;&}]+)""",
    re.IGNORECASE,
)
_KNOWN_SHAPE = re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_|xox[abp]-|AKIA)[A-Za-z0-9_-]{12,}")


def safe_text(text: object, limit: int = 300, *, keep_newlines: bool = False) -> str:
    r"""Any text as something that a terminal, a log line or an error message can show.

    Control characters, bidirectional controls, invisible and zero-width characters and lone surrogates become
    their escapes (``\x1b``, ``\u202e``). A tab stays; a newline stays only on request. No markup is
    interpreted or removed: print the result with markup off.

    Args:
        text: what to show; anything that is no text is shown by ``str``.
        limit: longest result, in characters; what is cut is counted at the end.
        keep_newlines: leave line breaks (``\r\n`` becomes ``\n``) instead of showing ``\n``.

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


def safe_json(value: Any, indent: int | None = None) -> str:
    """JSON that a terminal can show, letters of all scripts as they are; reading it gives the value back.

    Args:
        value: what JSON can hold, NaN and infinity left out; a lone surrogate is kept.
        indent: spaces of a level; None for one line, which stays one for every reader of lines.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
    if text.isprintable() and _INVISIBLE.isdisjoint(text):
        return text
    shown = (char if char == "\n" else _shown(char, False) for char in text)
    return "".join(
        char if len(char) == 1 else json.dumps(raw)[1:-1] for char, raw in zip(shown, text, strict=True)
    )


def is_secret(key: str) -> bool:
    """True for a key whose value is never written down, as ``hub_token``, ``API-Key`` or ``authorization``.

    Args:
        key: an option's, header's or variable's name; the names of a tokenizer's tokens are no secrets.
    """
    return bool(_SECRET_KEY.search(key)) and not _NO_SECRET.match(key)


def redact(value: Any, key: str = "") -> Any:
    """The value with secrets taken out, for files, logs and messages.

    Args:
        value: text, or a mapping, list or tuple of such at any depth; anything else is returned as it is.
        key: the key under which the value stands; a secret's name hides the value whole.

    Returns:
        A copy: values of secret keys, ``key=value`` pairs of that kind inside a text, tokens of well-known
        shape and the user part of URLs are replaced by ``<redacted>``.
    """
    if is_secret(key) and value not in (None, "", [], {}):
        return REDACTED
    if isinstance(value, str):
        hidden = _URL_USERINFO.sub(rf"\1{REDACTED}@", value)
        hidden = _PAIR.sub(
            lambda pair: pair[1] + pair[2] + (REDACTED if is_secret(pair[1]) else pair[3]), hidden
        )
        return _KNOWN_SHAPE.sub(REDACTED, hidden)
    if isinstance(value, Mapping):
        return {name: redact(item, str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [redact(item) for item in value]
    if isinstance(value, tuple):
        return tuple(redact(item) for item in value)
    return value
