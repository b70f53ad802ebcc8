"""Rewards over HTTP, the server's side: dialects, limits, errors that are never numbers."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlx.core.commands.main import main
from rlx.core.errors import ConfigError
from rlx.core.reward_requests import Refusal, Served, read_request
from rlx.core.reward_server import Limits, RewardServer, is_loopback
from rlx.plugins.contract import Failed, Rewarded
from rlx.plugins.references import make

JSON = {"Content-Type": "application/json"}


def fault(row):
    """Names the fault in the id of a test that has no other parameters."""
    return pytest.mark.parametrize([], [pytest.param(id=f"fault[{row}]")])


@pytest.fixture
def serve():
    """``serve(reward, …)``: a server that is up; its log lines are in ``server.said``."""
    servers = []

    def start(fn, **options):
        server = RewardServer(("127.0.0.1", 0), Served("mine", fn), **options)
        server.said = []
        server.say = server.said.append
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def post(server, said, headers=JSON, method="POST", path="/"):
    """Status, headers and body of an answer."""
    connection = http.client.HTTPConnection(*server.server_address, timeout=20)
    body = said if isinstance(said, bytes) else json.dumps(said).encode()
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.headers, json.loads(response.read())
    finally:
        connection.close()


def ask(server, said, **options):
    status, _, answer = post(server, said, **options)
    return status, answer


def lengths(completions):
    return [float(len(text)) for text in completions]


def test_every_dialect_gets_its_own_answer(serve):
    server = serve(make("reward", "exact_match"))
    native = {"completions": ["Answer: 4", "x"], "columns": {"answer": ["4", "5"]}, "ids": ["a", 2]}
    assert ask(server, native) == (200, {"scores": [1.0, 0.0], "ids": ["a", 2]})
    del native["ids"]
    assert ask(server, native) == (200, {"scores": [1.0, 0.0]})
    openrlhf = {"query": ["pAnswer: 4", "px"], "prompts": ["p", "p"], "labels": ["4", "5"]}
    assert ask(server, openrlhf) == (200, {"rewards": [1.0, 0.0]})
    assert ask(serve(lengths), {"model": "m", "messages": ["hi", ""]}) == (200, {"scores": [2.0, 0.0]})


def test_a_request_in_all_dialects_is_native():
    both = {"completions": ["a"], "query": ["pa"], "messages": ["pa"], "prompts": ["p"], "ids": ["1"]}
    asked = read_request(json.dumps(both).encode())
    assert (asked.dialect, asked.completions, asked.prompts) == ("native", ["a"], ["p"])


def test_a_reward_gets_what_its_signature_takes(serve):
    seen = []

    def reward(prompts, prompt_texts, completion_ids, tests):
        seen.append((prompts, prompt_texts, completion_ids, tests))
        return [1.0, 2.0]

    talk = [{"role": "user", "content": "hi"}]
    said = {
        "prompts": ["p", "<hi>"], "conversations": [None, talk], "completions": ["a", "b"],
        "completion_ids": [[1], []], "columns": {"tests": [["x"], None], "other": [1, 2]},
    }  # fmt: skip
    assert ask(serve(reward), said) == (200, {"scores": [1.0, 2.0]})
    assert seen == [(["p", talk], ["p", "<hi>"], [[1], []], [["x"], None])]


def test_a_reward_that_names_it_is_told_the_step(serve):
    server = serve(lambda completions, run_step: [None if run_step is None else float(run_step)])
    assert ask(server, {"completions": ["a"], "step": 7}) == (200, {"scores": [7.0]})
    assert ask(server, {"completions": ["a"], "step": None}) == (200, {"scores": [None]})
    assert ask(server, {"query": ["a"]}) == (200, {"rewards": [None]})
    for step in ("7", 1.5, True):
        status, answer = ask(server, {"completions": ["a"], "step": step})
        assert status == 422 and "step" in answer["error"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_what_is_no_number_in_json_is_refused_and_not_sent_back(serve, number):
    said = f'{{"completions": ["a"], "ids": [{number}]}}'.encode()
    assert ask(serve(lengths), said) == (400, {"error": "the body is no JSON"})


async def later(completions):
    return lengths(completions)


def test_async_rewards_null_and_one_number_a_token(serve):
    assert ask(serve(later), {"completions": ["abc"]}) == (200, {"scores": [3.0]})
    some = serve(lambda completions: [None, 1])
    assert ask(some, {"completions": ["a", "b"]}) == (200, {"scores": [None, 1.0]})
    assert ask(some, {"query": ["a", "b"]}) == (200, {"rewards": [None, 1.0]})
    tokens = serve(lambda completions: Rewarded([[0.5, 1.0]], metrics={"x": 1}))
    assert ask(tokens, {"completions": ["a"], "completion_ids": [[1, 2]]}) == (200, {"scores": [[0.5, 1.0]]})
    status, answer = ask(tokens, {"query": ["a"]})
    assert status == 500 and "one number a token" in answer["error"]
    assert ask(tokens, {"completions": []}) == (200, {"scores": []})


def raises(completions):
    raise ValueError(f"no GPU for \x1b[2J{completions[0]}")


def leaves(completions):
    raise SystemExit(3)


async def leaves_later(completions):
    raise SystemExit(3)


@pytest.mark.parametrize(
    "reward,said",
    [
        (leaves, "reward 'mine' raised SystemExit: 3"),
        (leaves_later, "reward 'mine' raised SystemExit: 3"),
        (raises, "reward 'mine' raised ValueError: no GPU for \\x1b[2Ja"),
        (lambda completions: [1.0], "returned 1 rewards, but 2 were expected"),
        (lambda completions: [float("nan")] * 2, "returned nan"),
        (lambda completions: [Failed("took longer than 5 s")] * 2, "took longer than 5 s"),
        (lambda completions: "ab", "returned str"),
        (lambda completions: Rewarded([1, 2], metrics={"seconds": 1}), "unfit name"),
    ],
    ids=["leaves", "leaves later", "raises", "fewer", "nan", "failed", "text", "metrics"],
)
def test_a_reward_that_fails_is_an_error_and_never_a_number(serve, reward, said):
    server = serve(reward)
    for request in ({"completions": ["a", "b"]}, {"query": ["a", "b"]}, {"messages": ["a", "b"]}):
        status, answer = ask(server, request)
        assert status == 500 and said in answer["error"] and set(answer) == {"error"}


def test_items_that_fail_are_named_in_native_and_fail_the_other_dialects_whole(serve):
    server = serve(lambda completions: [1.0, float("nan"), Failed("took too long")])
    status, answer = ask(server, {"completions": ["a", "b", "c"], "ids": [1, 2, 3]})
    assert status == 200 and answer["scores"] == [1.0, None, None] and answer["ids"] == [1, 2, 3]
    assert answer["errors"] == [None, "returned nan: nan", "failed: took too long"]
    status, answer = ask(server, {"query": ["a", "b", "c"]})
    assert status == 500 and "2 of 3 items" in answer["error"]


@pytest.mark.parametrize(
    "body,status,said",
    [
        (b"{", 400, "no JSON"),
        (b"[" * 100_000, 400, "no JSON"),
        (b"[1]", 400, "no JSON object"),
        (b"{}", 422, "no dialect"),
        ({"completions": "a"}, 422, "completions is no list of texts"),
        ({"completions": [1]}, 422, "completions is no list of texts"),
        ({"completions": ["a"], "prompts": []}, 422, "prompts is no list of 1 items"),
        ({"completions": ["a"], "columns": {"answer": ["1", "2"]}}, 422, "column 'answer' is no list of 1"),
        ({"completions": ["a"], "columns": []}, 422, "columns is no mapping"),
        ({"completions": ["a"], "completion_ids": [["1"]]}, 422, "completion_ids is no list"),
        ({"completions": ["a"], "conversations": [[{"role": 1}]]}, 422, "conversations"),
        ({"completions": ["a"], "ids": ["a", "b"]}, 422, "ids is no list of 1 items"),
        ({"query": ["abc"], "prompts": ["x"]}, 422, "does not begin with its prompt"),
    ],
)
def test_requests_that_are_none_are_refused(body, status, said):
    with pytest.raises(Refusal) as caught:
        read_request(body if isinstance(body, bytes) else json.dumps(body).encode())
    assert caught.value.status == status and said in caught.value.why


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
KEYS = (
    "completions",
    "prompts",
    "conversations",
    "completion_ids",
    "columns",
    "ids",
    "query",
    "labels",
    "messages",
)


@given(
    st.fixed_dictionaries({}, optional={key: JSON_VALUES | st.lists(st.text(max_size=3)) for key in KEYS})
    | JSON_VALUES
)
def test_whatever_a_client_says_is_a_request_of_equal_lists_or_refused(said):
    try:
        asked = read_request(json.dumps(said).encode())
    except Refusal as refusal:
        assert refusal.status in (400, 422)
        return
    count = len(asked.completions)
    assert len(asked.prompts) == len(asked.texts) == count
    assert all(len(column) == count for column in asked.columns.values())
    assert asked.completion_ids is None or len(asked.completion_ids) == count
    assert asked.ids is None or len(asked.ids) == count


def test_a_request_lacks_what_the_reward_needs(serve):
    server = serve(make("reward", "exact_match"))
    assert ask(server, {"completions": ["a"]}) == (422, {"error": "reward 'mine' needs the columns answer"})
    status, answer = ask(serve(make("reward", "length")), {"messages": ["a"]})
    assert status == 422 and "needs completion_ids" in answer["error"]


def test_openrlhfs_labels_become_the_column_that_is_named(serve):
    server = serve(make("reward", "exact_match", {"column": "gold"}), label_column="gold")
    assert ask(server, {"query": ["Answer: 4"], "labels": ["4"]}) == (200, {"rewards": [1.0]})


@fault("S10")
def test_other_machines_need_a_token():
    with pytest.raises(ConfigError, match="needs a token"):
        RewardServer(("0.0.0.0", 0), Served("mine", lengths))
    server = RewardServer(("0.0.0.0", 0), Served("mine", lengths), token="S3CRET")
    server.server_close()
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "127.3.2.1")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "", "10.0.0.1", "host", "localhost.evil")] == [
        False
    ] * 6


@fault("S10")
def test_a_taken_port_is_told(serve):
    server = serve(lengths)
    with pytest.raises(ConfigError, match="cannot be had"):
        RewardServer(server.server_address, Served("mine", lengths))


@fault("S10")
def test_a_token_is_asked_for(serve):
    server, said = serve(lengths, token="S3CRET"), {"completions": ["a"]}
    right = {**JSON, "Authorization": "Bearer S3CRET"}
    assert ask(server, said, headers=right) == (200, {"scores": [1.0]})
    for shown in ("", "S3CRET", "Bearer S3CRE", "Bearer S3CRETS", "Basic S3CRET", "Bearer \xff"):
        status, headers, answer = post(server, said, headers={**JSON, "Authorization": shown})
        assert status == 401 and headers["WWW-Authenticate"] == "Bearer" and "scores" not in answer
    assert ask(server, b"", method="GET", path="/health") == (200, {"status": "ok"})
    assert ask(server, b"", method="GET", path="/other")[0] == 404
    assert ask(server, said)[0] == 401


@fault("S10")
@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8", "localhost.evil.example", "127.0.0.1.evil.example", "", "[::1", "a b"],
)
def test_a_page_whose_name_leads_to_this_machine_learns_nothing(serve, host):
    server, said = serve(lengths), {"completions": ["abc"]}
    status, answer = ask(server, said, headers={**JSON, "Host": host})
    assert status == 421 and "scores" not in answer and "--allow-host" in answer["error"]
    assert ask(server, b"", method="GET", path="/health", headers={"Host": host})[0] == 421
    known = serve(lengths, token="S3CRET")  # the page does not know the token
    right = {**JSON, "Host": host, "Authorization": "Bearer S3CRET"}
    assert ask(known, said, headers=right)[0] == 200
    assert ask(known, said, headers={**JSON, "Host": host})[0] == 401


@fault("S10")
def test_addresses_localhost_and_names_that_are_allowed_lead_to_the_server(serve):
    server = serve(lengths, limits=Limits(hosts=frozenset({"gpu7"})))
    for host in ("127.0.0.1", "127.0.0.1:9", "[::1]:9", "10.0.0.7", "localhost", "LocalHost.:9", "GPU7:9"):
        assert ask(server, {"completions": ["abc"]}, headers={**JSON, "Host": host})[0] == 200
    with socket.create_connection(server.server_address, timeout=20) as client:  # two of them: both count
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 421 ")


def test_the_command_allows_names(monkeypatch):
    seen = []
    monkeypatch.setattr(RewardServer, "serve", lambda server: (seen.append(server), server.server_close()))
    allowed = ["--allow-host", "GPU7:8000", "--allow-host", "10.0.0.7"]
    assert main(["reward", "serve", "exact_match", "--port", "0", *allowed]) == 0
    assert seen[0].limits.hosts == {"gpu7"}


@pytest.mark.parametrize("name", ["http://gpu7", "gpu7/health", "me@gpu7", "gpu7 gpu8", "", "gpu7:8000:1"])
def test_what_is_no_name_of_a_host_is_refused(name, monkeypatch, capsys):
    monkeypatch.setattr(RewardServer, "serve", lambda server: server.server_close())
    assert main(["reward", "serve", "exact_match", "--port", "0", "--allow-host", name]) == 2
    assert "not the name of a host" in capsys.readouterr().err


@fault("S10")
def test_requests_that_are_too_large_or_of_another_type_are_refused(serve):
    server = serve(lengths, limits=Limits(body=1000, items=3))
    assert ask(server, {"completions": ["a"] * 3})[0] == 200
    assert ask(server, {"completions": ["a"] * 4})[0] == 413
    assert ask(server, {"completions": ["a" * 980]})[0] == 413
    assert ask(server, {"completions": ["a" * 100_000]})[0] == 413
    assert ask(server, {"completions": ["a"]}, headers={"Content-Type": "text/plain"})[0] == 415
    assert ask(server, {"completions": ["a"]}, headers={**JSON, "Transfer-Encoding": "chunked"})[0] == 411


@fault("S10")
def test_a_body_that_does_not_come_is_not_waited_for(serve, monkeypatch):
    monkeypatch.setattr("rlx.core.reward_server.BODY_TIME", 0.1)
    server = serve(lengths)
    with socket.create_connection(server.server_address, timeout=20) as client:
        client.sendall(b"POST / HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n")
        answer = b""
        while not answer:
            try:
                client.sendall(b" ")
                client.settimeout(0.02)
                answer = client.recv(4096)
            except TimeoutError:
                continue
    assert answer.startswith(b"HTTP/1.1 408 ")


@fault("S10")
def test_no_more_calls_at_a_time_than_allowed_and_further_connections_are_turned_away(serve):
    go, lock, under_way, most = threading.Event(), threading.Lock(), [0], [0]

    def slow(completions):
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        go.wait(20)
        with lock:
            under_way[0] -= 1
        return lengths(completions)

    server = serve(slow, limits=Limits(calls=2, connections=4))
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(ask(server, {"completions": ["a"]}))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    ends = time.monotonic() + 20
    while server._places._value and time.monotonic() < ends:  # until all four are inside
        time.sleep(0.005)
    with socket.create_connection(server.server_address, timeout=20) as fifth:
        assert fifth.recv(4096).startswith(b"HTTP/1.1 503 ")
    go.set()
    for thread in threads:
        thread.join()
    assert answers == [(200, {"scores": [1.0]})] * 4 and most[0] == 2


@fault("S10")
def test_nothing_of_a_request_is_logged(serve, capfd):
    server = serve(raises, token="S3CRET")
    ask(
        server,
        {"completions": ["PRIVATE"]},
        headers={**JSON, "Authorization": "Bearer S3CRET"},
        path="/?key=PRIVATE",
    )
    ask(server, b"PRIVATE", headers={**JSON, "Authorization": "Bearer PRIVATE"})
    with socket.create_connection(server.server_address, timeout=20) as client:
        client.sendall(b"PRIVATE PRIVATE\r\n\r\n")
        client.recv(4096)
    with socket.create_connection(server.server_address, timeout=20) as client:
        client.sendall(
            b"POST / HTTP/1.1\r\nContent-Length: 99\r\nContent-Type: application/json\r\n\r\nPRIVATE"
        )
    ends = time.monotonic() + 20
    while len(server.said) < 2 and time.monotonic() < ends:  # each connection logs after its answer
        time.sleep(0.005)
    printed = "".join(capfd.readouterr()) + "".join(server.said)
    assert {"401", "500"} <= {line.split()[0] for line in server.said}
    assert "PRIVATE" not in printed and "S3CRET" not in printed


def test_a_reward_that_needs_a_policy_cannot_be_served_and_one_that_holds_something_gives_it_back():
    class Held:
        needs_policy, closed = False, 0

        def __call__(self, completions):
            return lengths(completions)

        def close(self):
            self.closed += 1

    held = Held()
    Served("mine", held).close()
    Served("mine", lengths).close()
    assert held.closed == 1
    held.needs_policy = True
    with pytest.raises(ConfigError, match="a server has none"):
        Served("mine", held)


@fault("S10")
def test_the_command_refuses_other_machines_without_a_token(capsys, monkeypatch):
    monkeypatch.delenv("RLX_REWARD_TOKEN", raising=False)
    assert main(["reward", "serve", "exact_match", "--host", "0.0.0.0", "--port", "0"]) == 2
    said = capsys.readouterr().err
    assert "needs a token" in said and "RLX_REWARD_TOKEN" in said and "<redacted>" not in said


@pytest.mark.parametrize("token", [None, "", " \n"])
def test_the_command_refuses_a_token_variable_that_is_named_and_empty(capsys, monkeypatch, token):
    monkeypatch.delenv("THE_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("THE_TOKEN", token)
    monkeypatch.setattr(RewardServer, "serve", None)  # it would fail: nothing may be served
    assert main(["reward", "serve", "exact_match", "--port", "0", "--token-env", "THE_TOKEN"]) == 2
    assert "THE_TOKEN" in capsys.readouterr().err


@fault("S10")
def test_the_command_refuses_a_token_that_no_header_can_carry(capsys, monkeypatch):
    monkeypatch.setenv("RLX_REWARD_TOKEN", "gehe\u00efm")
    monkeypatch.setattr(RewardServer, "serve", None)
    assert main(["reward", "serve", "exact_match", "--port", "0"]) == 2
    said = capsys.readouterr().err
    assert "no header takes" in said and "gehe" not in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda s: f"fault[S10] {s.name}")
def test_a_signal_ends_the_server_and_requests_under_way_get_their_answer(number):
    inside, answers = threading.Event(), []

    def slow(completions):
        inside.set()
        os.kill(os.getpid(), number)
        while not server.said:  # until the server says that it stops
            time.sleep(0.005)
        return lengths(completions)

    server = RewardServer(("127.0.0.1", 0), Served("mine", slow))
    server.said = []
    server.say = server.said.append
    client = threading.Thread(target=lambda: answers.append(ask(server, {"completions": ["abc"]})))
    client.start()
    before = signal.getsignal(signal.SIGTERM)
    server.serve()
    client.join(20)
    assert inside.is_set() and answers == [(200, {"scores": [3.0]})] and server.said[0] == "stopped"
    assert signal.getsignal(signal.SIGTERM) is before
