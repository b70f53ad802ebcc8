"""The built-in judges; the language model is a server on this machine that says what it is told."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import rlx
from rlx.core import servers
from rlx.core.batch import Prompts
from rlx.core.errors import ConfigError, RewardError, RlxError
from rlx.core.judging import JudgeRunner, Tally
from rlx.plugins.judges import openai
from rlx.plugins.judges.openai import TEMPLATE, read_verdict
from rlx.plugins.references import make
from rlx.testing import check


def ask(judge, pairs, ids=None, **columns):
    n = len(pairs)
    prompts = Prompts([[1]] * n, [f"p{i}" for i in range(n)], [None] * n, columns, list(range(n)))
    ids = ids or [([0], [0])] * n
    return JudgeRunner("j", judge).verdicts(prompts, pairs, ids, [(i,) for i in range(n)])


# reward


def test_the_higher_reward_wins_and_columns_reach_it():
    judge = make("judge", "reward", {"rewards": ["exact_match"]})
    pairs = [("#### 3", "#### 4"), ("#### 3", "#### 4"), ("#### 3", "#### 03"), ("#### 1", "#### 2")]
    assert ask(judge, pairs, answer=["3", "4", "3", "3"]) == [0, 1, None, None]
    assert JudgeRunner("j", judge).columns_needed == ("answer",)
    with pytest.raises(rlx.DataError, match="needs the column 'answer'"):
        ask(judge, pairs)


def test_columns_called_like_the_judges_own_parameters_are_left_out():
    seen = []

    class Everything:
        def judge(self, prompts, pairs, **columns):
            seen.append(sorted(columns))
            return [0] * len(pairs)

    columns = {"prompts": ["x"], "pairs": ["y"], "answer": ["z"]}
    given = Prompts([[1]], ["p"], [None], columns, [0])
    assert JudgeRunner("j", Everything()).verdicts(given, [("a", "b")], [([0], [0])], [(0,)]) is not None
    assert seen == [["answer", "pair_ids", "prompt_texts", "rows"]]


def test_rewards_with_options_weights_and_tokens():
    longer = {"name": "length", "target": 9, "penalty": 0.1}
    ids = [([1] * 7, [1] * 5), ([1], [1] * 3)]
    pairs = [("a", "b"), ("c", "d")]
    assert ask(make("judge", "reward", {"rewards": [longer]}), pairs, ids) == [0, 1]
    assert ask(make("judge", "reward", {"rewards": [{**longer, "weight": -2}]}), pairs, ids) == [1, 0]
    # −0.2 against −0.4: apart by 0.2
    assert ask(make("judge", "reward", {"rewards": [longer], "margin": 0.19}), pairs[:1], ids[:1]) == [0]
    assert ask(make("judge", "reward", {"rewards": [longer], "margin": 0.21}), pairs[:1], ids[:1]) == [None]

    def by_token(completion_ids):
        return [[float(i) for i in ids] for ids in completion_ids]

    by_tokens = make("judge", "reward", {"rewards": [by_token]})
    assert ask(by_tokens, pairs, [([1, 2], [4]), ([5], [2, 2])]) == [1, 0]


def test_a_reward_that_does_not_apply_gives_no_verdict():
    def only_long(completions):
        return [1.0 if len(text) > 1 else None for text in completions]

    judge = make("judge", "reward", {"rewards": [only_long]})
    assert ask(judge, [("a", "b"), ("a", "bb"), ("aaa", "bb")]) == [None, None, None]


def test_messages_reach_the_reward():
    seen = []

    def keep(prompts, prompt_texts, completions):
        seen.append((prompts, prompt_texts))
        return [0.0] * len(completions)

    talk = [{"role": "user", "content": "hello"}]
    prompts = Prompts([[1]], ["<user>hello"], [talk], {}, [7])
    runner = JudgeRunner("j", make("judge", "reward", {"rewards": [keep]}))
    runner.verdicts(prompts, [("a", "b")], [([1], [2])], [(0,)])
    assert seen == [([talk, talk], ["<user>hello"] * 2)]


def test_a_reward_that_fails_names_itself_the_judge_and_the_row():
    def broken(completions):
        return [float("nan")] * len(completions)

    with pytest.raises(RewardError, match="reward 'broken' returned nan") as caught:
        ask(make("judge", "reward", {"rewards": [broken]}), [("a", "a"), ("a", "b")])
    assert "data row 1" in caught.value.where and "judge 'j'" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({}, "needs the option 'rewards'"),
        ({"rewards": []}, "there is no reward"),
        ({"rewards": ["exact_matchh"]}, "exact_match"),
        ({"rewards": [{"name": "length", "targt": 3}]}, "did you mean 'target'"),
        ({"rewards": [{"name": "length", "weight": "x"}]}, "reward_weight"),
    ],
)
def test_what_is_wrong_with_the_rewards_is_said_at_once(given, what):
    with pytest.raises(RlxError, match=what):
        make("judge", "reward", given)


# random


def test_random_is_the_same_again_and_fair():
    pairs = [(f"a{i}", f"b{i}") for i in range(400)]
    judge = make("judge", "random", {"no_verdict": 0.25})
    verdicts = ask(judge, pairs)
    assert ask(make("judge", "random", {"no_verdict": 0.25}), pairs) == verdicts
    assert ask(make("judge", "random", {"no_verdict": 0.25, "seed": 1}), pairs) != verdicts
    tally = Tally.of(verdicts, pairs)
    assert tally.interval[0] < 0.5 < tally.interval[1]
    assert 66 <= tally.no_verdict <= 134  # 4 standard deviations: 100 ± 35


@pytest.mark.parametrize("first", [0.0, 1.0])
def test_random_that_always_takes_one_place_is_as_fair(first):
    pairs = [(f"a{i}", f"b{i}") for i in range(400)]
    judge = make("judge", "random", {"first": first})
    assert judge.judge(["p"] * 400, pairs) == [int(first == 0)] * 400
    low, high = Tally.of(ask(judge, pairs), pairs).interval
    assert low < 0.5 < high


# openai


class Server:
    """A chat server; what it answers is a function: the reply's text, or status and body in parts."""

    def __init__(self, reply):
        self.asked, self.headers, self.lock, self.now, self.most = [], [], threading.Lock(), 0, 0
        self.more = []  # headers
        self.between = threading.Event()  # set: nothing is waited for any more
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.asked.append((self.path, body))
                    outer.headers.append(dict(self.headers))
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                answer = reply(body["messages"][0]["content"], len(outer.asked))
                if isinstance(answer, str):
                    answer = 200, json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
                with outer.lock:
                    outer.now -= 1
                self.send_response(answer[0])
                for header in outer.more:
                    self.send_header(*header)
                self.end_headers()
                for part in answer[1:]:
                    self.wfile.write(part)
                    outer.between.wait(0.02 if len(answer) > 2 else 0)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def serve(monkeypatch):
    """A function that starts a server; waits between tries are short."""
    started = []
    monkeypatch.setattr(servers, "FIRST_WAIT", 0.001)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def start(reply):
        started.append(Server(reply))
        return started[-1]

    yield start
    for server in started:
        server.http.shutdown()
        server.http.server_close()


