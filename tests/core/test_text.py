"""Hostile text becomes inert, secrets do not survive, and ordinary text stays as it is."""

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlx.core.text import REDACTED, is_secret, redact, safe_json, safe_text

CATEGORIES = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def inert(text: str) -> bool:
    return all(char == "\t" or unicodedata.category(char) not in CATEGORIES for char in text)


def test_the_corpus_is_large_enough(hostile):
    assert len(hostile) >= 40 and sum(not inert(text) for text in hostile.values()) >= 40


def test_hostile_text_becomes_inert(hostile_text):
    shown = safe_text(hostile_text)
    assert inert(shown) and len(shown) < 400 and (shown != hostile_text or inert(hostile_text))
    shown.encode("utf-8")  # a lone surrogate would raise


def test_json_is_inert_on_one_line_and_read_back_as_it_was(hostile_text):
    for indent in (None, 2):
        shown = safe_json({hostile_text: [hostile_text, 1.5, None]}, indent)
        assert inert(shown.replace("\n", "") if indent else shown)
        assert json.loads(shown.encode()) == {hostile_text: [hostile_text, 1.5, None]}


def test_json_keeps_letters_of_all_scripts():
    assert safe_json({"数学": "ß\n\x1b\U000e0041"}) == r'{"数学": "ß\n\u001b\udb40\udc41"}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        safe_json(float("nan"))


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
