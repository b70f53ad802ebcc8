"""What runs inside a worker process, started by file: ``python -I worker_main.py``. Standard library only.

Messages come on standard input and go out on standard output, each a length of four bytes and then JSON. What
the check itself prints goes to standard error, so that it cannot be taken for an answer.

The first message says what to load: ``{"module", "file", "name", "path", "memory", "warm_up", "alarm"}``,
answered by ``{"ready": true}`` or ``{"failed": why}``. Each further one is ``{"id", "arguments"}``, answered
by ``{"id", "value"}`` or ``{"id", "error"}``. The end of the input ends the process.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable
from typing import IO, Any

LENGTH = struct.Struct(">I")


def main() -> None:
    """Answer messages until there are no more."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    hello = receive(requests)
    if hello is None:
        return
    try:
        limit_memory(hello["memory"])
        sys.path += [place for place in hello["path"] if place not in sys.path]
        check = load(hello["module"], hello["file"], hello["name"])
        if hello["warm_up"] is not None:
            check(*hello["warm_up"])
    except BaseException as error:
        send(replies, {"failed": told(error)})
        return
    send(replies, {"ready": True})
    while (message := receive(requests)) is not None:
        # Nobody kills a process whose parent is gone: it then ends itself, in whatever code it hangs.
        signal.setitimer(signal.ITIMER_REAL, hello["alarm"])
        answer(replies, message["id"], check, message["arguments"])
        signal.setitimer(signal.ITIMER_REAL, 0)


def answer(replies: IO[bytes], number: int, check: Callable[..., Any], arguments: list[Any]) -> None:
    """Call the check and send what it returned or raised, SystemExit included."""
    try:
        reply = json.dumps({"id": number, "value": check(*arguments)}, allow_nan=False)
    except BaseException as error:
        reply = json.dumps({"id": number, "error": told(error)})
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    write(replies, reply)


def told(error: BaseException) -> str:
    """An exception in a line."""
    return f"{type(error).__name__}: {str(error)[:300]}"


def limit_memory(size: int) -> None:
    """Let this process have so many bytes of address space, and leave no core dump; Linux only."""
    if sys.platform == "linux":
        most = resource.getrlimit(resource.RLIMIT_AS)[1]
        size = size if most == resource.RLIM_INFINITY else min(size, most)
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def load(module: str, file: str, name: str) -> Callable[..., Any]:
    """A function of a module; or of its file where the name leads elsewhere, as that of a script does.

    Args:
        module: how the parent calls it, or empty.
        file: where the parent has it from, or empty.
        name: the function, dotted where it stands in a class.
    """
    spec = importlib.util.find_spec(module) if module and module != "__main__" else None
    if file and (spec is None or spec.origin != file):
        spec = importlib.util.spec_from_file_location("_rlx_worker_target", file)
        assert spec is not None and spec.loader is not None  # a .py suffix always has a loader
        found: Any = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = found
        spec.loader.exec_module(found)
    else:
        found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    check: Callable[..., Any] = found
    return check


def receive(requests: IO[bytes]) -> Any:
    """The next message, or None at the end."""
    head = requests.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    return json.loads(requests.read(LENGTH.unpack(head)[0]))


def send(replies: IO[bytes], message: dict[str, Any]) -> None:
    """Send a message."""
    write(replies, json.dumps(message))


def write(replies: IO[bytes], text: str) -> None:
    """Send a text that is a message."""
    data = text.encode()
    replies.write(LENGTH.pack(len(data)) + data)
    replies.flush()


if __name__ == "__main__":
    main()