def model(server, **options):
    return make("judge", "openai", {"model": "m", "base_url": server.url, **options})


def longer(question, _):
    one, other = (question.split(f"<answer {i}>\n")[1].split("\n</answer")[0] for i in (1, 2))
    return "0" if len(one) == len(other) else f"Let me see.\n**{1 if len(one) > len(other) else 2}**\n"


def test_a_model_is_asked_for_each_pair_and_its_order_undone(serve, monkeypatch):
    monkeypatch.setenv("KEY", " secret-key\n")
    server = serve(longer)
    pairs = [("a" * (i % 4 + 1), "b" * (i % 3 + 1)) for i in range(24)]
    want = [None if len(a) == len(b) else int(len(b) > len(a)) for a, b in pairs]
    with pytest.warns(UserWarning, match="gave no verdict, for example with '0'"):
        assert ask(model(server, key_variable="KEY"), pairs) == want
    path, body = server.asked[0]
    assert path == "/v1/chat/completions"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0, 256)
    assert server.headers[0]["Authorization"] == "Bearer secret-key"
    assert len(server.asked) == 24


def test_calls_go_out_several_at_a_time(serve):
    together = threading.Barrier(4, timeout=20)

    def reply(question, count):
        together.wait()  # passes only once four calls are here at a time
        return "1"

    server = serve(reply)
    ask(model(server, concurrency=4), [("a", f"b{i}") for i in range(8)])
    assert server.most == 4


