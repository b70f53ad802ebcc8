"""The lock of a run folder: a file that names the process that owns it.

A process is named by id, start, host and boot, so that a lock left by a crash, a reboot or a recycled process
id is told from a living one, and no child process can hold it by accident. Standard library only.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlx.core.errors import ConfigError
from rlx.core.text import safe_text

try:
    import fcntl
except ImportError:  # not POSIX: two processes that start in the same instant may both get the lock
    fcntl = None  # type: ignore[assignment]


def take(lock: Path) -> None:
    """Write this process's name into the lock file, unless a living process has its own there.

    Raises:
        ConfigError: a living process, this one included, or one on another host owns it.
    """
    while True:
        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            if fcntl is not None:
                with suppress(OSError):  # a file system without flock
                    fcntl.flock(descriptor, fcntl.LOCK_EX)  # held only while reading and writing the name
            if not lock.exists() or lock.stat().st_ino != os.fstat(descriptor).st_ino:
                continue  # its owner gave it back meanwhile
            holder = _holder(lock)
            if holder and _alive(holder):
                raise ConfigError(
                    "another process is writing into this run folder",
                    code="E-CONFIG-LOCKED",
                    where=str(lock.parent),
                    got=safe_text(f"process {holder.get('pid')} on {holder.get('host')}"),
                    hint=f"wait for it, or choose another --output-dir; if it is dead for sure: rm {lock}",
                )
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(_me()).encode(), 0)
            os.fsync(descriptor)
            return
        finally:
            os.close(descriptor)


def give_back(lock: Path) -> None:
    """Remove the lock file if it is this process's."""
    if _holder(lock) == _me():
        lock.unlink(missing_ok=True)


def _holder(lock: Path) -> dict[str, Any]:
    try:
        holder = json.loads(lock.read_bytes())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _me() -> dict[str, Any]:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "host": socket.gethostname(),
        "boot": boot.read_text().strip() if boot.exists() else "",
    }


def _alive(holder: Mapping[str, Any]) -> bool:
    """Whether the process that a lock names still runs; a process on another host counts as alive."""
    me = _me()
    if holder.get("host") != me["host"]:
        return True
    if holder.get("boot") != me["boot"] or type(holder.get("pid")) is not int:
        return False
    started = _started(holder["pid"])
    return started is not None and started == holder.get("started")


def _started(pid: int) -> int | None:
    """When a process began, in clock ticks since boot; 0 where unknown, None if it does not run."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass  # it runs, as another user
        return 0
    return None if fields[0] == "Z" else int(fields[19])
