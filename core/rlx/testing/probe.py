"""Load a reference in a process of its own, so that an import that hangs, exits or crashes is only told.

``python -m rlx.testing.probe SECONDS REF [KIND]`` prints what went wrong as one line of JSON; a hang ends
with the place where it hangs on stderr.
"""

from __future__ import annotations

import faulthandler
import json
import os
import subprocess
import sys
import traceback

from rlx.core.errors import ConfigError, PluginError, RlxError
from rlx.core.text import safe_text
from rlx.plugins import loading
from rlx.plugins.kinds import kind_of
from rlx.plugins.references import spelt_out
from rlx.plugins.registry import registry

FIELDS = ("what", "code", "where", "got", "expected", "hint")
SECONDS = 30.0


def load_elsewhere(ref: str, kind: str | None, seconds: float) -> tuple[RlxError | None, str]:
    """Whether a reference loads, found out in another process.

    Args:
        ref: a registered name or a reference to code.
        kind: of the component, None where it is not known.
        seconds: after which loading it is given up.

    Returns:
        What is wrong, None for nothing; and the traceback of what the plugin raised, empty without one.
    """
    words = [sys.executable, "-m", "rlx.testing.probe", str(seconds), ref, *([kind] if kind else [])]
    path = os.pathsep.join(filter(None, sys.path))
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            timeout=seconds + 10,  # the process gives up first, and says where it was
        )
    except subprocess.TimeoutExpired:
        return _endless(ref, seconds), ""
    told = next((line for line in reversed(done.stdout.splitlines()) if line.startswith('{"probe"')), None)
    if told is None:
        if "Timeout (" in done.stderr:
            return _endless(ref, seconds), done.stderr[done.stderr.index("Timeout (") :]
        error = PluginError(
            f"importing {ref!r} ended the interpreter",
            code="E-PLUGIN-IMPORT",
            got=f"exit status {done.returncode}",
            expected="a module that defines things and does nothing else",
        )
        return error, done.stderr
    found = json.loads(told)
    if found["probe"] == "ok":
        return None, ""
    made: RlxError = (ConfigError if found["exit_code"] == ConfigError.exit_code else PluginError)(
        **{name: found[name] for name in FIELDS}
    )
    for note in found["notes"]:
        made.add_note(note)
    return made, found["traceback"]


def _endless(ref: str, seconds: float) -> PluginError:
    return PluginError(
        f"importing {ref!r} takes longer than {seconds:g} s",
        code="E-PLUGIN-IMPORT",
        expected="a module that defines things and does nothing else",
        hint="move the work into the function that needs it, or allow more: --timeout SECONDS",
    )


def main(seconds: float, ref: str, kind: str | None = None) -> None:
    """Load a reference, and print how that ended.

    Args:
        seconds: after which the process ends and says where it was.
        ref: a registered name or a reference to code.
        kind: of the component.
    """
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        ref, _ = spelt_out(kind or "reward", ref)
        if ":" in ref:
            loading.load(ref)
        elif ref in registry().broken:
            raise registry().failure(ref)
        else:
            target = registry().find(kind or kind_of(ref), ref).target
            if isinstance(target, str):
                loading.load(target)
    except RlxError as error:
        fields = {name: getattr(error, name) for name in FIELDS}
        shown = _frames(error)
        notes = getattr(error, "__notes__", [])
        told = {"probe": "failed", **fields, "exit_code": error.exit_code, "notes": notes, "traceback": shown}
    else:
        told = {"probe": "ok"}
    print("\n" + json.dumps(told), flush=True)
    os._exit(0)  # threads that importing it started must not hold the process


def _frames(error: RlxError) -> str:
    """The traceback of what a plugin raised, without the frames of what imported it."""
    cause = error.__cause__
    if cause is None:
        return ""
    told = traceback.TracebackException.from_exception(cause)
    own = [frame for frame in told.stack if not frame.filename.startswith("<frozen")]
    own = [frame for frame in own if not frame.filename.startswith(loading.OURS)]
    if not own and not isinstance(cause, SyntaxError):  # nothing but the way to a module that is not there
        return ""
    told.stack = traceback.StackSummary.from_list(own)
    return safe_text("".join(told.format(chain=False)), 20_000, keep_newlines=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), *sys.argv[2:4])