def test_without_a_key_none_is_sent_and_messages_are_written_out(serve):
    server = serve(lambda *_: "2")
    talk = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "{first} {x}"}]
    assert model(server).judge([talk], [("{second}", "B\\1")]) == [1]
    assert "Authorization" not in server.headers[0]
    question = server.asked[0][1]["messages"][0]["content"]
    assert "system: be brief\n\nuser: {first} {x}\n" in question
    assert "<answer 1>\n{second}\n</answer 1>" in question and "<answer 2>\nB\\1\n</answer 2>" in question


def busy(status, times, then="1"):
    return lambda question, count: (status, b"wait") if count <= times else then


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_failure_that_may_pass_is_tried_again(serve, status):
    server = serve(busy(status, 2))
    assert model(server, retries=2).judge(["p"], [("a", "b")]) == [0]
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("reply", "why", "calls"),
    [
        (busy(500, 9), "answered 500; it said: wait", 3),
        (busy(401, 9), "answered 401; it said: wait", 1),
        (busy(404, 9), "answered 404; it said: wait", 1),
        (busy(302, 9), "answered 302: it redirects to nowhere", 1),
        (lambda *_: (200, b"not json"), "no chat completion; it said: not json", 1),
        (lambda *_: (200, b'{"choices": []}'), "no chat completion", 1),
        (lambda *_: (200, b"[1]"), "no chat completion", 1),
        (lambda *_: (200, b'{"choices": [{"message": "1"}]}'), "no chat completion", 1),
        (lambda *_: (200, b"x" * (openai.LARGEST_REPLY + 1)), "answer is larger than 1048576 bytes", 1),
    ],
    ids=["500", "401", "404", "302", "text", "empty", "list", "shape", "large"],
)
def test_a_failed_call_is_an_error_or_no_verdict_and_never_a_verdict(serve, reply, why, calls):
    server = serve(reply)
    with pytest.raises(RewardError, match="could not be asked") as caught:
        ask(model(server, retries=2), [("a", "b")])
    assert why in caught.value.got and server.url in caught.value.where and caught.value.exit_code == 6
    assert len(server.asked) == calls
    with pytest.warns(UserWarning, match="no verdict"):
        assert ask(model(server, retries=0, on_error="none"), [("a", "b"), ("c", "d")]) == [None, None]


def test_a_server_that_drips_runs_into_the_time_out(serve):
    server = serve(lambda *_: (200, *[b"x"] * 1000))  # 20 s, each part well within the time
    with pytest.raises(RewardError) as caught:
        model(server, timeout=0.2, retries=0).judge(["p"], [("a", "b")])
    assert "no reply within 0.2 s" in caught.value.got
    server.between.set()


def test_a_server_that_hangs_runs_into_the_time_out(serve):
    gone = threading.Event()

    def hang(question, count):
        gone.wait(20)
        return "1"

    server = serve(hang)
    began = time.monotonic()
    with pytest.raises(RewardError, match="could not be asked") as caught:
        model(server, timeout=0.2, retries=1).judge(["p"], [("a", "b")])
    assert "no reply within 0.2 s" in caught.value.got and time.monotonic() - began < 10
    gone.set()


def test_a_server_that_is_not_there():
    judge = make("judge", "openai", {"model": "m", "base_url": "http://127.0.0.1:9/v1", "retries": 0})
    with pytest.raises(RewardError, match="could not be asked") as caught:
        judge.judge(["p"], [("a", "b")])
    assert "cannot be reached" in caught.value.got


