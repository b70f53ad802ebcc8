from __future__ import annotations

import json
import sys

import pytest

from rlx.core import manifest
from rlx.core.folder import RunFolder, is_run


def begin(folder, **changes):
    manifest.begin(folder, **({"seed": 5, "data": "abc", "device": "cpu"} | changes))


def test_the_manifest_says_what_ran_and_how_it_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["rlx", "run", "--beta", "0.1"])
    folder = RunFolder.create(tmp_path)
    begin(folder)
    assert is_run(tmp_path)
    written = json.loads((tmp_path / "manifest.json").read_text())
    assert written["status"] == "running" and written["command"] == "rlx run --beta 0.1"
    assert written["seed"] == 5 and written["data"] == "abc"
    assert {"python", "rlx", "torch", "transformers", "accelerate", "peft", "datasets"} <= set(
        written["versions"]
    )
    assert written["hardware"]["threads"] >= 1 and written["hardware"]["memory"] > 1 << 28
    assert written["plugins"][0]["name"] == "rlx" and written["plugins"][0]["version"]
    manifest.finish(folder, "interrupted", seconds=1.5, exit_code=130)
    begin(folder)
    again = json.loads((tmp_path / "manifest.json").read_text())
    assert again["status"] == "running" and "exit" not in again
    assert [(part["status"], part["exit"], part["seconds"]) for part in again["earlier"]] == [
        ("interrupted", 130, 1.5)
    ]
    folder.close()


@pytest.mark.parametrize(
    "words",
    [
        ["rlx", "run", "--hf-token", "s3cr3t"],
        ["rlx", "run", "--hf-token=s3cr3t"],
        ["rlx", "run", "--reward.api_key", "s3cr3t"],
        ["rlx", "run", "--reward.url", "https://user:s3cr3t@host/x"],
        ["rlx", "run", "--x", "password=s3cr3t"],
    ],
    ids=lambda words: f"fault[S17]-{words[2]}",
)
def test_no_secret_of_the_command_line_is_written_down(words):
    line = manifest.command_line(words)
    assert "s3cr3t" not in line and "redacted" in line


def test_what_is_no_secret_stays():
    line = manifest.command_line(["rlx", "--max-tokens-per-micro-batch", "64", "--seed", "1", "a b"])
    assert line == "rlx --max-tokens-per-micro-batch 64 --seed 1 'a b'"


def test_the_commit_of_a_folder_is_none_outside_a_repository(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert manifest.git_commit(tmp_path) is None
