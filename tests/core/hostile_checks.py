"""What worker processes are given to do in test_workers.py. Loaded there by file, so it imports little."""

import ctypes
import os
import pickle
import signal
import subprocess
import sys
import time


def echo(value):
    return value


def where(*_ignored):
    return {
        "pid": os.getpid(),
        "session": os.getsid(0),
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "stdin": sys.stdin.read(),
    }


def act(deed, *rest):
    """One deed by name; anything else is given back."""
    return DEEDS[deed](*rest) if deed in DEEDS else deed


def spin():
    while True:
        pass


def spin_in_c():
    """A hang without the interpreter: SIGTERM is blocked, and nothing ever looks at it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP})
    ctypes.CDLL(None).sleep(3600)


def leave_a_child(mark):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    with open(mark, "w") as file:
        file.write(str(child.pid))
    spin()


def once(mark):
    """Dies the first time, answers the second."""
    if not os.path.exists(mark):
        open(mark, "w").close()
        os._exit(3)
    return "second"


def wait_for(mark):
    while not os.path.exists(mark):
        time.sleep(0.005)
    return "there"


def make(mark):
    open(mark, "w").close()
    return "made"


def flood():
    for _ in range(1600):
        os.write(1, b"o" * 65536)  # 100 MiB
    sys.stdout.write("hf_abcdefghijklmnop secret=hunter2 the end")
    return "flooded"


def flood_and_die():
    flood()
    sys.stdout.flush()
    os._exit(4)


def send(data):
    """Bytes on the pipe that answers go through: the copy of standard output that the worker made first."""
    for descriptor in range(3, 10):
        try:
            if os.readlink(f"/proc/self/fd/{descriptor}").startswith("pipe:"):
                os.write(descriptor, data)
        except OSError:
            continue
    time.sleep(3600)


class _Payload:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (self.mark, "w")


def send_pickle(mark):
    data = pickle.dumps(_Payload(mark))
    send(len(data).to_bytes(4, "big") + data)


def nest():
    value = []
    for _ in range(100_000):
        value = [value]
    return value


DEEDS = {
    "spin": spin,
    "spin in C": spin_in_c,
    "leave a child": leave_a_child,
    "segfault": lambda: ctypes.string_at(0),
    "exit": lambda: os._exit(0),
    "sys.exit": lambda: sys.exit(0),
    "raise": lambda: 1 / 0,
    "memory": lambda: len(b"x" * (8 << 30)),
    "once": once,
    "wait for": wait_for,
    "make": make,
    "flood": flood,
    "flood and die": flood_and_die,
    "pickle": send_pickle,
    "huge": lambda: send(b"\xff\xff\xff\xff"),
    "other id": lambda: send(b'\0\0\0\x15{"id": 99,"value": 1}'),
    "NaN literal": lambda: send(b"\0\0\0\x03NaN"),
    "deep": lambda: send((200_000).to_bytes(4, "big") + b"[" * 200_000),
    "nest": nest,
    "nan": lambda: float("nan"),
    "no JSON": lambda: {1, 2},
}


def slow_at_first(value, calls=[]):  # noqa: B006 - it remembers on purpose
    calls.append(value)
    if len(calls) == 1:
        time.sleep(1.0)
    return calls
