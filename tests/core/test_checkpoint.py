from __future__ import annotations

import builtins
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlx.core import checkpoint
from rlx.core.errors import CheckpointError, PluginError, SaveError

FILES = {
    "model.safetensors": b"m" * 5000,
    "config.json": b"{}",
    "state/state.json": b"[1]",
    "state/rng": b"r",
}


def fill(folder: Path) -> None:
    (folder / "state").mkdir()
    for name, data in FILES.items():
        with open(folder / name, "xb") as file:
            file.write(data)


def save(root: Path, step: int, keep: int | None = None) -> Path:
    return checkpoint.write(root, step, fill, identity={"seed": 3}, keep=keep)


def steps(root: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in root.glob("checkpoint-*"))


def test_a_checkpoint_verifies_and_names_its_step_files_and_identity(tmp_path):
    folder = save(tmp_path, 7)
    assert folder == tmp_path / "checkpoint-7" and checkpoint.verify(folder) is None
    manifest = checkpoint.read_manifest(folder)
    assert manifest["step"] == 7 and manifest["identity"] == {"seed": 3} and manifest["durability"] == "full"
    assert {name: entry["size"] for name, entry in manifest["files"].items()} == {
        name: len(data) for name, data in FILES.items()
    }
    assert checkpoint.newest(tmp_path) == (folder, [])


# --- the crash sweep: every system call of a save fails once, in each way ---


