from __future__ import annotations

import io
import math
import re
import signal
import sys

import pytest
from rich.console import Console

from rlx.callbacks import rich_progress
from rlx.callbacks.rich_progress import RichProgress, choose_mode, number, plain_line, sparkline

LINE = {"step": 10, "reward": 0.71, "kl": 0.02, "eval/reward": 0.5, "tokens_per_second": 4231.2, "other": 1.0}
OURS = re.compile(
    r"\x1b\[[0-9;]*[mABCDHJKhl]|\x1b\[\?25[hl]"
)  # what rich itself sends: colours, cursor, erase


def console(**changes) -> Console:
    options = {
        "force_terminal": True,
        "markup": False,
        "highlight": False,
        "emoji": False,
        "width": 100,
        "height": 40,
    }
    return Console(file=io.StringIO(), **{**options, **changes})


def shown(run, samples) -> str:
    progress, terminal = RichProgress(None), console()
    progress._samples = samples
    terminal.print(progress.panel(run, terminal))
    return terminal.file.getvalue()


def test_no_sample_sends_the_terminal_anything_of_its_own(make_run, hostile_text):
    text = hostile_text
    run = make_run()
    run.metrics_history = [LINE]
    out = shown(run, [(text, text, 0.5)])
    rest = OURS.sub("", out)
    unsafe = r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
    assert not re.search(unsafe, rest)
    # As many control sequences and lines as for a benign text: nothing was interpreted.
    benign = shown(run, [("x", "x", 0.5)])
    assert OURS.findall(out) == OURS.findall(benign) and out.count("\n") == benign.count("\n")


@pytest.mark.parametrize(
    "text", ["[/INST] done", "[bold]x[/bold]", ":smile:"], ids=lambda text: f"fault[S13]-{text}"
)
def test_markup_in_a_sample_is_shown_as_it_is(make_run, text):
    assert text in shown(make_run(), [("p", text, None)])


@pytest.mark.parametrize("fault", [pytest.param("S15", id="fault[S15]")])
def test_a_line_that_is_said_while_the_panel_lives_cannot_control_the_terminal(make_run, fault):
    run, progress, terminal = make_run(), RichProgress(None), console()
    progress.open(run, terminal)
    run.say("hint: \x1b[2J[bold]evil[/bold]\r\x07")
    progress.shut(run)
    out = terminal.file.getvalue()
    assert "\\x1b[2J[bold]evil[/bold]\\r\\x07" in out and "\x1b[2J" not in out and "\x07" not in out


def test_the_panel_shows_progress_metrics_and_samples(make_run, rollouts):
    run, progress, terminal = make_run(), RichProgress(None), console()
    run.metrics_history = [{"step": 0, "eval/reward": 0.402}]  # an evaluation comes first
    progress.open(run, terminal)
    progress._mode = "rich"
    run.metrics_history.append(LINE)
    progress.on_rollouts(run, rollouts(["the answer is 7"]))
    progress.on_log(run, LINE)
    progress.on_run_end(run)
    out = OURS.sub("", terminal.file.getvalue())
    for part in (
        "ppo · tiny · wordmath",
        "step 10/45",
        "0.71",
        "eval/reward",
        "4,231",
        "the answer is 7",
        "What is 3",
    ):
        assert part in out, part


@pytest.mark.parametrize("end", ["on_run_end", "failure", "close twice"])
def test_the_terminal_is_always_given_back(make_run, end):
    run, progress, terminal = make_run(), RichProgress(None), console()
    stdout, stderr, printers = sys.stdout, sys.stderr, list(run.printers)
    progress.open(run, terminal)
    progress._mode = "rich"
    assert run.printers != printers and "\x1b[?25l" in terminal.file.getvalue()
    if end == "failure":  # the observer fails, is switched off and never hears of the end
        with pytest.raises(AttributeError):
            progress.on_rollouts(run, object())
    else:
        progress.on_run_end(run)
        if end == "close twice":
            progress.shut(run)
    assert "\x1b[?25h" in terminal.file.getvalue()  # the cursor is back
    assert (sys.stdout, sys.stderr, run.printers) == (stdout, stderr, printers)


STUB = """
import time
from types import SimpleNamespace as s
from rlx.callbacks.rich_progress import RichProgress
settings = s(algo='ppo', model='m', dataset='d', progress='auto')
run = s(config=s(settings=settings), folder=s(path='x'), global_step=0, total_steps=1, metrics_history=[],
        evaluated=None, is_main=True, printers=[print], said=[])
run.say = lambda line: run.printers[-1](line)
progress = RichProgress(None)
progress.on_run_start(run)
progress.on_log(run, {'step': 0, 'eval/reward': 0.25})
"""


