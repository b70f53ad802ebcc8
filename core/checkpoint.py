"""Checkpoints that survive a crash at any moment: written aside, sealed by a manifest, renamed into place.

The protocol of a save: a temporary folder on the same file system; every file hashed and flushed to the disk;
the manifest, with size and sha256 of each, last; rename; flush the parent. Only then does the save count, and
only then are older checkpoints deleted. A reader trusts nothing but a manifest whose files all verify, and
executes no code. What this does not promise: a disk that lies about flushing may lose data when power fails.

Standard library only; tensors are ``rlx.core.state``'s business.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from rlx.core.errors import CheckpointError, SaveError
from rlx.core.state import load_state, save_state
from rlx.core.text import safe_text

__all__ = [
    "clean",
    "is_ours",
    "latest",
    "load_state",
    "newest",
    "read_manifest",
    "save_state",
    "sync_tree",
    "verify",
    "write",
]

SCHEMA = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 16 << 20
_NAME = re.compile(r"checkpoint-(\d{1,18})")
_OWN_LEFTOVER = re.compile(r"\.(tmp|trash)-checkpoint-\d{1,18}-\d+")
logger = logging.getLogger(__name__)


def write(
    root: Path,
    step: int,
    fill: Callable[[Path], None],
    *,
    identity: Mapping[str, Any],
    keep: int | None,
    protected: Collection[int] = (),
) -> Path:
    """Save a checkpoint; when this returns, it is on the disk and verifies.

    Args:
        root: the run folder; created if missing.
        step: optimizer batches done; the checkpoint is ``root/checkpoint-<step>``.
        fill: writes the files, in subfolders too, into the folder it is given.
        identity: what a resume compares (fingerprints, versions, …), JSON values; kept in the manifest.
        keep: how many checkpoints stay, this one included; None for all.
        protected: steps whose checkpoints stay in any case; they count.

    Returns:
        The new folder.

    Raises:
        SaveError: it could not be written, or a valid checkpoint of this step exists. Older ones are
            untouched.
    """
    final = root / f"checkpoint-{step}"
    temporary = root / f".tmp-checkpoint-{step}-{os.getpid()}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _make_way(final)
        _remove(temporary)
        os.mkdir(temporary)
        fill(temporary)
        _seal(temporary, step, identity)
        os.rename(temporary, final)
        _sync_folder(root)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # safetensors has an exception of its own for a full disk; what else fill raises stays as it is.
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise _save_error(root, step, error) from error
        raise
    if keep is not None:
        _retain(root, final, keep, protected)
    return final


def verify(folder: Path) -> str | None:
    """Why a checkpoint is unusable, or None when its manifest and every file in it verify."""
    try:
        files = read_manifest(folder)["files"]
        for name, expected in files.items():
            reason = _verify_file(folder, name, expected)
            if reason:
                return f"{safe_text(name)}: {reason}"
    except ValueError as error:
        return f"{MANIFEST}: {error}"
    return None


def newest(root: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The checkpoint with the highest step that verifies.

    Returns:
        It, or None without any; and the newer ones that were passed over, each with the reason.
    """
    found, broken = _steps(root)
    for _, folder in reversed(found):
        reason = verify(folder)
        if reason is None:
            return folder, broken
        broken.append((folder, reason))
    return None, broken


def latest(root: Path, *, strict: bool = False) -> tuple[Path, list[tuple[Path, str]]]:
    """Like ``newest``, for a resume that must not start from scratch unnoticed.

    Args:
        root: the run folder.
        strict: refuse to pass over a broken checkpoint.

    Raises:
        CheckpointError: no checkpoint verifies; or one is broken and strict is set.
    """
    folder, broken = newest(root)
    if folder is None or (strict and broken):
        reasons = [f"{path.name}: {reason}" for path, reason in broken]
        shown = "; ".join(reasons[:5]) + (f"; and {len(reasons) - 5} more" if len(reasons) > 5 else "")
        raise CheckpointError(
            "a checkpoint is broken" if folder else "no checkpoint can be used",
            code="E-CHECKPOINT-BROKEN",
            where=str(root),
            got=shown or "no checkpoint-* folder",
            hint=f"drop --strict-resume to go on from {folder.name}" if folder else "start a new run",
        )
    return folder, broken


