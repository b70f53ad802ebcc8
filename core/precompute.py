"""Reference log-probs taken once for a whole data set, and kept on disk under what they depend on.

With them no batch needs a forward of the reference, and its weights need not stay in memory. Only for data
whose sequences never change from batch to batch: preference pairs.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlx.core.batch import flat_index
from rlx.core.errors import ConfigError
from rlx.core.meter import total
from rlx.core.order import share
from rlx.core.text import safe_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from accelerate import Accelerator
    from torch import Tensor

    from rlx.core.batch import Sequences
    from rlx.core.rollout import Studio
    from rlx.plugins.contract import Algorithm

ROWS = 256  # rows of one pass over the data


class WithReference:
    """Data whose batches come with their reference log-probs.

    Args:
        data: preference data; ``batch(rows, mine)`` gives batches whose rows follow one another.
        logps: (S,) float32, reference log-probs of all scored tokens, row after row.
        counts: (R,) int64, scored tokens of each row.
    """

    def __init__(self, data: Any, logps: Tensor, counts: Tensor) -> None:
        self.data, self.logps, self.counts = data, logps, counts
        self.fingerprint: str = data.fingerprint
        self.report: list[str] = data.report

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, rows: Sequence[int], mine: Sequence[int] | None = None) -> Any:
        """As the data's own, with ``reference`` filled in."""
        places = range(len(rows)) if mine is None else mine
        taken = torch.tensor([rows[place] for place in places], dtype=torch.long)
        reference = self.logps[flat_index(self.counts, taken)]
        return replace(self.data.batch(rows, mine), reference=reference)


def precompute_all(
    data: Any, eval_data: Any, studio: Studio, algorithm: Algorithm, say: Callable[[str], None]
) -> tuple[Any, Any]:
    """Training and evaluation data with their reference log-probs; the reference itself is let go.

    Args:
        data: of the training.
        eval_data: of the evaluation, or None.
        studio: measures; it has no reference afterwards.
        algorithm: what is trained.
        say: gets a line for each data set.

    Raises:
        ConfigError: the algorithm has no use for them, or its sequences change from batch to batch.
    """
    reference = studio.reference
    if reference is None or algorithm.eats != "pairs":
        raise ConfigError(
            "precompute_ref_log_probs is for preference pairs and a reference",
            code="E-CONFIG-CONFLICT",
            got=f"{algorithm.eats}, {'no' if reference is None else 'a'} reference",
            hint="leave precompute_ref_log_probs out",
        )
    fingerprint = reference.fingerprint()
    both = [
        None
        if part is None
        else precompute(
            part, lambda s: studio.score(s, "reference").logps, fingerprint, studio.accelerator, say
        )
        for part in (data, eval_data)
    ]
    studio.reference = None
    return both[0], both[1]


def precompute(
    data: Any,
    measure: Callable[[Sequences], Tensor],
    fingerprint: str,
    accelerator: Accelerator,
    say: Callable[[str], None],
) -> WithReference:
    """Reference log-probs of a data set, from the cache where it was seen before.

    What is found counts only if every process finds it: machines may have caches of their own.

    Args:
        data: preference data; ``batch(rows)`` gives batches whose rows follow one another.
        measure: sequences → (S,) log-probs under the reference, without gradient.
        fingerprint: of the reference, its weights and how it computes with them.
        accelerator: the rows are shared out among its processes.
        say: gets a line that says what was done.
    """
    # Autocast and the kind of device decide how log-probs are rounded.
    numerics = f"{accelerator.mixed_precision} {accelerator.device.type}"
    key = hashlib.sha256(f"2 {fingerprint} {numerics} {data.fingerprint}".encode()).hexdigest()
    file = cache_folder() / f"{key}.safetensors"
    found = _read(file) if file.is_file() else None
    lacking = torch.tensor(float(found is None or len(found["counts"]) != len(data)))
    lacking = total(accelerator, lacking.to(accelerator.device))
    if found is not None and not lacking:
        say(f"reference log-probs of {len(data)} rows: from {file}")
        return WithReference(data, **found)
    parts, counts = [], []
    for first in range(0, len(data), ROWS):
        rows = list(range(first, min(first + ROWS, len(data))))
        batch = data.batch(rows)
        counts.append(batch.sequences.counts.view(len(rows), -1).sum(1))
        mine = torch.tensor(list(share(len(rows), accelerator.process_index, accelerator.num_processes)))
        own = measure(batch.take(mine).sequences).cpu() if len(mine) else torch.zeros(0)
        parts.append(_joined(own, counts[-1], mine, accelerator))
    from safetensors import SafetensorError

    found = {"logps": torch.cat(parts), "counts": torch.cat(counts)}
    kept = f"kept in {file}"
    if accelerator.is_local_main_process:
        try:
            _write(file, found)
        except (OSError, SafetensorError) as error:  # they are only to save time; the second: a full disk
            kept = f"not kept: {safe_text(error, 200)}"
    say(f"reference log-probs of {len(data)} rows: taken once, {kept}")
    return WithReference(data, **found)


def cache_folder() -> Path:
    """Where they are kept: ``$RLX_CACHE``, or ``rlx`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("RLX_CACHE") or Path(base) / "rlx") / "reference"


def _joined(own: Tensor, counts: Tensor, mine: Tensor, accelerator: Accelerator) -> Tensor:
    """One pass over rows, put together from what each process measured."""
    if accelerator.num_processes == 1:
        return own
    whole = torch.zeros(int(counts.sum()))
    whole[flat_index(counts, mine)] = own
    joined: Tensor = accelerator.reduce(whole.to(accelerator.device), reduction="sum")
    return joined.cpu()


def _read(file: Path) -> dict[str, Tensor] | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
        return {name: tensors[name] for name in ("logps", "counts")}
    except (SafetensorError, OSError, KeyError):
        return None  # a torn or foreign file is written anew


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside)
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)