@pytest.mark.parametrize(
    ("end", "sent", "code"),
    [
        ("progress.on_run_end(run)", None, 0),
        ("raise RuntimeError('x')", None, 1),
        ("pass", None, 0),
        ("time.sleep(60)", signal.SIGINT, -signal.SIGINT),
        ("time.sleep(60)", signal.SIGTERM, -signal.SIGTERM),
    ],
    ids=["end", "exception", "left", "SIGINT", "SIGTERM"],
)
def test_a_process_that_ends_in_any_way_gives_the_terminal_back(on_a_terminal, end, sent, code):
    shown, left = on_a_terminal([sys.executable, "-c", STUB + end], b"\x1b[?25l", sent)
    assert left.code == code
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    assert "\x1b[?1049h" not in shown and left.attributes[0] == left.attributes[1]


@pytest.mark.parametrize("surroundings", [{"TERM": "dumb"}, {"TERM": "unknown"}], ids=lambda env: env["TERM"])
def test_a_terminal_that_can_do_nothing_gets_plain_lines(on_a_terminal, surroundings):
    shown, left = on_a_terminal([sys.executable, "-c", STUB], **surroundings)
    assert shown == "step 0/1  eval/reward 0.25  [0:00<?]\r\n" and left.code == 0


def test_the_handler_of_sigterm_is_only_borrowed(make_run):
    run, progress = make_run(), RichProgress(None)
    before = signal.getsignal(signal.SIGTERM)
    progress.open(run, console())
    assert (signal.getsignal(signal.SIGTERM) is not before) == (before is signal.SIG_DFL)
    progress.shut(run)
    assert signal.getsignal(signal.SIGTERM) is before

    def mine(signum, frame):
        raise AssertionError

    signal.signal(signal.SIGTERM, mine)
    try:
        progress.open(run, console())
        assert signal.getsignal(signal.SIGTERM) is mine
        progress.shut(run)
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("columns", [1, 10, 40])
def test_a_narrow_terminal_or_another_encoding_breaks_nothing(make_run, columns, rollouts, hostile):
    run = make_run()
    run.metrics_history = [LINE, LINE]
    progress = RichProgress(None)
    progress._samples = rich_progress.pick_samples(rollouts(list(hostile.values())))
    terminal = console(width=columns)
    terminal.print(progress.panel(run, terminal))
    narrow = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict"), width=80)
    narrow.print(
        rich_progress.metric_table(run.metrics_history, unicode=False)
    )  # raises if a sign is not ASCII
    narrow.file.flush()


@pytest.mark.parametrize(
    "progress,terminal,term,mode",
    [
        ("auto", True, "xterm", "rich"),
        ("auto", True, "dumb", "plain"),
        ("auto", False, "xterm", "plain"),
        ("rich", False, "dumb", "rich"),
        ("plain", True, "xterm", "plain"),
        ("none", True, "xterm", "none"),
    ],
)
def test_the_mode_is_as_asked_or_as_the_terminal_allows(monkeypatch, progress, terminal, term, mode):
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(sys, "stdout", type("Out", (io.StringIO,), {"isatty": lambda self: terminal})())
    assert choose_mode(progress) == mode


def test_without_a_terminal_each_log_line_is_one_plain_line(make_run):
    run, progress = make_run(progress="plain"), RichProgress(None)
    progress.on_run_start(run)
    progress.on_log(run, {"step": 0, "eval/reward": 0.402})
    run.global_step = 20
    progress.on_log(run, LINE)
    progress.on_run_end(run)
    assert run.said[0] == "step  0/45  eval/reward 0.402  [0:00<?]"
    assert run.said[1].startswith(
        "step 10/45  reward 0.71  eval/reward 0.5  kl 0.02  tokens_per_second 4,231  [0:00<"
    )
    assert "other" not in run.said[1] and len(run.said) == 2


def test_none_says_nothing_and_neither_do_other_processes(make_run):
    run = make_run(progress="none")
    for is_main in (True, False):
        run.is_main, progress = is_main, RichProgress(None)
        progress.on_run_start(run)
        progress.on_log(run, LINE)
        progress.on_run_end(run)
    assert run.said == []


def test_time_left_counts_from_where_this_process_began(make_run):
    run = make_run()
    run.global_step = 30  # 10 steps in 20 s since the resume at 20; 15 are left
    assert rich_progress.timing(run, 20.0, 20) == "0:20<0:30"
    assert rich_progress.clock(3725) == "1:02:05"
    assert plain_line(run, LINE, 20.0, 20).endswith("[0:20<0:30]")


def test_numbers_and_sparklines():
    assert [number(x) for x in (0.123456, 12345.6, -1234.0, 0.0, 1e-7, math.nan)] == [
        "0.1235", "12,346", "-1,234", "0", "1e-07", "nan",
    ]  # fmt: skip
    assert sparkline([0, 1, 2, 7], unicode=True) == "▁▂▃█"
    assert sparkline([3, 3, math.nan], unicode=True) == "▁▁" and sparkline([], unicode=True) == ""
    assert sparkline([0, 6], unicode=False) == "_#"
