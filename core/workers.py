"""Workers: child processes for checks of a model's output that can hang, crash or eat memory.

A check is a plain function of JSON values that is defined at the top level of a module or file. Each item has
a deadline; what hangs is killed, what dies is started again, and neither touches the other items or the run.
POSIX only. Leaves out a sandbox: a check is trusted, only the texts that it reads are not.
"""

from __future__ import annotations

import os
import select
import shutil
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlx.core.errors import ConfigError, PluginError
from rlx.core.text import safe_text
from rlx.core.worker_process import ProtocolError, WorkerProcess
from rlx.plugins.contract import Failed

RESPAWNS = 3  # times in a row that a worker is started again without having answered
TRIES = 2  # workers that an item may lose before it has failed
START = 60.0  # seconds that a worker has to load its check
NAP = 0.05  # longest wait for the next event, in seconds: the death of a process is none by itself
ORPHANED = 10.0  # seconds beyond the deadline after which a worker whose parent is gone ends itself


@dataclass
class _Slot:
    """A place for a worker.

    Attributes:
        process: the one in it, or None.
        deaths: how many in a row died by themselves without an answer.
    """

    process: WorkerProcess | None = None
    deaths: int = 0

    @property
    def dying(self) -> bool:
        """Whether the worker in it was told to end and has not yet."""
        return self.process is not None and self.process.dying


@dataclass
class _Round:
    """One call of ``map``: what is still to do, and what came of the rest."""

    items: list[list[Any]]
    waiting: deque[int] = field(default_factory=deque)
    losses: dict[int, int] = field(default_factory=dict)
    results: dict[int, Any] = field(default_factory=dict)
    last_death: str = ""

    def __post_init__(self) -> None:
        self.waiting.extend(range(len(self.items)))

    def settle(self, process: WorkerProcess, result: Any) -> None:
        """The item that a process works on is done, if it works on one."""
        if process.job is not None:
            self.results[process.job] = result
        process.job = process.due = None


