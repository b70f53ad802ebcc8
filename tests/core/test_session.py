"""Runs driven by hand inside ``with``: they begin and end as ``rlx.run`` does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import rlx
from rlx.core import checkpoint


class Listening:
    """Writes down the events that stand around the steps."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    @rlx.hookimpl
    def on_run_start(self) -> None:
        self.heard.append("start")

    @rlx.hookimpl
    def on_step_end(self) -> None:
        self.heard.append("step")

    @rlx.hookimpl
    def on_save(self, path: Path) -> None:
        self.heard.append(f"save {path.name}")

    @rlx.hookimpl
    def on_error(self, error: BaseException) -> None:
        self.heard.append(type(error).__name__)

    @rlx.hookimpl
    def on_run_end(self) -> None:
        self.heard.append("end")


def prepare(folder: Path, listening: Listening) -> Any:
    return rlx.prepare(
        reward="length",
        max_steps=2,
        batch_size=2,
        max_completion_length=4,
        max_rows=8,
        max_eval_rows=2,
        num_ppo_epochs=1,
        progress="none",
        plots=False,
        callback=[listening],
        output_dir=str(folder),
    )


def ended(folder: Path) -> tuple[str, int]:
    manifest = json.loads((folder / "manifest.json").read_text())
    return manifest["status"], manifest["exit"]


def test_a_run_in_a_with_block_is_told_saved_and_closed(tmp_path):
    listening, folder = Listening(), tmp_path / "run"
    with prepare(folder, listening) as run:
        for _ in run:
            pass
        saved = run.save()
    assert listening.heard == ["start", "step", "step", "save checkpoint-2", "save run", "end"]
    assert ended(folder) == ("finished", 0)
    assert saved == folder / "checkpoint-2" and checkpoint.verify(saved) is None
    assert (folder / "model.safetensors").is_file() and (folder / "README.md").is_file()


@pytest.mark.parametrize(
    ("raised", "seen", "ending"),
    [
        (KeyError("mine"), KeyError, ("failed", 1)),
        (KeyboardInterrupt(), rlx.Interrupted, ("interrupted", 130)),
    ],
    ids=["error", "interrupt"],
)
def test_what_fails_in_a_with_block_leaves_a_checkpoint_and_says_so(raised, seen, ending, tmp_path):
    listening, folder = Listening(), tmp_path / "run"
    with pytest.raises(seen), prepare(folder, listening) as run:
        run.step()
        raise raised
    assert ended(folder) == ending
    assert listening.heard == ["start", "step", "save checkpoint-1", seen.__name__, "end"]
    assert checkpoint.verify(folder / "checkpoint-1") is None


def test_a_callback_without_room_for_its_file_is_not_a_checkpoint_without_room(tmp_path, capsys):
    """The checkpoint is there; that the callback failed ends the run, as any other failure of one does."""

    class Full:
        @rlx.hookimpl
        def on_step_end(self, run: Any) -> None:
            run.saving = True

        @rlx.hookimpl
        def on_save(self, path: Path) -> None:
            raise rlx.SaveError("no space left for the callback's file")

    with pytest.raises(rlx.SaveError, match="the callback's file"), prepare(tmp_path / "run", Full()) as run:
        for _ in run:
            pass
    assert run.global_step == 1
    assert "not saved" not in capsys.readouterr().out
    assert checkpoint.verify(tmp_path / "run" / "checkpoint-1") is None
    assert ended(tmp_path / "run") == ("failed", 9)


def test_a_checkpoint_that_cannot_be_kept_for_an_early_stop_costs_no_policy(tmp_path, monkeypatch):
    def full(*given: Any, **named: Any) -> None:
        raise rlx.SaveError("no space left")

    class Stopping:
        @rlx.hookimpl
        def on_step_end(self, run: Any) -> None:
            run.stop("enough")
            run.saving = True

    monkeypatch.setattr("rlx.core.checkpoint.write", full)
    monkeypatch.setattr("rlx.core.snapshot.FAILED_SAVES", 2)
    with prepare(tmp_path / "run", Stopping()) as run:
        for _ in run:
            pass
    assert run.failed_saves == 1 and ended(tmp_path / "run") == ("finished", 0)
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_the_policy_that_a_run_ends_with_is_not_saved_as_that_of_its_last_step(tmp_path):
    """Though something fails after it was put in place."""

    class Best:
        @rlx.hookimpl
        def on_step_end(self, run: Any) -> None:
            run.saving = run.global_step == 1

        @rlx.hookimpl
        def on_save(self, run: Any, path: Path) -> None:
            if path == run.path:
                raise KeyError("mine")
            run.final_checkpoint = path

    with pytest.raises(KeyError, match="mine"), prepare(tmp_path / "run", Best()) as run:
        for _ in run:
            pass
    assert run.global_step == 2
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_callback_that_fails_at_the_checkpoint_of_a_failure_does_not_hide_it(tmp_path):
    class Fragile:
        @rlx.hookimpl
        def on_save(self) -> None:
            raise OSError("the callback's disk is full")

    with pytest.raises(KeyError, match="the first") as caught, prepare(tmp_path / "run", Fragile()) as run:
        run.step()
        raise KeyError("the first")
    assert any("OSError: the callback's disk is full" in note for note in caught.value.__notes__)
    assert checkpoint.verify(tmp_path / "run" / "checkpoint-1") is None


def test_a_run_that_is_only_closed_leaves_its_folder_to_others(tmp_path):
    run = prepare(tmp_path / "run", Listening())
    run.step()
    run.close()
    run.close()
    assert ended(tmp_path / "run") == ("finished", 0)
    with pytest.raises(rlx.ConfigError, match="already contains a run"):
        prepare(tmp_path / "run", Listening())
