"""README.md beside the final policy: what it is, how it was made, how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from rlx.core.card import model_card
from rlx.plugins.contract import Callback
from rlx.plugins.hookspecs import hookimpl


class ModelCard(Callback):
    """Writes the model card when the final policy is saved."""

    observer: ClassVar[bool] = True

    @hookimpl
    def on_save(self, run: Any, path: Path) -> None:
        """Write the card at the root of the run folder; checkpoints get none."""
        if run.is_main and path == run.folder.path:
            run.folder.write_text("README.md", model_card(run))
