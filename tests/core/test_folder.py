from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rlx.core import checkpoint, lock
from rlx.core.errors import CheckpointError, ConfigError, SaveError
from rlx.core.files import JsonLines
from rlx.core.folder import RunFolder, is_run


def run_in(path: Path, steps: int = 3) -> Path:
    """A finished run: manifest, logs, a checkpoint, a published policy."""
    folder = RunFolder.create(path)
    folder.write_json("manifest.json", {"kind": "rlx run"})
    for step in range(1, steps + 1):
        folder.log_metrics({"step": step})
    checkpoint.write(path, steps, lambda f: (f / "w").write_text("w"), identity={}, keep=None)
    folder.publish(lambda f: [(f / name).write_text("{}") for name in ("config.json", "merges.txt")])
    (folder.plots / "x.png").write_bytes(b"x")
    folder.close()
    return path


# --- who may have the folder ---


@pytest.mark.parametrize("fault", [pytest.param("C8", id="fault[C8]")])
def test_a_folder_that_holds_a_run_is_refused_with_its_step_and_the_way_on(tmp_path, fault):
    path = run_in(tmp_path / "x", steps=40)
    before = sorted(path.rglob("*"))
    with pytest.raises(ConfigError) as caught:
        RunFolder.create(path)
    assert caught.value.exit_code == 2 and "step 40" in caught.value.what
    assert f"rlx resume {path}" in caught.value.hint
    assert sorted(path.rglob("*")) == before


def test_overwriting_deletes_the_run_and_nothing_else(tmp_path):
    path = run_in(tmp_path / "x")
    for name in ("notes.txt", "checkpoint-mine"):
        (path / name).write_text("mine")
    (path / "checkpoint-77").mkdir()  # no manifest: not known to be ours
    folder = RunFolder.create(path, overwrite=True)
    assert sorted(entry.name for entry in path.iterdir()) == [
        ".lock", "checkpoint-77", "checkpoint-mine", "notes.txt",
    ]  # fmt: skip
    assert folder.read_metrics() == []
    folder.close()


def test_overwriting_never_deletes_through_a_link_or_a_name_in_the_manifest(tmp_path):
    path, outside = run_in(tmp_path / "x"), tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").write_text("mine")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] = ["../outside", "..", ".", "", "/etc", "a/b", 3, "linked"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "linked").symlink_to(outside)
    RunFolder.create(path, overwrite=True).close()
    assert (outside / "keep").read_text() == "mine" and not (path / "linked").exists()


def test_a_folder_with_files_that_a_run_would_overwrite_is_refused_even_with_overwrite(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="no run"):
            RunFolder.create(tmp_path, overwrite=overwrite)
    assert (tmp_path / "config.json").read_text() == "{}"


def test_a_folder_with_only_foreign_files_is_taken_and_given_back_as_it_was(tmp_path):
    (tmp_path / "slurm.log").write_text("x")
    folder = RunFolder.create(tmp_path)
    folder.log_metrics({"step": 1})
    folder.discard()
    assert [entry.name for entry in tmp_path.iterdir()] == ["slurm.log"]
    RunFolder.create(tmp_path / "new").discard()
    assert not (tmp_path / "new").exists()


def test_going_on_needs_a_run(tmp_path):
    with pytest.raises(ConfigError, match="no such run folder"):
        RunFolder.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no run"):
        RunFolder.open(tmp_path)
    folder = RunFolder.open(run_in(tmp_path / "x"))
    assert folder.read_metrics() == [{"step": 1}, {"step": 2}, {"step": 3}]
    folder.close()


def unwritable(tmp_path: Path) -> list[Path]:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("x")
    return [in_the_way, in_the_way / "below", Path("/proc/rlx-run"), Path("/proc")]


@pytest.mark.parametrize("place", [pytest.param(i, id=f"fault[C9]-{i}") for i in range(4)])
def test_a_folder_that_cannot_be_written_is_a_save_error(tmp_path, place):
    with pytest.raises(SaveError) as caught:
        RunFolder.create(unwritable(tmp_path)[place])
    assert caught.value.exit_code == 9 and caught.value.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_write_permission_is_a_save_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(SaveError):
        RunFolder.create(tmp_path)


