"""manifest.json of a run folder: what ran, on what, with which versions and hardware, and how it ended.

Written when a run starts and completed when it ends; a resumed run keeps what the earlier parts wrote.
Secrets on the command line are left out.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlx.core.folder import MANIFEST, RunFolder, read_manifest
from rlx.core.text import REDACTED, is_secret, redact, safe_text
from rlx.plugins.registry import registry

SCHEMA = 1
PACKAGES = ("rlx", "torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "safetensors")
PART = (
    "command",
    "started",
    "status",
    "seconds",
    "exit",
)  # what is kept of each earlier part of a resumed run


def begin(folder: RunFolder, *, seed: int, data: str, device: str, processes: int = 1) -> None:
    """Write the manifest of a run that is about to start, or to go on.

    Args:
        folder: the run folder.
        seed: of every random stream.
        data: fingerprint of the training data.
        device: where the model lives, for example ``cpu`` or ``cuda:0``.
        processes: how many train together.

    Raises:
        SaveError: it could not be written.
    """
    old = read_manifest(folder.path)
    earlier = list(old.get("earlier", []))
    if old.get("kind") == "rlx run":
        earlier.append({name: old[name] for name in PART if name in old})
    manifest = {
        "kind": "rlx run",
        "schema": SCHEMA,
        "command": command_line(sys.argv),
        "cwd": os.getcwd(),
        "git": git_commit(Path.cwd()),
        "started": _now(),
        "status": "running",
        "seed": seed,
        "data": data,
        "versions": versions(),
        "plugins": plugins(),
        "hardware": hardware(device) | {"processes": processes},
        "files": old.get("files", []),
        "earlier": earlier,
    }
    folder.write_json(MANIFEST, manifest)


def finish(folder: RunFolder, status: str, *, seconds: float, exit_code: int, stopped: str = "") -> None:
    """Say in the manifest how the run ended.

    Args:
        folder: the run folder.
        status: ``finished``, ``interrupted`` or ``failed``.
        seconds: how long this part of the run took.
        exit_code: of the command line; 0 for success.
        stopped: why a callback ended the run before its last step, if one did.

    Raises:
        SaveError: it could not be written.
    """
    ending = {"status": status, "ended": _now(), "seconds": round(seconds, 3), "exit": exit_code}
    ending |= {"stopped": stopped} if stopped else {}
    folder.write_json(MANIFEST, {**read_manifest(folder.path), **ending})


def command_line(words: Sequence[str]) -> str:
    """A command line as a shell takes it, secrets replaced."""
    program = {"rlx": ["rlx"], "__main__.py": ["python", "-m", "rlx"]}
    shown, hide = program.get(Path(words[0]).name, [words[0]]), False
    for word in words[1:]:
        flag, sign, _ = word.partition("=")
        secret = flag.startswith("--") and is_secret(flag.lstrip("-").replace("-", "_"))
        shown.append(REDACTED if hide else f"{flag}={REDACTED}" if secret and sign else redact(word))
        hide = secret and not sign
    return shlex.join(shown)


def plugins() -> list[dict[str, str]]:
    """The plugins that are loaded, with what they come from."""
    return [
        {"name": plugin.name, "distribution": plugin.distribution, "version": plugin.version}
        for plugin in registry().plugins()
    ]


def changed_plugins(old: Iterable[Mapping[str, str]]) -> list[str]:
    """What became of plugins that were there: gone, or of another version; a sentence each.

    Args:
        old: what ``plugins`` gave.
    """
    now = {plugin["name"]: plugin["version"] for plugin in plugins()}
    told = []
    for plugin in old:
        name, version = plugin["name"], plugin["version"]
        shown = safe_text(f"plugin {name} of {plugin['distribution']}", 120)
        if name not in now:
            told.append(f"{shown} {safe_text(version, 40)} was there, and is no longer")
        elif now[name] != version:
            told.append(f"{shown}: {safe_text(version, 40)} → {now[name]}")
    return told


def versions() -> dict[str, str]:
    """Python and the packages that decide what a run computes; one that is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware(device: str) -> dict[str, Any]:
    """Processor, memory and accelerator; sizes in bytes."""
    import torch

    out: dict[str, Any] = {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": device,
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        out |= {"device_name": properties.name, "device_memory": properties.total_memory}
    return out


def git_commit(folder: Path) -> str | None:
    """The commit that a folder is at, with ``+changes`` if files differ; None outside a repository."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(folder, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *words: str) -> str:
    result = subprocess.run(
        ["git", *words], cwd=folder, capture_output=True, text=True, timeout=3, check=True
    )
    return result.stdout.strip()


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