class Torn:
    """A file whose n-th write is torn in half."""

    def __init__(self, file, tick):
        self.file, self.tick = file, tick

    def write(self, data):
        self.tick(lambda: (self.file.write(data[: len(data) // 2]), self.file.flush()))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)


def arm(fail_at: int, mode: str) -> list[str]:
    """Make the fail_at-th of all mkdir, open, write, fsync and rename calls fail; the calls so far."""
    calls: list[str] = []

    def tick(name, before=lambda: None):
        calls.append(name)
        if len(calls) == fail_at:
            before()
            if mode == "crash":
                os._exit(9)
            raise OSError(errno.EIO if mode == "eio" else errno.ENOSPC, "injected")

    def wrap(name):
        real = getattr(os, name)
        setattr(os, name, lambda *args, **kwargs: (tick(name), real(*args, **kwargs))[1])

    for name in ("mkdir", "fsync", "rename", "open"):
        wrap(name)
    real_open = builtins.open

    def opened(path, mode="r", *args, **kwargs):
        tick("open")
        file = real_open(path, mode, *args, **kwargs)
        return Torn(file, lambda before: tick("write", before)) if set("wxa") & set(mode) else file

    builtins.open = opened
    return calls


def in_child(work) -> int:
    """Run work in a forked child; its exit code."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = work() or 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def count_calls(tmp_path) -> int:
    root = tmp_path / "count"
    save(root, 1)
    save(root, 2)

    def work():
        calls = arm(10**9, "crash")
        save(root, 3, keep=2)
        return len(calls)

    calls = in_child(work)
    assert calls > 20, calls
    return calls


def sweep(tmp_path, mode: str) -> list[int]:
    """For each call that fails: the newest step that verifies afterwards, 0 for none."""
    found = []
    before = tmp_path / "before"
    save(before, 1)
    save(before, 2)
    for place in range(1, count_calls(tmp_path) + 1):
        root = tmp_path / "sweep"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(before, root)

        def work(root=root, place=place):
            arm(place, mode)
            try:
                save(root, 3, keep=2)
            except SaveError:
                return 3
            return 0

        code = in_child(work)
        if mode != "crash":
            assert code in (0, 3), f"call {place}: exit {code}"
            assert not list(root.glob(".tmp-*")), f"call {place} left a temporary folder"
        newest, broken = checkpoint.newest(root)
        assert broken == [], f"call {place} left a checkpoint that is visible and not whole"
        found.append(checkpoint.read_manifest(newest)["step"] if newest else 0)
        checkpoint.clean(root)
        assert not [path for path in root.iterdir() if path.name.startswith(".")]
    return found


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param("crash", id="fault[R7]"),
        pytest.param("enospc", id="fault[R9]"),
        pytest.param("eio", id="fault[R11]"),
    ],
)
def test_whatever_call_fails_the_newest_valid_checkpoint_is_the_old_or_the_new_one(tmp_path, mode):
    found = sweep(tmp_path, mode)
    assert set(found) == {2, 3}
    # Once the new one is visible it stays. (The first call makes the root, which exists already.)
    assert found[1:] == sorted(found[1:])


def test_the_sweep_notices_a_manifest_that_is_written_too_late(tmp_path, monkeypatch):
    # Negative control: rename first and seal afterwards, with retention before the acknowledgement.
    def careless(root, step, fill, *, identity, keep):
        final = root / f"checkpoint-{step}"
        for path in root.glob("checkpoint-*"):
            shutil.rmtree(path)
        os.mkdir(final)
        fill(final)
        checkpoint._seal(final, step, identity)
        return final

    real = checkpoint.write
    newest = []
    for place in range(1, 12):
        root = tmp_path / "sweep"
        shutil.rmtree(root, ignore_errors=True)
        real(root, 1, fill, identity={}, keep=None)
        in_child(
            lambda root=root, place=place: (
                (arm(place, "crash"), careless(root, 3, fill, identity={}, keep=2)) and 0
            )
        )
        newest.append(checkpoint.newest(root)[0])
    assert None in newest


def test_a_reader_that_trusts_any_folder_would_pick_a_torn_one(tmp_path):
    # Negative control for the reader: a crash leaves only .tmp-*, which is never a candidate.
    save(tmp_path, 1)
    in_child(lambda: (arm(8, "crash"), save(tmp_path, 2)) and 0)
    assert list(tmp_path.glob(".tmp-checkpoint-2-*"))
    assert checkpoint.newest(tmp_path) == (tmp_path / "checkpoint-1", [])


@pytest.mark.parametrize("limit", [pytest.param(3000, id="fault[R9]-file-size")])
def test_a_file_system_that_takes_no_more_is_a_save_error_and_loses_nothing(tmp_path, limit):
    save(tmp_path, 1)

    def work():
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            save(tmp_path, 2)
        except SaveError as error:
            return 4 if "MB free" in error.got and error.exit_code == 9 else 5
        return 0

    assert in_child(work) == 4
    assert steps(tmp_path) == [1] and not list(tmp_path.glob(".tmp-*"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk_keeps_the_old_checkpoint_and_takes_a_smaller_one_later(tmp_path):
    root = tmp_path / "small"
    root.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(root)], capture_output=True
    ).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        save(root, 1)

        def too_much(folder):
            (folder / "big").write_bytes(b"x" * (2 << 20))

        with pytest.raises(SaveError, match="step 2") as caught:
            checkpoint.write(root, 2, too_much, identity={}, keep=1)
        assert "last checkpoint took" in caught.value.got
        assert checkpoint.newest(root) == (root / "checkpoint-1", []) and not list(root.glob(".tmp-*"))
        save(root, 3, keep=1)
        assert steps(root) == [3]
    finally:
        subprocess.run(["umount", str(root)], check=True)


def test_safetensors_own_error_for_a_full_disk_is_a_save_error_too(tmp_path):
    from safetensors import SafetensorError

    def raising(folder):
        raise SafetensorError("Error while serializing: No space left on device")

    with pytest.raises(SaveError):
        checkpoint.write(tmp_path, 1, raising, identity={}, keep=None)


@pytest.mark.parametrize("error", [KeyboardInterrupt, PluginError("state")])
def test_what_else_ends_a_save_keeps_its_type_and_leaves_nothing(tmp_path, error):
    def raising(folder):
        (folder / "half").write_bytes(b"x")
        raise error

    with pytest.raises(error if isinstance(error, type) else type(error)):
        checkpoint.write(tmp_path, 1, raising, identity={}, keep=None)
    assert list(tmp_path.iterdir()) == []


# --- targets in the way, retention ---


@pytest.mark.parametrize("fault", [pytest.param("R12", id="fault[R12]")])
def test_a_valid_checkpoint_is_never_overwritten_and_a_broken_one_is_moved_aside(tmp_path, fault):
    first = save(tmp_path, 4)
    with pytest.raises(SaveError, match="exists"):
        save(tmp_path, 4)
    assert checkpoint.verify(first) is None
    (first / "config.json").write_bytes(b"[]")
    assert checkpoint.verify(save(tmp_path, 4)) is None
    assert (tmp_path / "checkpoint-4.broken-1" / "config.json").read_bytes() == b"[]"
    assert checkpoint.newest(tmp_path)[1] == []


@pytest.mark.parametrize("fault", [pytest.param("R28", id="fault[R28]")])
def test_retention_keeps_the_newest_and_a_deletion_that_fails_is_only_a_warning(
    tmp_path, monkeypatch, caplog, fault
):
    for step in range(1, 7):
        save(tmp_path, step, keep=2)
        assert steps(tmp_path) == ([1] if step == 1 else [step - 1, step])
    real = os.rename

    def refusing(source, target):
        if ".trash-" in str(target):
            raise OSError(errno.EACCES, "Permission denied")
        real(source, target)

    monkeypatch.setattr(os, "rename", refusing)
    save(tmp_path, 7, keep=2)
    assert steps(tmp_path) == [5, 6, 7] and "could not be deleted" in caplog.text
    monkeypatch.undo()
    save(tmp_path, 8, keep=1)
    assert steps(tmp_path) == [8]


def test_keeping_all_and_steps_below_older_ones(tmp_path):
    for step in (30, 10, 20):
        save(tmp_path, step)
    assert steps(tmp_path) == [10, 20, 30]
    save(tmp_path, 5, keep=2)  # a resume from an early step: the one just written stays
    assert steps(tmp_path) == [5, 30]


def test_a_protected_checkpoint_stays_and_counts(tmp_path):
    def protecting(step: int, keep: int) -> list[int]:
        checkpoint.write(tmp_path, step, fill, identity={}, keep=keep, protected={2})
        return steps(tmp_path)

    assert [protecting(step, 2) for step in (1, 2, 3, 4)] == [[1], [1, 2], [2, 3], [2, 4]]
    assert protecting(5, 1) == [2, 5]  # and the newest stays as well


@pytest.mark.parametrize("fault", [pytest.param("R27", id="fault[R27]")])
def test_newest_goes_by_the_step_in_the_manifest_and_not_by_time_or_name(tmp_path, fault):
    for step in (9, 10, 100):
        os.utime(save(tmp_path, step), (4e9 - step, 4e9 - step))
    os.rename(tmp_path / "checkpoint-100", tmp_path / "checkpoint-2")
    assert checkpoint.newest(tmp_path) == (tmp_path / "checkpoint-2", [])


# --- damage ---

EVERY_FILE = [*FILES, "manifest.json"]


@pytest.mark.parametrize("name", [pytest.param(name, id=f"fault[R13]-{name}") for name in EVERY_FILE])
def test_one_flipped_bit_anywhere_is_found_and_the_older_checkpoint_is_used(tmp_path, name):
    old, new = save(tmp_path, 1), save(tmp_path, 2)
    data = (new / name).read_bytes()
    for place in {0, len(data) // 2, len(data) - 1}:
        for bit in (0, 5):
            broken = bytearray(data)
            broken[place] ^= 1 << bit
            (new / name).write_bytes(broken)
            if name == "manifest.json" and _same_json(broken, data):
                continue  # white space: nothing has changed
            folder, passed_over = checkpoint.newest(tmp_path)
            assert folder == old, (place, bit)
            assert [path for path, _ in passed_over] == [new] and name.split("/")[0] in passed_over[0][1]
    (new / name).write_bytes(data)
    assert checkpoint.newest(tmp_path) == (new, [])


def _same_json(one: bytes, other: bytes) -> bool:
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


def test_every_bit_of_the_manifest_is_guarded(tmp_path):
    folder = save(tmp_path, 1)
    data = (folder / "manifest.json").read_bytes()
    for place in range(len(data)):
        broken = bytearray(data)
        broken[place] ^= 1 << (place % 8)
        (folder / "manifest.json").write_bytes(broken)
        assert checkpoint.verify(folder) is not None or _same_json(broken, data), place


@pytest.mark.parametrize("damage", ["truncated", "emptied", "deleted", "folder", "link"])
@pytest.mark.parametrize("name", [pytest.param(name, id=f"fault[R14]-{name}") for name in EVERY_FILE])
def test_a_truncated_emptied_deleted_or_replaced_file_is_found(tmp_path, name, damage):
    old, new = save(tmp_path, 1), save(tmp_path, 2)
    path = new / name
    data = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(data[:-1])
    elif damage == "emptied":
        path.write_bytes(b"")
    elif damage == "folder":
        path.mkdir()
    elif damage == "link":
        path.symlink_to(old / name)
    assert checkpoint.newest(tmp_path)[0] == old
    assert len(checkpoint.newest(tmp_path)[1]) == 1


@pytest.mark.parametrize(
    "manifest,reason",
    [
        (b"", "garbled"),
        (b"\xff\xfe", "garbled"),
        (b"[]", "garbled"),
        (b'{"schema": true}', "garbled"),
        (b'{"schema": 2, "step": 1}', "upgrade rlx"),
        (b'{"schema": 1, "step": 1, "files": {}}', "sha256"),
        (b"[" * 200_000, "garbled|nested"),
    ],
    ids=[f"fault[R15]-{i}" for i in range(7)],
)
def test_a_manifest_that_cannot_be_read_is_skipped_with_the_reason(tmp_path, manifest, reason):
    old, new = save(tmp_path, 1), save(tmp_path, 2)
    (new / "manifest.json").write_bytes(manifest)
    folder, broken = checkpoint.newest(tmp_path)
    assert folder == old and broken[0][0] == new
    assert any(word in broken[0][1] for word in reason.split("|"))


@pytest.mark.parametrize("fault", [pytest.param("R16", id="fault[R16]")])
def test_without_any_valid_checkpoint_each_is_listed_with_its_reason(tmp_path, fault):
    with pytest.raises(CheckpointError, match="no checkpoint can be used"):
        checkpoint.latest(tmp_path / "nowhere")
    for step in (1, 2):
        (save(tmp_path, step) / "config.json").unlink()
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(CheckpointError) as caught:
        checkpoint.latest(tmp_path)
    assert caught.value.exit_code == 8 and len(caught.value.lines()) <= 12
    assert all(f"checkpoint-{step}:" in caught.value.got for step in (1, 2, 3))


def test_strict_refuses_to_pass_over_a_broken_checkpoint(tmp_path):
    old, new = save(tmp_path, 1), save(tmp_path, 2)
    (new / "config.json").unlink()
    assert checkpoint.latest(tmp_path)[0] == old
    with pytest.raises(CheckpointError, match="broken"):
        checkpoint.latest(tmp_path, strict=True)


@pytest.mark.parametrize("fault", [pytest.param("R17", id="fault[R17]")])
def test_files_that_others_put_there_are_tolerated(tmp_path, fault):
    folder = save(tmp_path, 1)
    (folder / ".DS_Store").write_bytes(b"\0")
    (folder / "notes").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-notes.txt").write_text("x")
    assert checkpoint.newest(tmp_path) == (folder, [])


# --- malice ---


def reseal(folder: Path, change) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    change(manifest)
    manifest["sha256"] = checkpoint._seal_of(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "/etc/hostname",
        "a/../../outside",
        "",
        ".",
        "state/../../outside",
        "x\0y",
        "..\\outside",
        "manifest.json",
    ],
    ids=lambda name: f"fault[R34]-{name!r}",
)
def test_a_manifest_cannot_name_files_outside_its_checkpoint(tmp_path, name):
    (tmp_path / "outside").write_bytes(b"secret")
    folder = save(tmp_path, 1)
    entry = {"size": 6, "sha256": checkpoint.hashlib.sha256(b"secret").hexdigest()}
    reseal(folder, lambda manifest: manifest["files"].update({name: entry}))
    assert "name inside" in checkpoint.verify(folder)


def test_links_lead_nowhere(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "rng").write_bytes(b"r")
    (outside / "state.json").write_bytes(b"[1]")
    root = tmp_path / "root"
    folder = save(root, 1)
    shutil.rmtree(folder / "state")
    (folder / "state").symlink_to(outside)
    assert "symbolic link" in checkpoint.verify(folder)
    (root / "checkpoint-9").symlink_to(save(tmp_path / "other", 9))
    assert checkpoint.newest(root)[0] is None
    (root / ".trash-checkpoint-1-1").symlink_to(outside)
    checkpoint.clean(root)
    assert (outside / "rng").exists()  # nothing is deleted through a link

    def linking(folder):
        (folder / "weights").symlink_to(outside / "rng")

    with pytest.raises(SaveError, match="plain files"):
        checkpoint.write(root, 2, linking, identity={}, keep=None)


@pytest.mark.parametrize(
    "change", [{"files": []}, {"files": {"a": 1}}, {"step": "1"}, {"files": {"a": {"size": 1}}}]
)
def test_a_manifest_of_the_wrong_shape_is_broken_and_not_an_exception(tmp_path, change):
    folder = save(tmp_path, 1)
    reseal(folder, lambda manifest: manifest.update(change))
    assert isinstance(checkpoint.verify(folder), str)


def test_clean_deletes_only_what_a_save_left(tmp_path):
    for name in (
        ".tmp-checkpoint-3-12",
        ".trash-checkpoint-2-12",
        ".tmp-mine",
        "checkpoint-5",
        ".trash-checkpoint-x",
    ):
        (tmp_path / name).mkdir()
    checkpoint.clean(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".tmp-mine",
        ".trash-checkpoint-x",
        "checkpoint-5",
    ]


def test_reading_and_writing_a_checkpoint_needs_no_torch(tmp_path):
    code = (
        "import sys; from pathlib import Path; from rlx.core import checkpoint\n"
        f"r = Path({str(tmp_path)!r}); checkpoint.write(r, 1, lambda f: None, identity={{}}, keep=1)\n"
        "assert checkpoint.newest(r)[0]; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_files_can_be_read_by_those_who_may_read_the_folder(tmp_path):
    def private(folder):
        (folder / "model.safetensors").write_bytes(b"x")
        (folder / "model.safetensors").chmod(0o600)

    folder = checkpoint.write(tmp_path, 1, private, identity={}, keep=None)
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == folder.stat().st_mode & 0o666
