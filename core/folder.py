"""The run folder: one owner at a time, logs that a resume cuts back, and the final policy at its root.

Logs are one JSON object a line; a resume cuts them back to where the checkpoint was taken, so that no step
appears twice. Only what a run wrote is ever deleted. Standard library only.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlx.core import checkpoint
from rlx.core.errors import CheckpointError, ConfigError
from rlx.core.files import JsonLines, cannot_write, finite, saving, write_text
from rlx.core.lock import give_back, take
from rlx.core.text import safe_json

METRICS, COMPLETIONS, MANIFEST, LOCK = "metrics.jsonl", "completions.jsonl", "manifest.json", ".lock"
BEST = "best.json"
# What a run leaves at the root of its folder, beside the final policy's files that the manifest lists.
OWN_FILES = (
    MANIFEST,
    METRICS,
    COMPLETIONS,
    BEST,
    "config.yaml",
    "README.md",
    "crash.txt",
    "plots",
    "debug",
    "baselines",
    "trackers",
)
POLICY_FILES = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "adapter_config.json",
    "tokenizer*",
)


class RunFolder:
    """A run folder that this process owns until ``close``.

    Attributes:
        path: the folder.
        metrics: the log of metrics, one entry a logged step.
        completions: the log of sample completions.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = path / LOCK
        take(self._lock)
        try:
            _probe(path)
            checkpoint.clean(path)
            self.metrics, self.completions = JsonLines(path / METRICS), JsonLines(path / COMPLETIONS)
        except BaseException:
            self._lock.unlink(missing_ok=True)
            raise

    @classmethod
    def create(cls, path: str | Path, *, overwrite: bool = False) -> RunFolder:
        """A folder for a new run.

        Args:
            path: where; made with its parents if missing.
            overwrite: delete the run that is there, and nothing else.

        Raises:
            ConfigError: it holds a run, or files that a run would overwrite; or another process owns it.
            SaveError: it cannot be written.
        """
        path = Path(path)
        _make(path)
        with saving(path):
            if is_run(path):
                if not overwrite:
                    raise _holds_a_run(path)
                folder = cls(path)
                folder._delete_run()
                return folder
            taken = sorted({e.name for name in (*OWN_FILES, *POLICY_FILES) for e in path.glob(name)})
            if taken:
                raise ConfigError(
                    "the output folder holds files that a run would overwrite, and no run",
                    code="E-CONFIG-OUTPUT",
                    where=str(path),
                    got=", ".join(taken[:5]),
                    hint="choose another --output-dir",
                )
            return cls(path)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The folder of a run that is to go on.

        Raises:
            ConfigError: there is no such folder, or another process owns it.
            CheckpointError: it holds no run.
            SaveError: it cannot be written.
        """
        path = Path(path)
        if not path.is_dir():
            raise ConfigError("there is no such run folder", code="E-CONFIG-OUTPUT", where=str(path))
        if not is_run(path):
            raise CheckpointError(
                "the folder holds no run",
                where=str(path),
                expected="manifest.json of a run, checkpoint-<step>",
            )
        with saving(path):
            return cls(path)

    def log_metrics(self, line: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        self.metrics.append(line)

    def log_completions(self, line: Mapping[str, Any]) -> None:
        """Add a line to completions.jsonl."""
        self.completions.append(line)

    def read_metrics(self) -> list[dict[str, Any]]:
        """What metrics.jsonl holds; null is read as NaN."""
        return [
            {name: math.nan if value is None else value for name, value in line.items()}
            for line in self.metrics.read()
        ]

    def read_completions(self) -> list[dict[str, Any]]:
        """What completions.jsonl holds."""
        return self.completions.read()

    def offsets(self) -> dict[str, int]:
        """Bytes in each log, all of them on the disk: what a checkpoint keeps for ``truncate_to``."""
        return {log.path.name: log.sync() for log in (self.metrics, self.completions)}

    def truncate_to(self, offsets: Mapping[str, int]) -> None:
        """Cut each log back to where it was when the checkpoint was taken."""
        for log in (self.metrics, self.completions):
            log.truncate(offsets.get(log.path.name, 0))

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file at the folder's root, or replace it; a reader sees the old or the new one.

        Raises:
            SaveError: it could not be written.
        """
        with saving(self.path):
            return write_text(self.path / name, text)

    def write_json(self, name: str, value: Any) -> Path:
        """Write values as JSON, like ``write_text``; NaN becomes null."""
        return self.write_text(name, safe_json(finite(value), indent=2) + "\n")

    def publish(self, fill: Callable[[Path], object]) -> list[str]:
        """Put the final policy at the folder's root: written aside, then moved into place file by file.

        Args:
            fill: writes the files into the folder it is given, for example ``policy.save_pretrained``.

        Returns:
            The names of the files; the manifest lists them too.

        Raises:
            SaveError: they could not be written; checkpoints are untouched.
        """
        aside = self.path / f".tmp-checkpoint-0-{os.getpid()}"
        with saving(self.path):
            aside.mkdir()
            try:
                fill(aside)
                checkpoint.sync_tree(aside)
                names = sorted(entry.name for entry in aside.iterdir())
                manifest = read_manifest(self.path)
                self.write_json(MANIFEST, {**manifest, "files": sorted({*manifest.get("files", []), *names})})
                for name in names:
                    if name in manifest.get("files", []) and (self.path / name).is_dir():
                        shutil.rmtree(self.path / name)
                    os.replace(aside / name, self.path / name)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        return names

    @property
    def plots(self) -> Path:
        """The folder of the plots, made on first use."""
        folder = self.path / "plots"
        folder.mkdir(exist_ok=True)
        return folder

    def close(self) -> None:
        """Close the logs and give the folder back; a second call does nothing."""
        self.metrics.close()
        self.completions.close()
        give_back(self._lock)

    def discard(self) -> None:
        """Give the folder back as if the run had never been: for a run that failed before it began."""
        self.metrics.close()
        self.completions.close()
        self._delete_run()
        give_back(self._lock)
        with suppress(OSError):  # others may keep files here
            self.path.rmdir()

    def _delete_run(self) -> None:
        # Names in the manifest are only compared with what lies here: none can lead out of the folder.
        listed = [name for name in read_manifest(self.path).get("files", []) if isinstance(name, str)]
        for entry in list(self.path.iterdir()):
            if entry.name not in (*OWN_FILES, *listed):
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        for folder in filter(checkpoint.is_ours, self.path.glob("checkpoint-*")):
            shutil.rmtree(folder)
        self.metrics, self.completions = JsonLines(self.path / METRICS), JsonLines(self.path / COMPLETIONS)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a run folder; empty without a readable one."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def is_run(path: Path) -> bool:
    """True if a folder holds a run of rlx, finished or not."""
    checkpoints = any(checkpoint.is_ours(entry) for entry in path.glob("checkpoint-*"))
    return checkpoints or read_manifest(path).get("kind") == "rlx run"


def last_step(path: Path) -> int:
    """The last step that the logs or checkpoints of a run folder know of."""
    steps = [0]
    for entry in path.glob("checkpoint-*"):
        with suppress(ValueError):
            steps.append(checkpoint.read_manifest(entry)["step"])
    with suppress(OSError, ValueError, KeyError, TypeError):
        last = [
            line for line in (path / METRICS).read_bytes().splitlines(keepends=True) if line.endswith(b"\n")
        ]
        steps += [int(json.loads(line)["step"]) for line in last[-1:]]
    return max(steps)


def _holds_a_run(path: Path) -> ConfigError:
    return ConfigError(
        f"{path} already contains a run (step {last_step(path)})",
        code="E-CONFIG-OUTPUT",
        hint=f"rlx resume {path}, or choose another --output-dir, or --overwrite-output-dir",
    )


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def _probe(path: Path) -> None:
    """Find out before any weight is loaded whether files can be made and flushed here."""
    probe = path / f".probe-{os.getpid()}"
    try:
        with open(probe, "w", encoding="utf-8") as file:
            file.write("rlx")
            file.flush()
            os.fsync(file.fileno())
    finally:
        probe.unlink(missing_ok=True)
