"""What is kept of a mini-batch whose loss or gradient was not finite, so that it can be looked at."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rlx.core.batch import Batch, Prompts, Sequences
from rlx.core.errors import RlxError
from rlx.core.state import save_state

if TYPE_CHECKING:
    from rlx.core.loop import Run


def keep_batch(run: Run, batch: Batch, error: RlxError) -> None:
    """Write the rows of this process's mini-batch under ``debug/`` of the run folder; the error says where.

    ``rlx.core.state.load_state`` reads the folder: tensors of every sequence and token, texts, numbers of
    data rows. A disk that refuses is a note too: it must not hide what happened.

    Args:
        run: any.
        batch: the mini-batch.
        error: gets a note.
    """
    name = f"nonfinite-step{run.global_step + 1}-process{run.accelerator.process_index}"
    folder = run.path / "debug" / name
    try:
        _write(folder, run, batch, error)
    except (OSError, RlxError) as failure:
        error.add_note(f"the mini-batch could not be written to {folder}: {type(failure).__name__}")
    else:
        error.add_note(f"the mini-batch is in {folder}")


def _write(folder: Path, run: Run, batch: Batch, error: RlxError) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():  # of the same step, before a resume
        old.unlink()
    save_state(
        folder,
        {
            "error": [error.what, error.got],
            "step": run.global_step + 1,
            "optimizer_step": run.updater.done + 1,
            "algorithm": str(run.settings.algo),
            "batch": _kept(batch),
        },
    )


def _kept(part: Any) -> dict[str, Any]:
    """Tensors, texts and row numbers of a batch or of a part of it."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if isinstance(value, Tensor):
            found[field.name] = value.detach().cpu().contiguous()
        elif isinstance(value, Sequences | Prompts):
            found[field.name] = _kept(value)
        elif field.name in ("texts", "ids", "rows") and value is not None:
            found[field.name] = list(value)
        elif field.name == "rewards" and value is not None:
            found[field.name] = {name: scores.detach().cpu() for name, scores in value.items()}
    return found
