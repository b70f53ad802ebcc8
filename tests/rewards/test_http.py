"""The http reward: what it says to servers, how it reads their answers, how it is named and set up."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlx.core.components import read_specs
from rlx.core.config import from_mapping
from rlx.core.errors import ConfigError, RewardError
from rlx.core.servers import ServerError, is_metadata, pause, read_retry_after
from rlx.plugins.contract import Failed
from rlx.plugins.references import make, resolve
from rlx.rewards.http import Gate, Http
from rlx.rewards.http_dialects import DIALECTS, read
from rlx.testing import check

TEXTS = ["", "a", "bb", "ccc", "ünïcödé \U0001f600 \ud800 \x00", "x" * 5000]


def test_scores_are_the_servers_in_the_order_of_the_completions(http):
    stub = http.stub()
    scored = http.score(stub.url, TEXTS, batch_size=2)
    assert scored.rewards["http"].tolist() == [len(text) for text in TEXTS]
    assert len(stub.requests) == 3
    assert scored.metrics["reward/http/retries"] == [0.0] and scored.metrics["reward/http/failed"] == [0.0]


def test_a_native_request_carries_everything(http):
    stub = http.stub()
    reward = make("reward", "http", {"url": stub.url, "dialect": "native"})
    talk = [{"role": "user", "content": "hi"}]
    asyncio.run(
        reward(
            prompts=["p", talk],
            prompt_texts=["p", "<hi>"],
            completions=["a", "bb"],
            completion_ids=[[1], [2, 3]],
            run_step=12,
            answer=["7", None],
            tests=[["x"], {"y": 1.5}],
        )
    )
    [request] = stub.requests
    ids = request.said.pop("ids")
    assert len(set(ids)) == 2
    assert request.said == {
        "prompts": ["p", "<hi>"], "conversations": [None, talk], "completions": ["a", "bb"],
        "completion_ids": [[1], [2, 3]], "columns": {"answer": ["7", None], "tests": [["x"], {"y": 1.5}]},
        "step": 12,
    }  # fmt: skip
    assert request.headers["content-type"] == "application/json" and "authorization" not in request.headers
    assert request.headers["host"] == f"127.0.0.1:{stub.port}"


def test_the_other_dialects_say_what_those_trainers_say(http):
    llama = http.stub(lambda request: http.reply({"scores": [1.0, 2.0], "model": "m", "id": "x"}))
    http.score(llama.url, ["a", "bb"], dialect="llamafactory", model="judge")
    assert llama.requests[0].said == {"model": "judge", "messages": ["hia", "hibb"]}
    openrlhf = http.stub(lambda request: http.reply({"rewards": [1.0, 2.0], "extra_logs": {}}))
    http.score(openrlhf.url, ["a", "bb"], dialect="openrlhf")
    assert openrlhf.requests[0].said == {
        "query": ["hia", "hibb"], "prompts": ["hi", "hi"], "labels": ["7", "7"],
    }  # fmt: skip
    http.score(openrlhf.url, ["a", "bb"], dialect="openrlhf", label_column="none")
    assert openrlhf.requests[1].said["labels"] == [None, None]


@pytest.mark.parametrize(
    "key,dialect,later",
    [
        ("rewards", "openrlhf", {"query", "prompts", "labels"}),
        ("scores", "llamafactory", {"model", "messages"}),
    ],
)
def test_the_dialect_is_told_from_the_first_answer(http, key, dialect, later):
    stub = http.stub(lambda request: http.reply({key: [float(len(t)) for t in request.said["query"]]}))
    reward = make("reward", stub.url)

    def call():
        given = {"prompts": ["p"], "prompt_texts": ["p"], "completions": ["a"], "completion_ids": [[1]]}
        return asyncio.run(reward(**given)).values

    assert call() == [2.0]
    assert set(stub.requests[0].said) == later | {
        "query", "prompts", "labels", "model", "messages", "ids", "completions", "completion_ids", "columns",
        "step",
    }  # fmt: skip
    stub.answer = lambda request: http.reply({key: [3.0]})
    assert call() == [3.0]
    assert set(stub.requests[1].said) == later


def test_a_native_answer_may_hold_null_and_one_number_a_token(http):
    stub = http.stub(
        lambda request: http.reply({"scores": [None, [0.5, 1], True, 2], "ids": request.said["ids"]})
    )
    scored = http.score(stub.url, ["a", "b", "c", "d"])
    assert [f"{value:g}" for value in scored.rewards["http"]] == ["nan", "1.5", "1", "2"]
    assert scored.token_scores.tolist() == [0, 0, 0.5, 1, 0, 0, 0, 0]


def test_only_the_columns_that_are_named_are_sent(http):
    stub = http.stub()
    http.score(stub.url, ["a"], columns=[])
    assert stub.requests[0].said["columns"] == {}
    http.score(stub.url, ["a"], columns=["answer"])
    assert stub.requests[1].said["columns"] == {"answer": ["7"]}
    assert make("reward", stub.url, {"columns": ["answer"]}).columns == ("answer",)


def test_data_that_json_does_not_have_is_an_error_and_not_sent(http):
    stub = http.stub()
    reward = make("reward", stub.url)
    given = {"prompts": ["p"], "prompt_texts": ["p"], "completions": ["a"], "completion_ids": [[1]]}
    for value in (float("nan"), b"bytes"):
        [failed] = asyncio.run(reward(**given, image=[value])).values
        assert "cannot be sent to the reward server as JSON" in failed.reason and "columns" in failed.hint
    assert stub.requests == []


def test_requests_go_out_at_the_same_time_and_no_more_than_allowed(http):
    together = threading.Barrier(3, timeout=20)

    def answer(request):
        together.wait()  # three at a time: fewer would wait for ever
        return http.lengths(request)

    stub = http.stub(answer)
    assert http.score(stub.url, ["a"] * 6, batch_size=1, concurrency=3).score.tolist() == [1.0] * 6


def test_two_servers_are_asked_at_the_same_time(http):
    from rlx.core.batch import Prompts
    from rlx.core.scoring import NamedReward, RewardRunner

    together = threading.Barrier(2, timeout=20)

    def answer(request):
        together.wait()
        return http.lengths(request)

    rewards = [NamedReward(name, make("reward", http.stub(answer).url)) for name in ("one", "two")]
    scored = RewardRunner(rewards).score(Prompts([[1]], ["p"], [None], {}, [0]), ["abc"], [[1]])
    assert scored.score.tolist() == [6.0]


def test_what_every_reward_keeps_holds_of_it(http):
    from rlx.testing.kit import check

    outcomes = check("http", "reward", {"url": http.stub().url})
    assert {outcome.case: outcome.note for outcome in outcomes if outcome.status == "failed"} == {}
    assert sum(outcome.status == "ok" for outcome in outcomes) >= 10


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
IDS = ["a", "b"]
ANSWERS = st.fixed_dictionaries(
    {},
    optional={
        "scores": JSON | st.lists(JSON, min_size=2, max_size=2),
        "rewards": JSON | st.lists(JSON, min_size=2, max_size=2),
        "ids": JSON | st.just(IDS),
        "errors": JSON | st.lists(JSON, min_size=2, max_size=2),
    },
)


@given(st.sampled_from(DIALECTS), JSON | ANSWERS | st.binary(max_size=40))
def test_whatever_a_server_answers_is_one_usable_score_an_item_or_an_error(dialect, answer):
    try:
        spoken, scores = read(
            dialect, answer if isinstance(answer, bytes) else json.dumps(answer).encode(), IDS
        )
    except ServerError as error:
        assert not error.passing
        return
    assert spoken in DIALECTS[1:] and len(scores) == 2
    for score in scores:
        assert (
            score is None
            or isinstance(score, Failed)
            or all(math.isfinite(number) for number in (score if isinstance(score, list) else [score]))
        )
        assert spoken == "native" or not isinstance(score, Failed)


# names


def test_a_url_is_short_for_http():
    assert resolve("reward", "https://host/score") is Http
    specs, problems = read_specs(
        "reward", ["http://a/x", "HTTPS://b", {"name": "http://c", "weight": 2}], "reward", {}
    )
    assert problems == []
    assert [(spec.name, spec.ref, spec.given) for spec in specs] == [
        ("http", "http", {"url": "http://a/x"}),
        ("http_2", "http", {"url": "HTTPS://b"}),
        ("http_3", "http", {"url": "http://c"}),
    ]
    _, [problem] = read_specs("reward", {"name": "http://c", "url": "http://d"}, "reward", {})
    assert "given twice" in problem.what


def test_a_config_writes_the_url_and_reads_it_again():
    config = from_mapping({"algo": "ppo", "reward": "http://127.0.0.1:8000/x", "http.batch_size": 4})
    [(component, _)] = config.rewards
    assert component.name == "http" and component.options["url"] == "http://127.0.0.1:8000/x"
    assert component.options["batch_size"] == 4
    from rlx.core.yaml_file import parse_config

    again = from_mapping(*parse_config(config.to_yaml(), "config.yaml"))
    assert again.rewards == config.rewards


# addresses and secrets


@pytest.mark.parametrize(
    "url,said",
    [
        pytest.param("file:///etc/passwd", "neither http nor https", id="fault[S9] file"),
        pytest.param("http://169.254.169.254/latest", "link-local", id="fault[S9] metadata"),
        pytest.param("http://[fe80::1]/x", "link-local", id="fault[S9] fe80"),
        pytest.param("http://[::ffff:169.254.169.254]/x", "link-local", id="fault[S9] mapped"),
        pytest.param("http://[fd00:ec2::254]/x", "metadata", id="fault[S9] metadata over IPv6"),
        pytest.param("http://[fd20:ce::254]/x", "metadata", id="fault[S9] metadata of Google over IPv6"),
        pytest.param("http://192.0.0.192/x", "metadata", id="fault[S9] metadata of Oracle"),
        pytest.param("http://168.63.129.16/x", "metadata", id="fault[S9] wire server of Azure"),
        pytest.param("http://[64:ff9b::a9fe:a9fe]/x", "metadata", id="fault[S9] NAT64"),
        pytest.param("http://[2002:a9fe:a9fe::1]/x", "metadata", id="fault[S9] 6to4"),
        pytest.param("http://a..b/x", "cannot be read", id="empty label"),
        pytest.param(f"http://{'a' * 64}.org/x", "cannot be read", id="long label"),
        pytest.param("http://host/x?sig=S3CRET", "holds a secret", id="fault[S17] signature"),
        pytest.param("http://user:S3CRET@host/x", "user or password", id="fault[S17] userinfo"),
        pytest.param("http://host/x?api_key=S3CRET", "holds a secret", id="fault[S17] query"),
        pytest.param("http:///x", "no host", id="no host"),
        pytest.param("http://host:99999/x", "cannot be read", id="port"),
        pytest.param("http://ho st/x", "characters", id="blank"),
        pytest.param("http://host/\r\nX: y", "characters", id="header"),
    ],
)
def test_addresses_that_are_refused_before_anything_is_sent(url, said):
    with pytest.raises(ConfigError) as caught:
        make("reward", "http", {"url": url})
    assert said in caught.value.what and caught.value.exit_code == 2
    assert "S3CRET" not in str(caught.value)


def test_which_addresses_are_metadata_services():
    assert [host for host in ("10.0.0.1", "127.0.0.1", "::1", "fd00::1", "host") if is_metadata(host)] == []


@pytest.mark.parametrize("name", ["metadata.test", "2852039166"], ids=["fault[S9] name", "fault[S9] number"])
def test_a_name_that_means_a_metadata_service_is_not_connected_to(http, monkeypatch, name):
    import socket

    real = socket.getaddrinfo

    def lookup(host, *rest, **more):
        return real("169.254.169.254" if host == "metadata.test" else host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    with pytest.raises(RewardError, match=r"169\.254\.169\.254 is link-local"):
        http.score(f"http://{name}/x", ["a"], retries=0)


def test_a_token_comes_from_the_environment_or_a_file_and_goes_into_its_header(http, monkeypatch, tmp_path):
    stub = http.stub()
    monkeypatch.setenv("THE_TOKEN", "S3CRET ")
    http.score(stub.url, ["a"], token_env="THE_TOKEN")
    assert stub.requests[0].headers["authorization"] == "Bearer S3CRET"
    (tmp_path / "token").write_text("FROM-FILE\n")
    http.score(stub.url, ["a"], token_file=str(tmp_path / "token"), token_header="X-Api-Key")
    assert stub.requests[1].headers["x-api-key"] == "FROM-FILE"


@pytest.mark.parametrize(
    "options,said",
    [
        ({"token_env": "NOT_SET"}, "no token"),
        ({"token_env": "hf-S3CRET"}, "no name of a variable"),
        ({"token_env": "BROKEN"}, "characters that no header takes"),
        ({"token_file": "missing"}, "cannot be read"),
        ({"token_env": "A", "token_file": "b"}, "both given"),
        ({"token_env": "GOOD", "token_header": "a: b"}, "no name of a header"),
        ({"ca_file": "missing.pem"}, "cannot be read"),
    ],
)
def test_tokens_and_certificates_that_are_refused(options, said, monkeypatch):
    monkeypatch.setenv("BROKEN", "S3CRET\r\nX: y")
    monkeypatch.setenv("GOOD", "S3CRET")
    with pytest.raises(ConfigError) as caught:
        make("reward", "http://host/x", options)
    assert said in caught.value.what and "S3CRET" not in str(caught.value)


@pytest.mark.parametrize("status", [200, 400], ids=lambda status: f"fault[S17] {status}")
@pytest.mark.parametrize("slash", ["/", "\\/"])  # the second as JSON may write it
def test_a_token_that_a_server_repeats_is_in_no_message(http, monkeypatch, status, slash):
    monkeypatch.setenv("THE_TOKEN", "S3CRET/TOKEN")

    def repeat(request):
        return http.reply(request.headers["authorization"].replace("/", slash).encode(), status)

    stub = http.stub(repeat)
    with pytest.raises(RewardError) as caught:
        http.score(stub.url, ["a"], token_env="THE_TOKEN")
    assert "<redacted>" in str(caught.value) and "S3CRET" not in str(caught.value)


def test_a_token_of_a_few_letters_does_not_damage_a_right_answer(http, monkeypatch):
    """People give servers of their own a token like 1, which stands in many a number."""
    monkeypatch.setenv("THE_TOKEN", "1")
    stub = http.stub(lambda request: http.reply(b'{"scores": [0.1, 1.1]}', 200))
    assert http.score(stub.url, ["a", "b"], token_env="THE_TOKEN").score.tolist() == pytest.approx([0.1, 1.1])


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(lambda token: b"HTTP/1.1 " + token + b"\r\n\r\n", id="fault[S17] status line"),
        pytest.param(
            lambda token: b"HTTP/1.1 302 Found\r\nLocation: /" + token + b"\r\n\r\n", id="fault[S17] redirect"
        ),
    ],
)
def test_a_token_that_a_server_repeats_outside_a_body_is_in_no_message(http, monkeypatch, answer):
    monkeypatch.setenv("THE_TOKEN", "S3CRET-TOKEN")
    with pytest.raises(RewardError) as caught:
        http.score(
            http.stub(lambda request: answer(b"S3CRET-TOKEN")).url, ["a"], token_env="THE_TOKEN", retries=0
        )
    assert "<redacted>" in str(caught.value) and "S3CRET" not in str(caught.value)


# waiting


def test_the_gate_lets_no_more_through_than_its_limit():
    async def most_at_a_time(halvings):
        gate, inside, most = Gate(8), 0, 0
        for _ in range(halvings):
            gate.halve(time.monotonic())

        async def request():
            nonlocal inside, most
            async with gate:
                inside += 1
                most = max(most, inside)
                await asyncio.sleep(0)
                inside -= 1

        await asyncio.gather(*(request() for _ in range(30)))
        return most

    assert [asyncio.run(most_at_a_time(halvings)) for halvings in range(5)] == [8, 4, 2, 1, 1]


def test_waits_double_up_to_the_longest_and_are_drawn_below():
    # Of 200 draws from b/2 to b, none lies in the upper half of that with a probability of 2^-200.
    for tries, bound in ((1, 0.5), (2, 1.0), (4, 4.0), (7, 30.0), (5000, 30.0)):
        waits = [pause(tries, None, 30.0) for _ in range(200)]
        assert bound / 2 <= min(waits) and bound * 0.75 < max(waits) <= bound
    assert 2.0 <= pause(1, 2.0, 30.0) <= 2.5 and 30.0 <= pause(1, 1e9, 30.0) <= 30.5


def test_what_retry_after_says():
    assert read_retry_after("2", 0.0) == 2.0
    assert read_retry_after("1000000000", 0.0) == 1e9
    assert read_retry_after("Thu, 01 Jan 1970 00:01:40 GMT", 40.0) == 60.0
    assert read_retry_after("Thu, 01 Jan 1970 00:00:01 GMT", 40.0) == 0.0
    assert [read_retry_after(text, 0.0) for text in ("soon", "", "-3", "²")] == [None] * 4
    assert read_retry_after("9" * 5000, 0.0) == 999999999999.0


def test_the_gate_halves_once_for_requests_under_way_together_and_opens_slowly():
    async def steps():
        gate = Gate(8)
        began = time.monotonic()
        gate.halve(began)
        gate.halve(began)  # it began before the first halving
        seen = [gate.limit]
        gate.halve(time.monotonic())
        seen.append(gate.limit)
        for _ in range(9):
            gate.halve(time.monotonic())
        seen.append(gate.limit)
        gate.widen()
        seen.append(gate.limit)
        for _ in range(200):
            gate.widen()
        return [*seen, gate.limit]

    assert asyncio.run(steps()) == [4.0, 2.0, 1.0, 2.0, 8.0]


def test_the_plan_says_where_completions_go(http, tmp_path, monkeypatch, capsys):
    from rlx.core.commands.main import main

    stub = http.stub()
    monkeypatch.chdir(tmp_path)
    words = [
        "--algo",
        "rloo",
        "--reward",
        stub.url,
        "--max-rows",
        "8",
        "--max-eval-rows",
        "2",
        "--batch-size",
        "2",
    ]
    assert main(["check", *words]) == 0
    said = capsys.readouterr().out
    assert f"reward http: prompts, completions and columns go to {stub.url}" in said
    assert "reward http tried on 2 rows" in said and len(stub.requests) == 2


def test_it_passes_the_conformance_cases(http):
    stub = http.stub()
    outcomes = check("http", "reward", {"url": stub.url})
    assert {one.case: one.note for one in outcomes if one.status == "failed"} == {}
    assert sum(one.status == "ok" for one in outcomes) >= 10 and stub.requests
