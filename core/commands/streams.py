"""Output streams that outlive their reader and their encoding."""

from __future__ import annotations

import io
import os
import sys
from typing import Any


class Pipe(io.FileIO):
    """A file that turns into nothing once its reader is gone: ``| head`` must not end a training run."""

    def write(self, data: Any) -> int:
        """Write, or pretend to."""
        try:
            return super().write(data)
        except BrokenPipeError:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self.fileno())
            os.close(nothing)
            return len(data)


def unbreakable() -> None:
    """Let stdout and stderr survive a closed pipe and characters that the locale cannot show."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            descriptor = stream.fileno()
        except (AttributeError, OSError):  # closed from the start, or replaced by something that is no file
            continue
        stream.flush()
        setattr(
            sys,
            name,
            io.TextIOWrapper(
                io.BufferedWriter(Pipe(descriptor, "w", closefd=False)),
                encoding=stream.encoding,
                errors="backslashreplace",
                line_buffering=name == "stderr" or stream.isatty(),
            ),
        )
