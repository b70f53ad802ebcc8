"""Settings of all tests: offline, one thread, the same random examples every time; terminals to run in."""

from __future__ import annotations

import os

# Before torch and the hub client are imported: nothing may be fetched.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # a process a core: threads would only wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import pty
import subprocess
import termios
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("rlx", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("rlx")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked gpu where there is none."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture
def recwarn(recwarn: pytest.WarningsRecorder) -> pytest.WarningsRecorder:
    """The warnings of this test: not those of what an earlier one left to the garbage collector."""
    gc.collect()
    recwarn.clear()
    return recwarn


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
    "markup": "[/INST] [bold]x[/bold] [red] [/] [[ \\[bold]",
    "markup link": "[link=http://evil]x[/link]",
    "emoji code": ":smile: :warning:",
    "cut escape": "\x1b[",
    "reset": "\x1bc",
    "character set": "\x1b(0",
    "application command": "\x1b_G\x1b\\",
    "a huge line": "x" * 100_000,
    "a huge line of escapes": "\x1b[31m" * 10_000,
    "tabs": "\t" * 50,
    "format fields": "{} {0} {reward} %s %(step)d",
    "Markdown": "# head\n| a | b |\n<script>alert(1)</script> ![x](http://evil/x.png) `",
}


@pytest.fixture
def hostile() -> dict[str, str]:
    """What a completion, a prompt or a row of data may hold, by what it tries."""
    return HOSTILE


@pytest.fixture(params=HOSTILE.values(), ids=[f"fault[S14]-{name}" for name in HOSTILE])
def hostile_text(request: pytest.FixtureRequest) -> str:
    """Each of them."""
    text: str = request.param
    return text


@dataclass(frozen=True)
class Left:
    """What a process left behind: its exit code, the terminal's attributes before and after."""

    code: int
    attributes: tuple[list[Any], list[Any]]


@pytest.fixture
def on_a_terminal(tmp_path) -> Callable[..., tuple[str, Left]]:
    """Run words on a terminal of 100 columns; once it has shown some bytes, a signal may be sent."""

    def run(words: list[str], awaited: bytes = b"", sent: int | None = None, **env: str) -> tuple[str, Left]:
        ours, theirs = pty.openpty()
        before = termios.tcgetattr(theirs)
        process = subprocess.Popen(
            words, stdout=theirs, stderr=theirs, stdin=theirs, cwd=tmp_path,
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", **env},
        )  # fmt: skip
        shown = b""
        try:
            while process.poll() is None or _waiting(ours):
                if not _waiting(ours):
                    continue
                shown += os.read(ours, 65536)
                if sent is not None and awaited in shown:
                    process.send_signal(sent)
                    sent = None
            return shown.decode(), Left(process.wait(), (before, termios.tcgetattr(theirs)))
        finally:
            process.kill()
            process.wait()
            os.close(theirs)
            os.close(ours)

    return run


def _waiting(descriptor: int) -> bool:
    """Whether there is something to read, or a twentieth of a second has brought nothing."""
    import select

    return bool(select.select([descriptor], [], [], 0.05)[0])
