"""A worker process as its parent sees it: started, spoken to, watched and ended; nothing here waits long.

The process has a session of its own, so Ctrl-C in a terminal does not reach it; it is ended with all that it
started. It sees no environment variable that could hold a secret, and it is told where modules are.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlx.core.text import redact, safe_text

LENGTH = struct.Struct(">I")
LONGEST_REPLY = 1 << 20  # bytes
PIECE = 64 << 10  # bytes read or written at a time
KEPT_OUTPUT = 64 << 10  # bytes of what a worker prints, the last ones
SHOWN_OUTPUT = 400  # characters of it in a message
GRACE = 2.0  # seconds between SIGTERM and SIGKILL
PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "TZ")
# A worker is one of several: none should take all cores.
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class ProtocolError(Exception):
    """A worker sent something that is no message."""


class WorkerProcess:
    """One child process.

    Args:
        hello: the first message, what to load.
        folder: its working directory.
        patience: seconds that it has to load its function.

    Attributes:
        pid: number of the process and of its group.
        job: number of the item that it is working on, or None.
        ready: False until it has loaded its function.
        due: when to lose patience, in seconds of ``time.monotonic``; None while it idles.
    """

    def __init__(self, hello: Mapping[str, Any], folder: str, patience: float) -> None:
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-X", "faulthandler", str(Path(__file__).with_name("worker_main.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            cwd=folder,
            env=environment | dict.fromkeys(ONE_THREAD, "1"),
            start_new_session=True,
        )
        pipes = self._process.stdin, self._process.stdout, self._process.stderr
        self._in, self._out, self._err = (pipe.fileno() for pipe in pipes if pipe is not None)
        for descriptor in (self._in, self._out, self._err):
            os.set_blocking(descriptor, False)
        self.pid = self._process.pid
        self.job: int | None = None
        self.ready = False
        self.due: float | None = time.monotonic() + patience
        self._outgoing, self._incoming = bytearray(), bytearray()
        self._output: deque[bytes] = deque()
        self._open = [self._out, self._err]
        self._killed_at: float | None = None
        self.send(hello)

    def send(self, message: Mapping[str, Any]) -> None:
        """Put a message on its way; what does not fit into the pipe follows in ``pump``."""
        data = json.dumps(message).encode()
        self._outgoing += LENGTH.pack(len(data)) + data
        self._write()

    def waits_for(self) -> dict[int, bool]:
        """File descriptor → whether it is to be written to; the others are to be read from."""
        if self.dying:
            return {}
        return dict.fromkeys(self._open, False) | ({self._in: True} if self._outgoing else {})

    def pump(self, *, ended: bool = False) -> list[dict[str, Any]]:
        """Write and read what can be at once.

        Args:
            ended: the process has, so read all that it left.

        Returns:
            The messages that arrived whole.

        Raises:
            ProtocolError: something else arrived.
        """
        if self._outgoing:
            self._write()
        more = True
        while more:
            self._keep(printed := self._read(self._err))
            self._incoming += (data := self._read(self._out))
            more = ended and bool(printed or data)
        return self._messages()

    def _read(self, descriptor: int) -> bytes:
        if descriptor not in self._open:
            return b""
        try:
            data = os.read(descriptor, PIECE)
        except BlockingIOError:
            return b""
        if not data:
            self._open.remove(descriptor)  # at its end; to go on asking would never let us wait
        return data

    def _write(self) -> None:
        # A broken pipe is no news here: the process has ended, and ``ended`` tells so.
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            while self._outgoing:
                del self._outgoing[: os.write(self._in, self._outgoing[:PIECE])]

    def _keep(self, printed: bytes) -> None:
        if printed:
            self._output.append(printed)
        total = sum(map(len, self._output))
        while total > KEPT_OUTPUT + PIECE:
            total -= len(self._output.popleft())

    def _messages(self) -> list[dict[str, Any]]:
        found = []
        while len(self._incoming) >= LENGTH.size:
            (length,) = LENGTH.unpack(self._incoming[: LENGTH.size])
            if length > LONGEST_REPLY:
                raise ProtocolError(f"a reply of {length} bytes, more than {LONGEST_REPLY}")
            end = LENGTH.size + length
            if len(self._incoming) < end:
                break
            found.append(_decoded(bytes(self._incoming[LENGTH.size : end])))
            del self._incoming[:end]
        return found

    def output(self) -> bytes:
        """The end of what it printed, at most 64 KiB."""
        return b"".join(self._output)[-KEPT_OUTPUT:]

    def ended(self) -> bool:
        """Whether the process itself has ended; what it started may still run."""
        if self._process.returncode is not None:
            return True
        try:
            # Not reaped yet, so that its number, which names its group too, is not given to another process.
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # somebody else in this program waits for all children
            return True

    def how(self) -> str:
        """How it ended, after ``kill``, and the end of what it printed."""
        code = self._process.wait()
        ended = f"exited with {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
        printed = self.output()[-SHOWN_OUTPUT:].decode(errors="replace").strip()
        return f"{ended}: …{safe_text(redact(printed), SHOWN_OUTPUT)}" if printed else ended

    @property
    def free(self) -> bool:
        """Whether it works on nothing: it waits for an item, or still starts."""
        return self.job is None and not self.dying

    @property
    def dying(self) -> bool:
        """Whether ``terminate`` was called."""
        return self._killed_at is not None

    def terminate(self) -> None:
        """Ask it to end; ``reap`` does the rest."""
        if self._killed_at is None:
            self._killed_at = time.monotonic() + GRACE
            self._signal(signal.SIGTERM)

    def reap(self) -> bool:
        """After ``terminate``: whether it is gone, with all that it started; killed when its time is up."""
        if not self.ended() and time.monotonic() < (self._killed_at or 0.0):
            return False
        self.kill()
        return True

    def kill(self) -> None:
        """End it at once, with all that it started."""
        self._signal(signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # it hangs in the kernel: a dead disk
            self._process.wait(GRACE)
        self._close()

    def forget(self) -> None:
        """In a process that was forked off: leave the parent's child alone, and let go of its pipes."""
        self._process.returncode = 0  # else Python would try to wait for somebody else's child
        self._close()

    def _signal(self, number: signal.Signals) -> None:
        if self._process.returncode is not None:
            return  # reaped: the number may be another's by now
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: EPERM where all are zombies
            os.killpg(self.pid, number)

    def _close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert pipe is not None  # all three were asked for
            pipe.close()


def _decoded(data: bytes) -> dict[str, Any]:
    def refuse(literal: str) -> float:
        raise ValueError(f"{literal} is no JSON")

    try:
        message = json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise ProtocolError(f"a reply that is no JSON: {data[:40]!r}") from error
    if not isinstance(message, dict):
        raise ProtocolError(f"a reply that is no message: {data[:40]!r}")
    return message
