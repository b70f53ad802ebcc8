"""What reward servers do wrong, and what a run is promised then (the W faults 18 to 29)."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib

import pytest

from rlx.core.commands.main import main
from rlx.core.errors import RewardError

SIXTEEN = ["x" * n for n in range(16)]
RIGHT = [float(n) for n in range(16)]
JOB = ("--algo", "rloo", "--batch-size", "2", "--max-steps", "1", "--max-rows", "8", "--max-eval-rows", "2")


def fault(row: str):
    """Names the fault in the id of a test that has no other parameters."""
    return pytest.mark.parametrize([], [pytest.param(id=f"fault[{row}]")])


def refused(http, stub_or_url, **options):
    """The error that scoring sixteen completions in one request ends with."""
    url = stub_or_url if isinstance(stub_or_url, str) else stub_or_url.url
    with pytest.raises(RewardError) as caught:
        http.score(url, SIXTEEN, dialect="native", **options)
    error = caught.value
    assert error.exit_code == 6 and error.what == "reward 'http' failed for item 0"
    assert len(error.lines()) <= 12
    return error


@pytest.mark.parametrize("verb", ["check", "run"], ids=lambda verb: f"fault[W18] {verb}")
def test_a_server_that_is_not_there_is_told_before_weights_load(http, capsys, tmp_path, monkeypatch, verb):
    stub = http.stub()
    http.down(stub)
    monkeypatch.chdir(tmp_path)
    words = [verb, *JOB, "--reward", stub.url, "--http.max_wait", "0.01", "--output-dir", "run"]
    monkeypatch.setattr("rlx.core.models.load_policy", None)  # it would fail: nothing may come so far
    assert main(words) == 6
    said = capsys.readouterr().err
    assert f"{stub.url}" in said and "cannot be reached" in said and "Connect call failed" in said
    assert "rlx reward try" in said and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(lambda http: http.reply(status=500), id="fault[W19] 500"),
        pytest.param(lambda http: http.reply(status=503), id="fault[W19] 503"),
        pytest.param(lambda http: http.RESET, id="fault[W19] reset"),
        pytest.param(lambda http: http.reply({"scores": []})[:-4], id="fault[W19] cut in the body"),
        pytest.param(lambda http: http.reply(status=429, Retry_After="0"), id="fault[W20] 429"),
        pytest.param(lambda http: http.reply(status=429, Retry_After="1000000000"), id="fault[W20] absurd"),
        pytest.param(lambda http: http.reply(status=408), id="fault[W19] 408"),
    ],
)
def test_a_server_that_fails_in_passing_is_asked_again(http, fault):
    def answer(request):
        return fault(http) if request.number < 2 else http.lengths(request)

    scored = http.score(http.stub(answer).url, SIXTEEN)
    assert scored.rewards["http"].tolist() == RIGHT
    assert scored.metrics["reward/http/retries"] == [2.0]
    # Without repetitions the same faults are errors: it is the repetition that saves the scores.
    refused(http, http.stub(answer), retries=0)
    refused(http, http.stub(answer), retries=1)


@fault("W20")
def test_what_a_server_asks_to_wait_is_waited(http):
    def answer(request):
        return http.reply(status=429, Retry_After="1") if request.number == 0 else http.lengths(request)

    began = time.monotonic()
    scored = http.score(http.stub(answer).url, SIXTEEN, max_wait=30)
    assert scored.rewards["http"].tolist() == RIGHT and 1.0 <= time.monotonic() - began < 20


@fault("W20")
def test_no_longer_than_the_deadline_is_waited(http):
    stub = http.stub(lambda request: http.reply(status=429, Retry_After="100"))
    began = time.monotonic()
    error = refused(http, stub, max_wait=200, timeout=20)
    assert time.monotonic() - began < 10 and len(stub.requests) == 1
    assert "failed 1 times (last: answered 429) for 16/16 items" in error.got


@fault("W20")
def test_a_server_that_can_take_two_at_a_time_gets_all_it_can(http):
    lock, under_way, most = threading.Lock(), [0], [0]

    def answer(request):
        with lock:
            under_way[0] += 1
            busy = under_way[0] > 2
            most[0] = max(most[0], under_way[0])
        time.sleep(0.005)  # long enough for others to come
        with lock:
            under_way[0] -= 1
        return http.reply(status=429) if busy else http.lengths(request)

    texts = ["x" * n for n in range(120)]
    scored = http.score(http.stub(answer).url, texts, batch_size=1, concurrency=8, retries=50)
    assert scored.rewards["http"].tolist() == [float(n) for n in range(120)]
    assert most[0] > 2  # the server was asked for too much at first


@pytest.mark.parametrize(
    "status,hint",
    [
        pytest.param(400, "rlx reward try", id="fault[W21] 400"),
        pytest.param(401, "--http.token_env", id="fault[W21] 401"),
        pytest.param(403, "--http.token_env", id="fault[W21] 403"),
        pytest.param(404, "path", id="fault[W21] 404"),
        pytest.param(413, "--http.batch_size", id="fault[W21] 413"),
        pytest.param(422, "rlx reward try", id="fault[W21] 422"),
        pytest.param(501, "rlx reward try", id="fault[W21] 501"),
    ],
)
def test_a_refusal_is_final_and_shows_what_the_server_says(http, status, hint):
    body = ("\x1b[2J\u202e no such thing\r\nERROR forged " + "y" * 1000).encode()
    stub = http.stub(lambda request: http.reply(body, status))
    error = refused(http, stub)
    assert len(stub.requests) == 1
    assert f"the reward server answered {status} for 16/16 items ({stub.url})" in error.got
    assert "\\x1b[2J\\u202e no such thing\\r\\nERROR" in error.got and hint in error.hint
    assert not set("\x1b\u202e\r\n") & set("".join(error.lines())) and "y" * 300 not in error.got


@fault("W22")
def test_a_server_that_fails_for_ever_stops_the_scoring(http):
    stub = http.stub(lambda request: http.reply(b"out of memory", 500))
    error = refused(http, stub)
    assert len(stub.requests) == 6
    assert "failed 6 times (last: answered 500) for 16/16 items" in error.got
    assert "it said: out of memory" in error.got and "rlx resume" in error.hint


NOT_UNDERSTOOD = {
    "html": (b"<html><body>hello</body></html>", "no JSON"),
    "truncated": (b'{"scores": [1, 2', "no JSON"),
    "empty": (b"", "no JSON"),
    "no utf-8": (b'{"scores": "\xff"}', "no JSON"),
    "a list": (b"[1, 2]", "JSON, but a list"),
    "wrong key": (b'{"reward": [1]}', "no key 'scores'"),
    "null": (b'{"scores": null}', "scores is null"),
    "an error": (b'{"error": "no model"}', "no key 'scores'"),
    "NaN": (b'{"scores": [NaN]}', "no JSON: NaN is no number in JSON"),
    "Infinity": (b'{"scores": [-Infinity]}', "no JSON: -Infinity is no number in JSON"),
    "deep": (b'{"scores": ' + b"[" * 60_000, "no JSON: nested too deep"),
    "digits": (b'{"scores": [' + b"9" * 20_000 + b"]}", "no JSON"),
    "no ids": (json.dumps({"scores": RIGHT}).encode(), "no ids"),
}


@pytest.mark.parametrize(
    "body,found", [pytest.param(*case, id=f"fault[W23] {name}") for name, case in NOT_UNDERSTOOD.items()]
)
def test_an_answer_that_is_none_is_an_error_at_once(http, body, found):
    stub = http.stub(lambda request: http.reply(body))
    error = refused(http, stub)
    assert len(stub.requests) == 1  # it would say the same again
    assert f"answer is not understood: {found}" in error.got and "expected" in error.got


@pytest.mark.parametrize(
    "change,found",
    [
        pytest.param({3: "3.0"}, "a text as the score of item 3", id="fault[W23] text"),
        pytest.param({3: {"score": 3}}, "an object as the score of item 3", id="fault[W23] object"),
        pytest.param({3: [1.0, None]}, "null as the score of item 3", id="fault[W23] null for a token"),
        pytest.param({3: 1e400}, "not finite as the score of item 3", id="fault[W23] 1e400"),
        pytest.param({3: 10**400}, "a number as the score of item 3", id="fault[W23] huge int"),
    ],
)
def test_a_score_that_is_none_is_an_error_at_once(http, change, found):
    def answer(request):
        scores = [change.get(i, score) for i, score in enumerate(RIGHT)]
        text = json.dumps({"scores": scores, "ids": request.said["ids"]}).replace("Infinity", "1e400")
        return http.reply(text.encode())

    stub = http.stub(answer)
    assert found in refused(http, stub).got and len(stub.requests) == 1


@pytest.mark.parametrize("count", [0, 15, 17], ids=["fault[W23] none", "fault[W23] fewer", "fault[W23] more"])
@pytest.mark.parametrize(
    "dialect,key", [("native", "scores"), ("llamafactory", "scores"), ("openrlhf", "rewards")]
)
def test_another_number_of_scores_is_an_error_at_once(http, count, dialect, key):
    stub = http.stub(lambda r: http.reply({key: [1.0] * count, "ids": r.said.get("ids", [])}))
    with pytest.raises(RewardError) as caught:
        http.score(stub.url, SIXTEEN, dialect=dialect)
    assert f"{count} {key}" in str(caught.value) and "expected 16" in str(caught.value)
    assert len(stub.requests) == 1


def endless(head: str, part: bytes):
    yield head.encode()
    while True:
        yield part


CHUNK = b"%x\r\n%b\r\n" % (65536, b" " * 65536)
CHUNKED = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n{}\r\n"
BOMB = gzip.compress(b" " * 2**26)  # 64 MiB of blanks in 64 KiB
ZLIB_BOMB = zlib.compress(b" " * 2**26)
UNREADABLE = {
    "endless": (lambda http: endless(CHUNKED.format(""), CHUNK), "larger than"),
    "declared": (lambda http: http.reply(b"{}", Content_Length=str(10**12)), "broke the connection off"),
    "gzip bomb": (lambda http: http.reply(BOMB, Content_Encoding="gzip"), "larger than"),
    "deflate bomb": (
        lambda http: http.reply(ZLIB_BOMB, Content_Encoding="deflate"),
        "larger",
    ),
    "damaged gzip": (lambda http: http.reply(b"no gzip", Content_Encoding="gzip"), "damaged"),
    "unknown packing": (lambda http: http.reply(b"{}", Content_Encoding="br"), "packed: br"),
    "endless headers": (
        lambda http: endless("HTTP/1.1 200 OK\r\n", b"X-Y: " + b"z" * 4000 + b"\r\n"),
        "broke",
    ),
    "endless error": (lambda http: endless(CHUNKED.replace("200", "400").format(""), CHUNK), "answered 400"),
}


@pytest.mark.parametrize(
    "answer,said", [pytest.param(*case, id=f"fault[W24] {name}") for name, case in UNREADABLE.items()]
)
def test_an_answer_without_end_takes_neither_memory_nor_time(http, answer, said):
    stub = http.stub(lambda request: answer(http))
    tracemalloc.start()
    try:
        began = time.monotonic()
        error = refused(http, stub, retries=1)
        seconds, peak = time.monotonic() - began, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert said in error.got
    assert peak < 16 * 2**20 and seconds < 10


def test_without_the_limit_the_bomb_takes_memory(http):  # the control of the test above
    stub = http.stub(lambda request: http.reply(BOMB, Content_Encoding="gzip"))
    tracemalloc.start()
    try:
        refused(http, stub, reply_bytes=2**26)
        assert tracemalloc.get_traced_memory()[1] > 2**26
    finally:
        tracemalloc.stop()


def test_a_packed_answer_within_the_limit_is_read(http):
    def answer(request):
        body = json.dumps({"scores": RIGHT, "ids": request.said["ids"]}).encode()
        return http.reply(gzip.compress(body), Content_Encoding="gzip")

    assert http.score(http.stub(answer).url, SIXTEEN).rewards["http"].tolist() == RIGHT


@fault("W24")
def test_a_server_that_drips_is_left_at_the_deadline(http):
    def drip():
        yield b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"
        while not over.wait(0.05):
            yield b" "

    over = threading.Event()
    began = time.monotonic()
    error = refused(http, http.stub(lambda request: drip()), timeout=0.6, read_timeout=10)
    over.set()
    assert "did not answer within 0.6 s for 16/16 items" in error.got and time.monotonic() - began < 10


@fault("W24")
def test_a_silent_server_is_left_and_asked_again(http):
    over = threading.Event()

    def answer(request):
        if request.number == 0:
            over.wait(20)
            return http.RESET
        return http.lengths(request)

    stub = http.stub(answer)
    scored = http.score(stub.url, SIXTEEN, read_timeout=0.5)
    over.set()
    assert scored.rewards["http"].tolist() == RIGHT and len(stub.requests) >= 2
    silent = http.stub(lambda request: over.clear() or over.wait(20) or http.RESET)
    error = refused(http, silent, read_timeout=0.1, retries=1)
    over.set()
    assert "is silent for too long" in error.got


@pytest.mark.parametrize("status", [301, 302, 307, 308], ids=lambda status: f"fault[W25] {status}")
@pytest.mark.parametrize("target", ["http://169.254.169.254/latest", "file:///etc/passwd", "stub"])
def test_redirects_are_not_followed(http, status, target):
    other = http.stub()
    location = other.url if target == "stub" else target
    stub = http.stub(lambda request: http.reply(status=status, Location=location))
    error = refused(http, stub)
    assert f"it redirects to {location}" in error.got and "not followed" in error.hint
    assert len(stub.requests) == 1 and other.requests == []


@fault("W26")
def test_a_certificate_that_nobody_vouches_for_is_refused(http):
    stub = http.stub(tls=True)
    error = refused(http, stub)
    assert "certificate is not trusted" in error.got and "--http.ca_file" in error.hint
    assert stub.requests == []
    trusted = {"ca_file": str(http.TLS / "certificate.pem")}
    assert http.score(stub.url, SIXTEEN, **trusted).rewards["http"].tolist() == RIGHT  # the control
    wrong = refused(http, stub.url.replace("localhost", "127.0.0.1"), **trusted)
    assert "certificate is not trusted" in wrong.got and "127.0.0.1" in wrong.got
    assert len(stub.requests) == 1


@pytest.mark.parametrize(
    "ids",
    [
        pytest.param(lambda ids: ids[::-1], id="fault[W27] shuffled"),
        pytest.param(lambda ids: [f"other-{name}" for name in ids], id="fault[W27] another's"),
        pytest.param(lambda ids: None, id="fault[W27] missing"),
        pytest.param(lambda ids: ids[:-1], id="fault[W27] fewer"),
    ],
)
def test_scores_of_other_items_are_not_taken(http, ids):
    stub = http.stub(lambda r: http.reply({"scores": RIGHT, "ids": ids(r.said["ids"])}))
    error = refused(http, stub)
    assert "other ids, or in another order" in error.got and len(stub.requests) == 1


def partly(http, failing):
    """A server that says of some completions that it could not score them: failing(text, request number)."""

    def answer(request):
        said = request.said
        errors = ["no GPU" if failing(text, request.number) else None for text in said["completions"]]
        scores = [None if e else float(len(t)) for t, e in zip(said["completions"], errors, strict=True)]
        return http.reply({"scores": scores, "ids": said["ids"], "errors": errors})

    return http.stub(answer)


@fault("W28")
def test_only_the_items_that_failed_are_asked_for_again(http):
    stub = partly(http, lambda text, number: number == 0 and len(text) in (3, 9))
    assert http.score(stub.url, SIXTEEN).rewards["http"].tolist() == RIGHT
    assert [len(r.said["completions"]) for r in stub.requests] == [16, 2]


@fault("W28")
def test_items_that_fail_in_the_end_follow_the_policy_and_are_never_zero(http):
    stub = partly(http, lambda text, number: len(text) in (3, 9))
    with pytest.raises(RewardError) as caught:
        http.score(stub.url, SIXTEEN)
    assert caught.value.what == "reward 'http' failed for item 3"
    assert "failed on the server: no GPU (6 tries) for 2/16 items" in caught.value.got
    with pytest.warns(UserWarning, match="counted as not applicable"):
        scored = http.score(stub.url, SIXTEEN, on_error="none")
    values = scored.rewards["http"].tolist()
    assert [i for i, value in enumerate(values) if value != value] == [3, 9]
    assert [value for value in values if value == value] == [float(i) for i in range(16) if i not in (3, 9)]
    assert scored.metrics["reward/http/errors"] == [2.0] and scored.metrics["reward/http/failed"] == [2.0]


@fault("W28")
def test_one_request_that_fails_takes_no_other_with_it(http):
    def answer(request):
        return http.reply(status=400) if "xxxx" in request.said["completions"] else http.lengths(request)

    with pytest.warns(UserWarning, match="answered 400 for 2/16 items"):
        scored = http.score(http.stub(answer).url, SIXTEEN, on_error="none", batch_size=2)
    assert [i for i, value in enumerate(scored.rewards["http"].tolist()) if value != value] == [4, 5]


@fault("W29")
def test_a_server_that_is_started_anew_loses_nothing(http):
    back: list[threading.Thread] = []

    def restart():
        http.down(stub)
        http.stub(port=stub.port)

    def answer(request):
        if request.number == 3:
            back.append(threading.Thread(target=restart))
            back[0].start()
        return http.RESET if request.number >= 3 else http.lengths(request)

    stub = http.stub(answer)
    texts = ["x" * n for n in range(64)]
    scored = http.score(stub.url, texts, batch_size=4, concurrency=4, max_wait=0.5)
    back[0].join()
    assert scored.rewards["http"].tolist() == [float(n) for n in range(64)]
    assert scored.metrics["reward/http/retries"][0] >= 1


CLIENT = """
import asyncio, sys
from rlx.plugins.references import make
texts = ["x" * n for n in range(int(sys.argv[2]), int(sys.argv[2]) + 40)]
reward = make("reward", sys.argv[1], {"batch_size": 4, "max_wait": 0.02})
lists = {"prompts": texts, "prompt_texts": texts, "completions": texts, "completion_ids": [[1]] * 40}
assert asyncio.run(reward(**lists)).values == [float(len(text)) for text in texts]
"""


@fault("W29")
def test_two_processes_with_one_failing_server_get_their_own_scores(http):
    stub = http.stub(lambda r: http.reply(status=500) if r.number % 3 == 0 else http.lengths(r))
    clients = [
        subprocess.Popen([sys.executable, "-c", CLIENT, stub.url, first], stderr=subprocess.PIPE, text=True)
        for first in ("0", "1000")
    ]
    for client in clients:
        assert (client.communicate(timeout=60)[1], client.returncode) == ("", 0)