@pytest.mark.parametrize("fault", [pytest.param("C9", id="fault[C9]-probe")])
def test_a_folder_whose_files_cannot_be_flushed_is_a_save_error_and_is_not_left_locked(
    tmp_path, monkeypatch, fault
):
    real, calls = os.fsync, []

    def failing(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:  # the first is the lock's
            raise OSError(30, "Read-only file system")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(SaveError, match="cannot be written"):
        RunFolder.create(tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- the lock ---

HOLD = (
    "import sys; from pathlib import Path; from rlx.core.folder import RunFolder\n"
    "folder = RunFolder.create(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
)


def holder(path: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("fault", [pytest.param("R26", id="fault[R26]")])
def test_a_second_process_is_refused_and_a_dead_ones_lock_is_taken_over(tmp_path, fault):
    process = holder(tmp_path)
    try:
        with pytest.raises(ConfigError) as caught:
            RunFolder.create(tmp_path)
        assert caught.value.exit_code == 2 and str(process.pid) in caught.value.got
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / ".lock").exists()  # killed, so it was left behind
    folder = RunFolder.create(tmp_path)
    with pytest.raises(ConfigError, match="another process"):
        RunFolder.create(tmp_path)  # this process holds it already
    folder.close()
    folder.close()
    RunFolder.create(tmp_path).close()


@pytest.mark.parametrize(
    "change,refused",
    [
        ({}, True),
        ({"boot": "another"}, False),
        ({"started": 1}, False),  # the process id was given to another process since
        ({"pid": 2**22 + 1}, False),
        ({"pid": "x"}, False),
        ({"host": "elsewhere"}, True),  # whether it lives cannot be known here
    ],
)
def test_a_lock_counts_while_its_process_may_live(tmp_path, change, refused):
    (tmp_path / ".lock").write_text(json.dumps({**lock._me(), **change}))
    if refused:
        with pytest.raises(ConfigError):
            RunFolder.create(tmp_path)
    else:
        RunFolder.create(tmp_path).close()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_a_garbled_lock_is_taken_over(tmp_path, content):
    (tmp_path / ".lock").write_bytes(content)
    RunFolder.create(tmp_path).close()


def test_of_many_starts_at_once_exactly_one_gets_the_folder(tmp_path):
    won, gate = [], threading.Barrier(8)

    def start():
        gate.wait()
        try:
            lock.take(tmp_path / ".lock")
            won.append(1)
        except ConfigError:
            pass

    for _ in range(20):
        (tmp_path / ".lock").unlink(missing_ok=True)
        won.clear()
        threads = [threading.Thread(target=start) for _ in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert len(won) == 1


def test_a_lock_is_only_given_back_by_its_owner(tmp_path):
    folder = RunFolder.create(tmp_path)
    other = json.dumps({**lock._me(), "pid": 1})
    (tmp_path / ".lock").write_text(other)
    folder.close()
    assert (tmp_path / ".lock").read_text() == other


# --- logs ---


def test_a_log_is_one_json_object_a_line_and_nan_is_null(tmp_path):
    folder = RunFolder.create(tmp_path)
    folder.log_metrics({"step": 1, "kl": math.nan, "reward": math.inf, "loss": 0.1 + 0.2})
    folder.log_completions({"completion": 'a\nb\u2028"\x1b\ud800', "rewards": {"x": [math.nan]}})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == [
        {"step": 1, "kl": None, "reward": None, "loss": 0.1 + 0.2}
    ]
    assert (tmp_path / "completions.jsonl").read_bytes().count(b"\n") == 1
    assert folder.read_completions() == [{"completion": 'a\nb\u2028"\x1b\ud800', "rewards": {"x": [None]}}]
    assert math.isnan(folder.read_metrics()[0]["kl"])
    folder.close()


@pytest.mark.parametrize("fault", [pytest.param("R33", id="fault[R33]")])
def test_a_resume_cuts_the_logs_back_to_the_checkpoint(tmp_path, fault):
    folder = RunFolder.create(tmp_path)
    folder.write_json("manifest.json", {"kind": "rlx run"})
    folder.log_metrics({"step": 1})
    offsets = folder.offsets()
    assert offsets == {"metrics.jsonl": 12, "completions.jsonl": 0}
    folder.log_metrics({"step": 2})
    folder.log_completions({"step": 2})
    folder.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "rew')  # torn by a crash
    folder = RunFolder.open(tmp_path)
    assert [line["step"] for line in folder.read_metrics()] == [1, 2]
    folder.truncate_to(offsets)
    assert [line["step"] for line in folder.read_metrics()] == [1] and folder.read_completions() == []
    folder.log_metrics({"step": 2})
    assert [line["step"] for line in folder.read_metrics()] == [1, 2]
    folder.close()


def test_an_offset_beyond_the_end_of_a_log_keeps_its_whole_lines(tmp_path):
    log = JsonLines(tmp_path / "log")
    log.append({"a": 1})
    log.truncate(10_000)
    log.append({"a": 2})
    assert log.read() == [{"a": 1}, {"a": 2}]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_that_cannot_be_written_is_a_save_error():
    with pytest.raises(SaveError) as caught:
        JsonLines(Path("/dev/full")).append({"a": 1})
    assert caught.value.exit_code == 9


def test_a_line_torn_by_a_full_disk_is_taken_back(tmp_path, monkeypatch):
    log = JsonLines(tmp_path / "log")
    log.append({"a": 1})
    real = os.write

    def torn(descriptor, data):
        real(descriptor, data[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", torn)
    with pytest.raises(SaveError):
        log.append({"a": 2})
    monkeypatch.undo()
    log.append({"a": 3})
    assert log.read() == [{"a": 1}, {"a": 3}]


# --- files ---


def test_a_text_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = RunFolder.create(tmp_path)
    folder.write_text("README.md", "old")

    def failing(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(SaveError):
        folder.write_text("README.md", "new")
    monkeypatch.undo()
    assert (tmp_path / "README.md").read_text() == "old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".lock", "README.md"]
    folder.close()


def test_publishing_lists_its_files_and_a_failure_leaves_the_root_as_it_was(tmp_path):
    folder = RunFolder.create(tmp_path)
    folder.write_json("manifest.json", {"kind": "rlx run", "seed": 1})

    def fill(aside):
        (aside / "config.json").write_text("1")
        (aside / "value_model").mkdir()
        (aside / "value_model" / "w").write_text("1")

    for _ in range(2):  # a second time replaces the first
        assert folder.publish(fill) == ["config.json", "value_model"]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest == {"kind": "rlx run", "seed": 1, "files": ["config.json", "value_model"]}

    def failing(aside):
        (aside / "config.json").write_text("2")
        raise OSError(28, "No space left on device")

    with pytest.raises(SaveError):
        folder.publish(failing)
    assert (tmp_path / "config.json").read_text() == "1" and (tmp_path / "value_model" / "w").exists()
    assert not list(tmp_path.glob(".tmp-*"))
    folder.close()


def test_opening_cleans_what_a_killed_save_left(tmp_path):
    path = run_in(tmp_path / "x")
    (path / ".tmp-checkpoint-9-1").mkdir()
    assert is_run(path)
    RunFolder.open(path).close()
    assert not (path / ".tmp-checkpoint-9-1").exists()
