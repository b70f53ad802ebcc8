"""Checks that hang, crash, flood or lie, run in worker processes: the faults W14 to W17 and S23."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rlx.core import worker_process, workers
from rlx.core.errors import ConfigError, PluginError
from rlx.core.workers import Workers
from rlx.plugins.contract import Failed

CHECKS = Path(__file__).with_name("hostile_checks.py")
DEADLINE = 0.5


@pytest.fixture
def pool():
    made = []

    def make(check="act", **options):
        made.append(Workers(f"{CHECKS}:{check}", **{"count": 1, "deadline": DEADLINE, **options}))
        return made[-1]

    yield make
    for one in made:
        one.close()


def state(pid: int) -> str:
    """What a process does, in the kernel's letters: R runs, S sleeps, Z is dead but not reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "gone"


def lives(pid: int) -> bool:
    return state(pid) not in ("Z", "gone")


def wait_until(holds, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return holds()


def test_answers_come_in_the_order_of_the_items(pool):
    items = [[i] for i in range(50)]
    assert pool("echo", count=3).map(items) == list(range(50))


@pytest.mark.parametrize("value", [None, True, 1.5, "é\ud800\x00", [1, {"a": None}], "x" * 900_000])
def test_json_values_travel_unchanged(pool, value):
    assert pool("echo").map([[value]]) == [value]


def test_no_items_start_no_worker(pool):
    one = pool("echo")
    assert one.map([]) == [] and one.pids == []


def test_no_more_workers_start_than_there_are_items(pool):
    one = pool("echo", count=4)
    one.map([[1], [2]])
    before = one.pids
    assert 1 <= len(before) <= 2
    one.map([[3]] * len(before))
    assert one.pids == before


def test_a_worker_has_a_session_of_its_own_and_no_secrets(pool, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    one = pool("where")
    (told,) = one.map([[]])
    assert told["session"] == told["pid"] == one.pids[0]
    assert "HF_TOKEN" not in told["environment"]
    assert set(told["environment"]) <= {
        *worker_process.PASSED_ON, *worker_process.ONE_THREAD, "__CF_USER_TEXT_ENCODING"
    }  # fmt: skip
    assert told["environment"]["OMP_NUM_THREADS"] == "1"
    assert told["stdin"] == ""
    assert Path(told["folder"]).name.startswith("rlx-workers-")
    one.close()
    assert not Path(told["folder"]).exists()


HANGS = [
    pytest.param("spin", 1.0, id="fault[W14]"),
    # Neither SIGTERM nor the interpreter ends it: 2 seconds of grace, then SIGKILL.
    pytest.param("spin in C", worker_process.GRACE + 1.0, id="fault[W15]"),
]


def test_a_first_call_that_is_slow_can_be_made_part_of_the_start(pool):
    late = Failed("took longer than 0.5 s")
    assert pool("slow_at_first").map([["a"], ["b"]]) == [late, late]
    assert pool("slow_at_first", warm_up=["w"]).map([["a"], ["b"]]) == [["w", "a"], ["w", "a", "b"]]


def test_a_warm_up_that_fails_is_a_check_that_does_not_load(pool):
    with pytest.raises(PluginError) as caught:
        pool(warm_up=["raise"]).map([["a"]])
    assert "ZeroDivisionError" in caught.value.got


@pytest.mark.parametrize(("deed", "longest"), HANGS)
def test_what_hangs_is_killed_at_its_deadline_and_nothing_else_is(pool, deed, longest):
    one = pool()
    assert one.map([["warm"]]) == ["warm"]
    (before,) = one.pids
    began = time.monotonic()
    results = one.map([["a"], [deed], ["b"]])
    took = time.monotonic() - began
    assert results == ["a", Failed("took longer than 0.5 s"), "b"]
    assert (
        DEADLINE <= took < DEADLINE + longest + 20.0
    )  # a new worker may take long on a machine that is busy
    assert not lives(before) and one.pids != [before]


def test_W14_control_without_a_deadline_the_hang_is_real():
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = [{str(CHECKS.parent)!r}]\n"]
    for deed in ("spin", "spin_in_c"):
        line = f"import hostile_checks; hostile_checks.{deed}()"
        with pytest.raises(subprocess.TimeoutExpired):
            subprocess.run([*command[:2], command[2] + line], timeout=0.7)


def test_W15_control_sigterm_alone_does_not_end_the_hang_in_c(pool, monkeypatch):
    monkeypatch.setattr(worker_process, "GRACE", 0.3)
    kill, sent = os.killpg, []

    def count(group, number):
        sent.append((number, lives(group)))
        kill(group, number)

    monkeypatch.setattr(os, "killpg", count)
    pool().map([["spin in C"]])
    assert sent == [(signal.SIGTERM, True), (signal.SIGKILL, True)]


def test_other_workers_go_on_during_a_hang(pool, tmp_path):
    one = pool(count=2, deadline=30.0)
    one.map([["a"], ["b"]])
    # The first hangs until the last is answered: it would lose its time if the others waited for it.
    mark = str(tmp_path / "mark")
    items = [["wait for", mark], *([["x"]] * 200), ["make", mark]]
    assert one.map(items) == ["there", *["x"] * 200, "made"]


def test_what_a_hanging_check_started_is_killed_with_it(pool, tmp_path):
    mark = tmp_path / "child"
    (result,) = pool(deadline=1.5).map([["leave a child", str(mark)]])
    assert isinstance(result, Failed)
    assert wait_until(lambda: not lives(int(mark.read_text())))


DEATHS = [
    pytest.param("segfault", "was killed by SIGSEGV", id="fault[W16] segfault"),
    pytest.param("exit", "exited with 0", id="fault[W16] os._exit"),
]


@pytest.mark.parametrize(("deed", "how"), DEATHS)
def test_an_item_whose_worker_dies_is_tried_once_more_and_then_failed(pool, deed, how):
    first, bad, last = pool(deadline=5.0).map([["a"], [deed], ["b"]])
    assert (first, last) == ("a", "b")
    assert bad.reason.startswith(f"lost 2 workers; the last one {how}")


@pytest.mark.parametrize("_", [pytest.param(0, id="fault[W16] once")])
def test_an_item_whose_worker_died_once_is_answered_by_the_next(pool, tmp_path, _):
    mark = str(tmp_path / "mark")
    assert pool().map([["once", mark], ["b"]]) == ["second", "b"]


@pytest.mark.parametrize("_", [pytest.param(0, id="fault[W16] memory")])
def test_memory_is_limited(pool, _):
    assert pool(memory=1024, deadline=5.0).map([["memory"], ["b"]]) == [Failed("raised MemoryError: "), "b"]


@pytest.mark.parametrize("_", [pytest.param(0, id="fault[W16] respawns")])
def test_a_worker_that_only_dies_is_started_four_times_and_given_up(pool, monkeypatch, _):
    started, start = [], Workers._start
    monkeypatch.setattr(Workers, "_start", lambda self: started.append(1) or start(self))
    one = pool(deadline=5.0)
    results = one.map([["exit"]] * 6)
    assert len(started) == 1 + workers.RESPAWNS == 4
    assert all(isinstance(result, Failed) for result in results)
    assert results[-1].reason == "had no worker left: the last one exited with 0, 4 times in a row"
    assert one.map([["a"]]) == ["a"]  # the next call begins anew


@pytest.mark.parametrize("_", [pytest.param(0, id="fault[W16] among others")])
def test_many_items_that_kill_do_not_harm_those_between(pool, _):
    results = pool(count=2, deadline=5.0).map([["exit"] if i % 3 == 0 else [str(i)] for i in range(12)])
    assert [r for r in results if isinstance(r, str)] == [str(i) for i in range(12) if i % 3]
    assert all(isinstance(results[i], Failed) for i in range(0, 12, 3))


def test_a_worker_that_died_between_two_calls_costs_no_item_its_try(pool):
    one = pool(deadline=5.0)
    one.map([["a"]])
    os.kill(one.pids[0], signal.SIGKILL)
    assert wait_until(lambda: not lives(one.pids[0]))
    assert one.map([["b"]]) == ["b"]


@pytest.mark.parametrize("_", [pytest.param(0, id="fault[W17]")])
def test_a_flood_of_output_is_read_and_dropped(pool, capfd, _):
    one = pool(deadline=20.0)
    before = Path("/proc/self/statm").read_text().split()[1]
    assert one.map([["flood"], ["b"]]) == ["flooded", "b"]
    grown = int(Path("/proc/self/statm").read_text().split()[1]) - int(before)
    assert grown * os.sysconf("SC_PAGE_SIZE") < 16 << 20  # of 100 MiB that were printed
    (slot,) = one._slots
    assert len(slot.process.output()) == worker_process.KEPT_OUTPUT
    assert slot.process.output().endswith(b"the end")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("_", [pytest.param(0, id="fault[W17] secrets")])
def test_the_end_of_the_output_of_a_dead_worker_is_told_without_secrets(pool, _):
    (result,) = pool(deadline=20.0).map([["flood and die"]])
    assert "exited with 4" in result.reason and "the" in result.reason
    assert "hunter2" not in result.reason
    assert len(result.reason) < 600


LIES = [
    pytest.param("pickle", "no JSON", id="fault[S23]"),
    pytest.param("huge", "a reply of 4294967295 bytes", id="fault[S23] length"),
    pytest.param("other id", "a message out of turn", id="fault[S23] id"),
    pytest.param("NaN literal", "no JSON", id="fault[S23] NaN"),
    pytest.param("deep", "no JSON", id="fault[S23] depth"),
]


@pytest.mark.parametrize(("deed", "told"), LIES)
def test_what_is_no_answer_is_a_failure_and_is_never_unpickled(pool, tmp_path, deed, told):
    mark = tmp_path / "unpickled"
    item = [deed, str(mark)] if deed == "pickle" else [deed]
    first, bad, last = pool(deadline=5.0).map([["a"], item, ["b"]])
    assert (first, last) == ("a", "b")
    assert bad.reason.startswith("got no answer from its worker but") and told in bad.reason
    assert not mark.exists()


def test_S23_control_the_pickle_would_run_code(tmp_path, monkeypatch):
    import pickle

    monkeypatch.syspath_prepend(str(CHECKS.parent))
    payload = importlib.import_module(CHECKS.stem)._Payload(str(tmp_path / "mark"))
    pickle.loads(pickle.dumps(payload)).close()
    assert (tmp_path / "mark").exists()


RAISES = [
    ("raise", "raised ZeroDivisionError: division by zero"),
    ("sys.exit", "raised SystemExit: 0"),
    ("nest", "raised RecursionError"),
    ("nan", "raised ValueError: Out of range float values"),
    ("no JSON", "raised TypeError: Object of type set"),
]


@pytest.mark.parametrize(("deed", "told"), RAISES)
def test_an_exception_fails_its_item_and_keeps_the_worker(pool, deed, told):
    one = pool(deadline=5.0)
    one.map([["warm"]])
    before = one.pids
    first, bad, last = one.map([["a"], [deed], ["b"]])
    assert (first, last) == ("a", "b")
    assert bad.reason.startswith(told)
    assert one.pids == before


@pytest.mark.parametrize(
    ("check", "got"),
    [
        (f"{CHECKS}:missing", "AttributeError"),
        ("no_such_module_anywhere:check", "ModuleNotFoundError"),
        (f"{CHECKS.parent}/no_such_file.py:check", "FileNotFoundError"),
    ],
)
def test_a_check_that_does_not_load_is_told_and_no_worker_is_left(check, got):
    one = Workers(check)
    with pytest.raises(PluginError) as caught:
        one.map([["a"]] * 3)
    assert got in caught.value.got and caught.value.code == "E-PLUGIN-WORKER"
    assert one.pids == []


def test_a_function_of_a_module_is_found():
    from rlx.core.text import is_secret

    one = Workers(is_secret)
    assert one.map([["api_key"], ["beta"]]) == [True, False]
    one.close()


def test_a_function_of_a_script_is_found(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import rlx\n"
        "def double(x):\n    return 2 * x\n"
        "if __name__ == '__main__':\n    print(rlx.Workers(double).map([[1], [2]]))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[2, 4]\n", done.stderr


@pytest.mark.parametrize("check", [lambda x: x, print.__self__])
def test_what_another_process_cannot_find_is_refused(check):
    with pytest.raises(ConfigError, match="top level"):
        Workers(check)


@pytest.mark.parametrize("options", [{"count": 0}, {"deadline": 0}, {"memory": 0}])
def test_unfit_numbers_are_refused(options):
    with pytest.raises(ConfigError):
        Workers("json:loads", **options)


def test_several_threads_share_a_pool(pool):
    one, found = pool("echo", count=2), {}
    threads = [
        threading.Thread(target=lambda k=k: found.update({k: one.map([[f"{k}-{i}"] for i in range(20)])}))
        for k in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {k: [f"{k}-{i}" for i in range(20)] for k in range(4)}


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_after_a_fork_the_child_has_workers_of_its_own(pool):
    one = pool("where")
    (mine,) = one.map([[]])
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            assert one.pids == []
            (theirs,) = one.map([[]])
            one.close()
            os.write(writing, str(theirs["pid"]).encode())
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    theirs = int(os.read(reading, 20))
    os.close(reading)
    os.close(writing)
    assert theirs != mine["pid"] and not lives(theirs)
    (again,) = one.map([[]])
    assert again["pid"] == mine["pid"]


def test_close_ends_the_workers_and_another_call_starts_new_ones(pool):
    one = pool("where", count=2)
    one.map([[]] * 20)
    before = one.pids
    one.close()
    assert one.pids == [] and not any(map(lives, before))
    (told,) = one.map([[]])
    assert told["pid"] not in before


def test_close_ends_a_call_that_another_thread_is_in(pool):
    one, raised = pool("act", deadline=60.0), []

    def work():
        try:
            one.map([["spin"]])
        except RuntimeError as error:
            raised.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    assert wait_until(lambda: one.pids)
    (pid,) = one.pids
    one.close()
    thread.join(10)
    assert raised == ["the workers were closed while they worked"] and not lives(pid)
    assert one.map([[1]]) == [1]


def test_a_pool_that_is_dropped_leaves_nothing():
    one = Workers(f"{CHECKS}:where")
    (told,) = one.map([[]])
    del one
    assert wait_until(lambda: not lives(told["pid"]))
    assert not Path(told["folder"]).exists()


ENDS = [
    pytest.param(signal.SIGINT, 60, id="Ctrl-C"),
    pytest.param(signal.SIGKILL, 2, id="killed parent"),  # the worker ends itself half a second after that
]


@pytest.mark.parametrize(("number", "deadline"), ENDS)
def test_no_worker_survives_its_parent(number, deadline):
    code = (
        "from rlx.core import workers\n"
        "workers.ORPHANED = 0.5\n"
        f"pool = workers.Workers({f'{CHECKS}:act'!r}, deadline={deadline})\n"
        "pool.map([['warm']])\n"
        "print(pool.pids[0], flush=True)\n"
        "pool.map([['spin']])\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as run:
        worker = int(run.stdout.readline())
        assert wait_until(lambda: state(worker) == "R")  # it spins
        run.send_signal(number)
        run.wait(20)
        assert run.returncode != 0
        assert wait_until(lambda: not lives(worker))
