"""A hub that is away is noticed in seconds; one that is slow, or refuses, is left to its own client."""

from __future__ import annotations

import socket
import threading
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rlx.core import hub
from rlx.core.commands.main import main
from rlx.core.errors import ConfigError, DataError
from rlx.core.pretrained import Source
from rlx.core.rows import read_rows


class Hub(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.server.asked.append(self.path)
        self.server.gate.wait(self.server.slow)
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *words):
        pass


@contextmanager
def up(port=0, slow=0.0):
    server = ThreadingHTTPServer(("127.0.0.1", port), Hub)
    server.asked, server.slow, server.gate = [], slow, threading.Event()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


@pytest.fixture
def place(monkeypatch, tmp_path):
    """``place(port)``: where the hub is said to be, its caches empty; waits are listed in ``place.waits``."""
    import datasets
    from huggingface_hub import constants

    def chosen(port, patience=5.0):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", patience)
        address = f"http://127.0.0.1:{port}"
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))

    chosen.waits = []
    monkeypatch.setattr(hub.time, "sleep", chosen.waits.append)
    return chosen


def test_a_connection_that_is_refused_is_tried_thrice(place):
    place(free_port())
    reason = hub.unreachable("no/such")
    assert reason.startswith("no connection to http://127.0.0.1:") and "refused" in reason
    assert place.waits == [hub.WAIT] * 2 and hub.TRIES * hub.WAIT < 5


def test_a_hub_that_comes_back_is_reached(place, monkeypatch):
    port = free_port()
    place(port)
    with ExitStack() as later:
        servers = []
        monkeypatch.setattr(hub.time, "sleep", lambda _: servers.append(later.enter_context(up(port))))
        assert hub.unreachable("no/such") == ""
        assert [server.asked for server in servers] == [["/no/such/resolve/main/README.md"]]


def test_a_slow_hub_is_waited_for_and_a_silent_one_is_its_clients_business(place):
    with up(slow=1.0) as server:
        place(server.server_port)
        assert hub.unreachable("some/model", revision="v1") == ""
        assert server.asked == ["/some/model/resolve/v1/README.md"]
        assert hub.unreachable("some/rows", repo_type="dataset") == ""
        assert server.asked[1] == "/datasets/some/rows/resolve/main/README.md"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place(silent.getsockname()[1], patience=0.2)
        assert hub.unreachable("some/model") == ""
    assert not place.waits


def test_a_host_that_never_answers_is_asked_once(place):
    with socket.socket() as full:  # connections beyond a full backlog get no answer
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        place(full.getsockname()[1], patience=0.3)
        assert hub.unreachable("some/model").startswith("no connection to")
        for one in waiting:
            one.close()
    assert not place.waits


def test_what_the_cache_holds_needs_no_hub(place, tmp_path, monkeypatch):
    place(free_port())
    folder = tmp_path / "hub" / "models--some--model"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "config.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    assert hub.unreachable("some/model") == ""
    assert hub.unreachable("some/model", revision="v1") != ""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.unreachable("no/such") == ""  # whoever is told to be offline knows why


def test_a_model_and_a_data_set_that_cannot_be_fetched_are_told_at_once(place, tmp_path):
    place(free_port())
    with pytest.raises(ConfigError, match="is not here and cannot be fetched") as caught:
        Source("no/such", role="model").check_exists()
    assert "no connection to" in caught.value.got and caught.value.exit_code == 2
    with pytest.raises(DataError, match="cannot be loaded") as refused:
        read_rows("no/such")
    assert "no connection to" in refused.value.got and refused.value.exit_code == 3


@pytest.mark.parametrize("kept", ["no___such_1", "no___such1"])
def test_a_data_set_that_was_loaded_before_is_left_to_its_library(place, tmp_path, monkeypatch, kept):
    import datasets

    place(free_port())
    (tmp_path / "datasets" / kept).mkdir(parents=True)
    loaded = datasets.Dataset.from_dict({"x": [1]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: loaded)
    assert read_rows("no/Such1").rows == [{"x": 1}]


def test_compare_and_run_say_it(place, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place(free_port())
    for words in (
        ["compare", "no/such", "tiny", "--reward", "exact_match"],
        ["run", "--algo", "ppo", "--reward", "exact_match", "--model", "no/such"],
        ["run", "--algo", "ppo", "--reward", "reward_model", "--reward_model.model", "no/such"],
    ):
        place.waits.clear()
        assert main(words) == 2
        assert "'no/such' is not here and cannot be fetched" in capsys.readouterr().err
        assert place.waits == [hub.WAIT] * 2  # and not the hub client's
