"""Writing text and logs so that a reader never sees half of anything. Standard library only."""

from __future__ import annotations

import json
import math
import numbers
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rlx.core.errors import SaveError
from rlx.core.text import safe_json, safe_text


class JsonLines:
    """A log of one JSON object a line, whole lines only. Made when the first line is written.

    Attributes:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        if path.is_file():
            self.truncate(path.stat().st_size)

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line; NaN and infinity become null.

        Raises:
            SaveError: it could not be written; the file ends with the last whole line.
        """
        data = (safe_json(finite(dict(line))) + "\n").encode()
        with saving(self.path):
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
            size = os.fstat(self._descriptor).st_size
            try:
                done = 0
                while done < len(data):
                    done += os.write(self._descriptor, data[done:])
            except OSError:
                with suppress(OSError):  # a device such as /dev/full has no size
                    os.ftruncate(self._descriptor, size)
                raise

    def read(self) -> list[dict[str, Any]]:
        """All lines."""
        if not self.path.is_file():
            return []
        return [json.loads(line) for line in self.path.read_bytes().splitlines()]

    def sync(self) -> int:
        """Flush the log to the disk; its size in bytes."""
        if self._descriptor is None:
            return self.path.stat().st_size if self.path.is_file() else 0
        with saving(self.path):
            os.fsync(self._descriptor)
        return os.fstat(self._descriptor).st_size

    def truncate(self, size: int) -> None:
        """Cut the log to size bytes, and further to the end of a whole line."""
        if not self.path.is_file():
            return
        with saving(self.path), open(self.path, "r+b") as file:
            head = file.read(size)
            file.truncate(head.rfind(b"\n") + 1)

    def close(self) -> None:
        """Close the file; a later ``append`` opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def write_text(path: Path, text: str) -> Path:
    """Write or replace a text file: aside, flushed to the disk, renamed into place."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def finite(value: Any) -> Any:
    """Values as JSON can say them: NaN and infinity become None, numbers of numpy plain ones."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    return value


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Tell an error of the operating system as a ``SaveError`` about path."""
    try:
        yield
    except Exception as error:
        # safetensors has an exception of its own for a full disk.
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise cannot_write(path, error) from error
        raise


def cannot_write(path: Path, error: Exception) -> SaveError:
    """The error that says why a path cannot be written, and how much space is left."""
    got = (error.strerror if isinstance(error, OSError) else None) or str(error)
    with suppress(OSError):
        got += f"; {shutil.disk_usage(path).free / 1e6:.1f} MB free"
    return SaveError(
        "the run folder cannot be written",
        code="E-SAVE-FOLDER",
        where=safe_text(path),
        got=got,
        hint="free some space, repair the permissions, or choose another --output-dir",
    )