class Workers:
    """A pool of worker processes that call one function, started when they are first needed.

    May be used from several threads, one of which is served at a time, and after a fork, where the child gets
    workers of its own. ``close`` ends a ``map`` that another thread is in.

    Args:
        check: called in the workers: a function at the top level of a module or file, or ``module:name``.
        count: worker processes, at least 1.
        deadline: seconds an item may take, more than 0.
        memory: address space of a worker in MiB.
        warm_up: arguments of a call that a new worker makes before its first item, and that counts as part of
            its start: for what the check imports or compiles when it is first called.

    Raises:
        ConfigError: the check is no function that another process can find; or the system is not POSIX.
    """

    def __init__(
        self,
        check: Callable[..., Any] | str,
        *,
        count: int = 2,
        deadline: float = 5.0,
        memory: int = 4096,
        warm_up: Sequence[Any] | None = None,
    ) -> None:
        if os.name != "posix":
            raise ConfigError("worker processes need Linux or macOS", code="E-CONFIG-WORKERS", got=os.name)
        if count < 1 or deadline <= 0 or memory < 1:
            given = f"count {count}, deadline {deadline}, memory {memory}"
            raise ConfigError("workers need a count, a deadline and memory", code="E-CONFIG-VALUE", got=given)
        self._check, self._count = _found(check), count
        self._deadline, self._memory = deadline, memory << 20
        self._warm_up = None if warm_up is None else list(warm_up)
        self._new()
        _POOLS.add(self)

    def map(self, items: Iterable[Sequence[Any]]) -> list[Any]:
        """Call the check once an item.

        Args:
            items: the arguments of each call, as JSON has them.

        Returns:
            In the order of the items: what the check returned, as JSON has it; or ``Failed`` where it raised,
            took longer than the deadline, or twice lost its worker.

        Raises:
            PluginError: the workers cannot load the check.
            RuntimeError: another thread closed them meanwhile.
        """
        todo = _Round([list(item) for item in items])
        with self._lock:
            try:
                for slot in self._slots:
                    slot.deaths = 0
                    self._attend(slot, todo)  # one that died since the last call costs no item its try
                while len(todo.results) < len(todo.items) or any(slot.dying for slot in self._slots):
                    if self._closing:
                        raise RuntimeError("the workers were closed while they worked")
                    self._assign(todo)
                    self._wait()
                    for slot in self._slots:
                        self._attend(slot, todo)
            except BaseException:  # Ctrl-C, or a check that does not load: nothing may stay behind
                self._end()
                raise
        return [todo.results[i] for i in range(len(todo.items))]

    def close(self) -> None:
        """End the workers. Another ``map`` starts new ones."""
        self._closing = True
        try:
            with self._lock:
                self._end()
        finally:
            self._closing = False

    @property
    def pids(self) -> list[int]:
        """Process numbers of the workers that run."""
        return [slot.process.pid for slot in self._slots if slot.process is not None]

    def _assign(self, todo: _Round) -> None:
        """Give items to idle workers, and start workers while there are more items than those."""
        free = [slot.process for slot in self._slots if slot.process is not None and slot.process.free]
        for process in free:
            if process.ready and todo.waiting:
                process.job = todo.waiting.popleft()
                process.due = time.monotonic() + self._deadline
                process.send({"id": process.job, "arguments": todo.items[process.job]})
        spare = len(todo.waiting) - sum(process.free for process in free)
        for slot in self._slots:
            if spare > 0 and slot.process is None and slot.deaths <= RESPAWNS:
                slot.process, spare = self._start(), spare - 1
        if all(slot.process is None for slot in self._slots):
            reason = f"had no worker left: the last one {todo.last_death}, {RESPAWNS + 1} times in a row"
            todo.results |= dict.fromkeys(todo.waiting, Failed(reason))
            todo.waiting.clear()

    def _start(self) -> WorkerProcess:
        if not self._folders:
            self._folders.append(tempfile.mkdtemp(prefix="rlx-workers-"))
        hello = {
            **self._check,
            "path": [place for place in sys.path if os.path.isabs(place)],
            "memory": self._memory,
            "warm_up": self._warm_up,
            "alarm": self._deadline + ORPHANED,
        }
        return WorkerProcess(hello, self._folders[0], START)

    def _wait(self) -> None:
        """Until something arrives, or a moment has passed."""
        poll = select.poll()
        for slot in self._slots:
            if slot.process is not None:
                for descriptor, writing in slot.process.waits_for().items():
                    poll.register(descriptor, select.POLLOUT if writing else select.POLLIN)
        poll.poll(NAP * 1000)

    def _attend(self, slot: _Slot, todo: _Round) -> None:
        """See what became of one worker."""
        process = slot.process
        if process is None:
            return
        if process.dying:
            if process.reap():
                slot.process = None
            return
        ended = process.ended()
        try:
            for message in process.pump(ended=ended):
                self._take(slot, process, message, todo)
        except ProtocolError as error:
            if not process.ready:
                slot.deaths, todo.last_death = slot.deaths + 1, f"sent {error}"
            todo.settle(process, Failed(f"got no answer from its worker but {error}"))
            process.terminate()
            return
        if ended:
            self._bury(slot, process, todo)
        elif process.due is not None and time.monotonic() > process.due:
            if not process.ready:
                slot.deaths, todo.last_death = slot.deaths + 1, f"did not start within {START:g} s"
            todo.settle(process, Failed(f"took longer than {self._deadline:g} s"))
            process.terminate()

    def _take(self, slot: _Slot, process: WorkerProcess, message: dict[str, Any], todo: _Round) -> None:
        """One message of a worker."""
        if process.job is None and not process.ready and message == {"ready": True}:
            process.ready, process.due = True, None
        elif not process.ready and "failed" in message:
            raise PluginError(
                "the worker processes cannot load the check of a reward",
                code="E-PLUGIN-WORKER",
                where=safe_text(f"{self._check['module'] or self._check['file']}:{self._check['name']}"),
                got=safe_text(message["failed"]),
                hint="a worker imports the module or file itself, in a process of its own",
            )
        elif process.job is not None and message.get("id") == process.job and "value" in message:
            slot.deaths = 0
            todo.settle(process, message["value"])
        elif process.job is not None and message.get("id") == process.job and "error" in message:
            slot.deaths = 0
            todo.settle(process, Failed(f"raised {message['error']}"))
        else:
            raise ProtocolError(f"a message out of turn: {str(message)[:80]}")

    def _bury(self, slot: _Slot, process: WorkerProcess, todo: _Round) -> None:
        """A worker died by itself: its item gets another one, once."""
        process.kill()  # what it started may still run
        slot.process = None
        slot.deaths += 1
        todo.last_death = how = process.how()
        if process.job is not None:
            lost = todo.losses[process.job] = todo.losses.get(process.job, 0) + 1
            if lost < TRIES:
                todo.waiting.append(process.job)
            else:
                todo.settle(process, Failed(f"lost {TRIES} workers; the last one {how}"))

    def _end(self) -> None:
        _discard(self._slots, self._folders, os.getpid())

    def _forget(self) -> None:
        """In a process that was forked off: the workers are the parent's."""
        self._finalizer.detach()
        for slot in self._slots:
            if slot.process is not None:
                slot.process.forget()
        self._new()

    def _new(self) -> None:
        self._slots = [_Slot() for _ in range(self._count)]
        self._folders: list[str] = []
        self._lock, self._closing = threading.Lock(), False
        self._finalizer = weakref.finalize(self, _discard, self._slots, self._folders, os.getpid())


def _discard(slots: list[_Slot], folders: list[str], owner: int) -> None:
    """End the workers and remove their folder, in the process that they belong to."""
    if os.getpid() != owner:
        return
    for slot in slots:
        process, slot.process = slot.process, None
        if process is not None:
            process.kill()
    while folders:
        shutil.rmtree(folders.pop(), ignore_errors=True)


def _found(check: Callable[..., Any] | str) -> dict[str, str]:
    """Where a worker finds a check: ``module``, ``file`` and ``name``.

    Raises:
        ConfigError: another process cannot find it.
    """
    if isinstance(check, str):
        where, _, name = check.rpartition(":")
        file = str(Path(where).resolve()) if where.endswith(".py") else ""
        return {"module": "" if file else where, "file": file, "name": name}
    name = getattr(check, "__qualname__", "<no function>")
    if "<" in name:
        raise ConfigError(
            "a check for worker processes must be a function at the top level of a module or file",
            code="E-CONFIG-WORKERS",
            got=safe_text(name),
            hint="move it out of the function or lambda, and give it what it needs as arguments",
        )
    module = sys.modules[check.__module__]
    return {"module": module.__name__, "file": getattr(module, "__file__", None) or "", "name": name}


_POOLS: weakref.WeakSet[Workers] = weakref.WeakSet()


def _after_fork() -> None:
    for pool in list(_POOLS):
        pool._forget()


os.register_at_fork(after_in_child=_after_fork)