def clean(root: Path) -> None:
    """Delete what an interrupted save or deletion left behind; only while holding the run folder's lock."""
    for entry in sorted(root.iterdir()) if root.is_dir() else ():
        if _OWN_LEFTOVER.fullmatch(entry.name):
            _remove(entry)


def is_ours(folder: Path) -> bool:
    """True for a checkpoint folder, whole or broken, that has a manifest."""
    known = _NAME.fullmatch(folder.name.partition(".broken-")[0])
    return bool(known) and not folder.is_symlink() and (folder / MANIFEST).is_file()


def sync_tree(folder: Path) -> dict[str, dict[str, Any]]:
    """Flush every file below a folder, and the folders, to the disk.

    Files get the folder's permissions to read and write: safetensors gives its files to the owner alone.

    Returns:
        Each file's name, relative to the folder, with its ``size`` and ``sha256``.

    Raises:
        SaveError: there is a link or a special file.
        OSError: the disk refuses.
    """
    files, folders, mode = {}, [folder], folder.stat().st_mode & 0o666
    for path in sorted(_walk(folder)):
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            got = "a link or special file"
            raise SaveError("a checkpoint holds plain files only", where=str(path), got=got)
        if path.is_dir():
            folders.append(path)
            continue
        with open(path, "rb") as file:
            os.fchmod(file.fileno(), mode)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
        files[path.relative_to(folder).as_posix()] = {"size": size, "sha256": digest}
    for path in reversed(folders):
        _sync_folder(path)
    return files


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint: ``schema``, ``step``, ``files``, ``identity``, ``durability``.

    Raises:
        ValueError: it is missing, garbled, altered, or of a newer schema.
    """
    path = folder / MANIFEST
    try:
        info = path.lstat()
        if not stat.S_ISREG(info.st_mode) or info.st_size > MAX_MANIFEST_BYTES:
            raise ValueError(f"no regular file, or larger than {MAX_MANIFEST_BYTES >> 20} MiB")
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError("missing; no complete checkpoint") from None
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    except RecursionError:
        raise ValueError("nested too deep") from None
    except ValueError as error:
        raise ValueError(f"garbled: {safe_text(error, 120)}") from None
    if not isinstance(manifest, dict) or type(manifest.get("schema")) is not int:
        raise ValueError("garbled: no object with a schema number")
    if manifest["schema"] != SCHEMA:
        raise ValueError(f"schema {manifest['schema']}, this rlx reads {SCHEMA}; upgrade rlx to read it")
    seal = manifest.pop("sha256", None)
    if seal != _seal_of(manifest):
        raise ValueError("altered: its own sha256 does not fit")
    if type(manifest.get("step")) is not int or not isinstance(manifest.get("files"), dict):
        raise ValueError("garbled: step or files missing")
    return manifest


def _seal(folder: Path, step: int, identity: Mapping[str, Any]) -> None:
    """Hash and flush every file below folder, then write and flush the manifest and the folder itself."""
    files = sync_tree(folder)
    manifest = {
        "schema": SCHEMA,
        "step": step,
        "files": files,
        "identity": dict(identity),
        "durability": "full" if _sync_folder(folder) else "no folder fsync",
    }
    manifest["sha256"] = _seal_of(manifest)
    with open(folder / MANIFEST, "x", encoding="utf-8") as file:
        file.write(json.dumps(manifest, indent=1))
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(folder)


def _walk(folder: Path) -> Iterator[Path]:
    for entry in folder.iterdir():
        yield entry
        if entry.is_dir() and not entry.is_symlink():
            yield from _walk(entry)


def _seal_of(manifest: Mapping[str, Any]) -> str:
    """sha256 of the manifest's values, as they are after a way through JSON."""
    values = json.loads(json.dumps(manifest))
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _sync_folder(folder: Path) -> bool:
    """Flush a folder's entries to the disk; False where the file system has no such thing."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOTSUP):
            return False
        raise
    finally:
        os.close(descriptor)
    return True


def _verify_file(folder: Path, name: str, expected: Any) -> str | None:
    parts = PurePosixPath(name).parts
    outside = not parts or name.startswith("/") or ".." in parts or "\0" in name or "\\" in name
    if outside or parts == (MANIFEST,):
        return "not a name inside the checkpoint"
    path = folder.joinpath(*parts)
    if not isinstance(expected, dict) or set(expected) != {"size", "sha256"}:
        return "no size and sha256 in the manifest"
    if any(folder.joinpath(*parts[:depth]).is_symlink() for depth in range(1, len(parts) + 1)):
        return "a symbolic link"
    try:
        if not path.is_file():
            return "a special file" if path.exists() else "missing"
        size = path.stat().st_size
        if size != expected["size"]:
            return f"{size} bytes instead of {safe_text(expected['size'], 30)}"
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                return "sha256 differs: its content has changed"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def _steps(root: Path) -> tuple[list[tuple[int, Path]], list[tuple[Path, str]]]:
    """Checkpoints by the step in their manifest, and those without a readable one."""
    found, broken = [], []
    for entry in sorted(root.iterdir()) if root.is_dir() else ():
        if not _NAME.fullmatch(entry.name):
            continue
        if entry.is_symlink() or not entry.is_dir():
            broken.append((entry, "no folder, or a symbolic link"))
            continue
        try:
            found.append((read_manifest(entry)["step"], entry))
        except ValueError as error:
            broken.append((entry, f"{MANIFEST}: {error}"))
    return sorted(found), broken


def _make_way(final: Path) -> None:
    """Move a broken checkpoint of the same step aside; refuse to touch a valid one."""
    if not os.path.lexists(final):
        return
    if verify(final) is None:
        raise SaveError(
            "a valid checkpoint of this step exists; it is not overwritten",
            code="E-SAVE-EXISTS",
            where=str(final),
            hint=f"delete it, or resume from it: rlx resume {final.parent}",
        )
    number = 1
    while os.path.lexists(aside := final.with_name(f"{final.name}.broken-{number}")):
        number += 1
    os.rename(final, aside)


def _retain(root: Path, just_written: Path, keep: int, protected: Collection[int]) -> None:
    """Delete the oldest checkpoints beyond keep. A failure is only a warning: the new one is safe."""
    others = [(step, folder) for step, folder in _steps(root)[0] if folder != just_written]
    surplus = max(0, len(others) - max(keep, 1) + 1)
    for folder in [folder for step, folder in others if step not in protected][:surplus]:
        try:
            trash = root / f".trash-{folder.name}-{os.getpid()}"
            _remove(trash)
            os.rename(folder, trash)
            shutil.rmtree(trash)
        except OSError as error:
            logger.warning("an old checkpoint could not be deleted: %s: %s", folder, error.strerror)


def _remove(path: Path) -> None:
    """Delete a folder of ours, never through a link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)


def _save_error(root: Path, step: int, error: BaseException) -> SaveError:
    got = safe_text(error)
    try:
        got += f"; {shutil.disk_usage(root).free / 1e6:.1f} MB free"
        found, _ = _steps(root)
        if found:
            size = sum(entry["size"] for entry in read_manifest(found[-1][1])["files"].values())
            got += f", the last checkpoint took {size / 1e6:.1f} MB"
    except (OSError, ValueError):
        pass  # the message is only poorer
    return SaveError(
        f"the checkpoint of step {step} could not be written; earlier ones are untouched",
        code="E-SAVE-CHECKPOINT",
        where=str(root),
        got=got,
        hint="free some space or repair the folder; the next save tries again",
    )
