"""``rlx doctor``: the machine, the versions and the plugins, for a report or a first look."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import typer

from rlx.core.text import safe_text

app = typer.Typer(add_completion=False, rich_markup_mode=None)

PACKAGES = (
    "torch transformers accelerate peft datasets pluggy safetensors tokenizers numpy typer rich"
    " matplotlib math-verify vllm"
)
GIB = 1 << 30


@app.command()
def doctor() -> None:
    """Versions, devices, memory, disk and plugins, for a report."""
    for name, value in report().items():
        print(f"{name:<14} {safe_text(value, 200)}")


def report() -> dict[str, str]:
    """Everything about this machine that explains how rlx behaves here, a line each; nothing private."""
    out = {"rlx": version("rlx"), "python": f"{platform.python_version()} ({sys.implementation.name})"}
    out["system"] = platform.platform()
    out |= {name: _version(name) for name in PACKAGES.split()}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    out["cpu cores"] = str(cores)
    out["memory"] = _memory()
    out["disk here"] = f"{shutil.disk_usage(Path.cwd()).free / GIB:.1f} GiB free"
    out |= _devices() | _plugins()
    return out


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _memory() -> str:
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        free = os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # not a POSIX system
        return "unknown"
    return f"{free * size / GIB:.1f} of {pages * size / GIB:.1f} GiB free"


def _devices() -> dict[str, str]:
    try:
        import torch
    except Exception as error:  # a broken installation is what the doctor is asked about
        return {"device": f"torch does not import: {type(error).__name__}: {error}"}
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return {"device": ", ".join(f"{gpu.name} ({gpu.total_memory / GIB:.0f} GiB)" for gpu in names)}
    return {"device": f"cpu, {torch.get_num_threads()} threads"}


def _plugins() -> dict[str, str]:
    from rlx.plugins.registry import registry

    found = registry()
    out = {"plugins": ", ".join(f"{plugin.name} {plugin.version}" for plugin in found.plugins())}
    out |= {f"broken: {name}": str(reason) for name, reason in found.broken.items()}
    if found.blocked:
        out["not loaded"] = ", ".join(plugin.name for plugin in found.blocked)
    return out
