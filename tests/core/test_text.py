"""Hostile text becomes inert, secrets do not survive, and ordinary text stays as it is."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlx.core.text import REDACTED, is_secret, redact, safe_text

# What a completion, prompt, file name or server answer may hold; inert on a terminal and in a log line.
HOSTILE = {
    "colour": "\x1b[31mred",
    "clear screen": "\x1b[2J\x1b[H",
    "cursor up": "ok\x1b[1A\x1b[2Kgone",
    "hide cursor": "\x1b[?25l",
    "alternate screen": "\x1b[?1049h",
    "window title": "\x1b]0;owned\x07",
    "hyperlink": "\x1b]8;;http://evil\x1b\\click\x1b]8;;\x1b\\",
    "clipboard": "\x1b]52;c;cm0gLXJm\x07",
    "device status": "\x1b[6n",
    "answerback": "\x05",
    "terminal query": "\x1b[c",
    "sixel": "\x1bPq#0;2;0;0;0#0~~\x1b\\",
    "C1 CSI": "\x9b31mred",
    "C1 OSC": "\x9d0;owned\x9c",
    "C1 DCS": "\x90q\x9c",
    "bell": "\x07\x07",
    "backspace": "rm\x08\x08ls",
    "carriage return": "safe\rERROR",
    "vertical tab": "a\x0bb",
    "form feed": "a\x0cb",
    "shift out": "\x0e\x0f",
    "delete": "\x7f",
    "NUL": "a\x00b",
    "XOFF": "\x13",
    "log forgery": "x\nERROR training failed",
    "CRLF forgery": "x\r\nERROR training failed",
    "next line": "x\x85y",
    "line separator": "x\u2028y",
    "paragraph separator": "x\u2029y",
    "right-to-left override": "\u202egnp.exe",
    "left-to-right embedding": "\u202aabc",
    "isolate": "\u2067abc\u2069",
    "right-to-left mark": "\u200fabc",
    "arabic letter mark": "\u061cabc",
    "zero-width space": "a\u200bb",
    "zero-width joiner": "a\u200db",
    "zero-width non-joiner": "a\u200cb",
    "word joiner": "a\u2060b",
    "byte order mark": "\ufeffabc",
    "soft hyphen": "a\u00adb",
    "hangul filler": "a\u3164b",
    "braille blank": "a\u2800b",
    "tag characters": "a\U000e0041\U000e0042",
    "variation selectors": "a\U000e0100\ufe01",
    "zalgo": "Z" + "\u0301" * 40,
    "lone surrogate": "a\ud800b",
    "interlinear annotation": "a\ufff9b\ufffa",
    "mongolian vowel separator": "a\u180eb",
    "invisible times": "a\u2062b",
    "combining grapheme joiner": "a\u034fb",
}
CATEGORIES = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def inert(text: str) -> bool:
    return all(char == "\t" or unicodedata.category(char) not in CATEGORIES for char in text)


def test_the_corpus_is_large_enough():
    assert len(HOSTILE) >= 40


@pytest.mark.parametrize("text", HOSTILE.values(), ids=[f"fault[S14]-{name}" for name in HOSTILE])
def test_hostile_text_becomes_inert(text):
    shown = safe_text(text)
    assert inert(shown) and shown != text
    shown.encode("utf-8")  # a lone surrogate would raise


@pytest.mark.parametrize(
    "text", ["x\nERROR training failed", "x\r\ny", "a\u2028b"], ids=lambda _: "fault[S15]"
)
def test_one_line_stays_one_line(text):
    assert len(safe_text(text).splitlines()) == 1


@pytest.mark.parametrize(
    "text", ["[/INST]", "[bold]", "[link=http://x]y[/link]", ":smile:"], ids=lambda _: "fault[S13]"
)
def test_markup_is_text_like_any_other(text):
    assert safe_text(text) == text


def test_ordinary_text_stays():
    for text in ("Was kostet das? 5 €", "数学", "a\tb", "e\u0301", "❤\ufe0f", "x² ‖ ±", ""):
        assert safe_text(text) == text


def test_escapes_say_which_character_it_was():
    assert safe_text("\x1b\x9b\u202e\U000e0041\n") == r"\x1b\x9b\u202e\U000e0041\n"


def test_newlines_stay_on_request():
    assert safe_text("a\r\nb\nc\rd", keep_newlines=True) == "a\nb\nc\\rd"


@given(st.text(), st.integers(0, 50))
def test_any_text_is_inert_and_cut(text, limit):
    shown = safe_text(text, limit)
    assert inert(shown)
    kept = shown.partition("… (+")[0]
    assert len(kept) <= limit or text == kept


def test_what_is_cut_is_counted():
    assert safe_text("a" * 10, 4) == "aaaa… (+6 characters)"


def test_other_objects_are_shown_too():
    assert safe_text(ValueError("a\x1b")) == r"a\x1b"


@pytest.mark.parametrize(
    "key",
    [
        "token",
        "hub_token",
        "HF_TOKEN",
        "api_key",
        "API-Key",
        "apiKey",
        "client_secret",
        "Authorization",
        "db_password",
    ],
)
def test_secret_keys_are_known(key):
    assert is_secret(key)


@pytest.mark.parametrize(
    "key",
    ["stop_token", "pad_token", "tokenizer", "max_tokens", "tokens_per_second", "stop_token_id", "tokens"],
)
def test_options_about_tokens_are_no_secrets(key):
    assert not is_secret(key)


@given(st.text("abcdefXYZ0123456789", min_size=8, max_size=30))
def test_a_secret_never_survives(secret):
    secret = f"S{secret}E"
    given_ = {
        "authorization": f"Bearer {secret}",
        "nested": [
            {"hub_token": secret},
            (f"https://user:{secret}@host/path",),
            f"failed: api_key={secret}, retry",
        ],
        "header": f"Authorization: Bearer {secret}",
        "json": f'{{"password": "{secret}"}}',
        "shape": f"used hf_{secret}{secret}",
    }
    assert secret not in str(redact(given_))  # fault[S17]


def test_what_is_no_secret_stays():
    value = {
        "model": "org/model",
        "stop_token": "eos",
        "url": "https://host/a@b",
        "n": 3,
        "empty_token": None,
    }
    assert redact(value) == value


def test_the_place_of_a_secret_stays_visible():
    assert redact({"url": "https://me:pw@host/x", "api_key": "k"}) == {
        "url": f"https://{REDACTED}@host/x",
        "api_key": REDACTED,
    }