def test_the_key_is_in_no_message_and_no_option(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sesame-open")
    server = serve(lambda *_: (401, b"wrong key: sesame-open"))
    judge = model(server)
    with pytest.raises(RewardError) as caught:
        judge.judge(["p"], [("a", "b")])
    assert "sesame" not in "".join(caught.value.lines()) and "<redacted>" in caught.value.got
    assert "sesame" not in repr(judge.config)


@pytest.mark.parametrize("key", ["sesame\nopen", "s\u00e9same", "ses ame"])
def test_a_key_that_no_header_takes_is_refused_and_not_shown(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ConfigError, match="no header takes") as caught:
        make("judge", "openai", {"model": "m"})
    assert "same" not in str(caught.value) and "OPENAI_API_KEY" in caught.value.where


def test_what_a_server_asks_to_wait_is_waited(serve, monkeypatch):
    told = []
    monkeypatch.setattr(openai, "pause", lambda tries, asked, longest: told.append((tries, asked)) or 0.0)
    server = serve(busy(429, 2))
    server.more = [("Retry-After", "7")]
    assert model(server).judge(["p"], [("a", "b")]) == [0]
    assert told == [(1, 7.0), (2, 7.0)]


def test_a_server_that_drips_its_headers_runs_into_the_time_out():
    over = threading.Event()

    def drip(listener):
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):  # the client leaves first
            connection.sendall(b"HTTP/1.1 200 OK\r\n")
            while not over.wait(0.02):
                connection.sendall(b"X: y\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=(listener,))
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        judge = make("judge", "openai", {"model": "m", "base_url": url, "timeout": 0.2, "retries": 0})
        with pytest.raises(RewardError) as caught:
            judge.judge(["p"], [("a", "b")])
        over.set()
        thread.join()
    assert "no reply within 0.2 s" in caught.value.got


def test_the_first_failure_ends_the_calls_under_way(serve):
    together, gone, waited = threading.Barrier(4, timeout=20), threading.Event(), []

    def reply(question, count):
        together.wait()  # the failure comes when the others are under way
        if "b0" in question:
            return 401, b"no"
        gone.wait(5)
        waited.append(question)
        return "1"

    with pytest.raises(RewardError) as caught:
        model(serve(reply), concurrency=4).judge(["p"] * 4, [("a", f"b{i}") for i in range(4)])
    assert "answered 401" in caught.value.got and waited == []
    gone.set()


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("1", 0), ("2", 1), ("0", None), ("", None), ("**2**.", 1), ("Answer 1", 0), ("[[2]]", 1),
        ("1 is good\nbut the better one is 2\n\n", 1), ("1 beats 2", None), ("12", None), ("1.5", None),
        ("-1", None), ("neither", None), ("<1>", 0), ("1.", 0),
    ],
)  # fmt: skip
def test_reading_a_verdict(reply, verdict):
    assert read_verdict(reply, ["1", "2"]) == verdict


def test_other_labels():
    letters = ["A", "B"]
    assert read_verdict("I prefer B", letters) == read_verdict("B is a better answer", letters) == 1
    assert read_verdict("b.", letters) == 1 and read_verdict("**a**", letters) == 0
    assert read_verdict("neither is a clear winner", letters) is read_verdict("abba", letters) is None
    assert read_verdict("the FIRST one", ["first", "second"]) == 0


@pytest.mark.parametrize(
    ("options", "got"),
    [
        ({"template": "{prompt} {first}"}, "template without {second}"),
        ({"labels": ["1"]}, "labels"),
        ({"labels": ["x", "x"]}, "labels"),
        ({"base_url": "127.0.0.1:8000"}, "127.0.0.1:8000"),
        ({"base_url": "file:///etc/passwd"}, "file:///etc/passwd"),
        ({"base_url": "http://169.254.169.254/v1"}, "169.254.169.254"),
        ({"base_url": "http://me:S3CRET@host/v1"}, "http://<redacted>@host/v1"),
    ],
)
def test_options_that_cannot_work_are_refused(options, got):
    with pytest.raises(ConfigError) as caught:
        make("judge", "openai", {"model": "m", **options})
    assert got in caught.value.got
    assert "{prompt}" in TEMPLATE


def test_openai_passes_the_conformance_cases(serve):
    server = serve(longer)
    outcomes = check("openai", "judge", {"model": "m", "base_url": server.url})
    assert {one.case: one.note for one in outcomes if one.status == "failed"} == {}
    assert sum(one.status == "ok" for one in outcomes) >= 9 and server.asked
