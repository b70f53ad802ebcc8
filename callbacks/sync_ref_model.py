"""Moves the reference after the policy every few steps (TR-DPO), on with ``sync_ref_model: true``.

Every ``ref_model_sync_steps`` steps: reference ← α · policy + (1 − α) · reference with α the
``ref_model_mixup_alpha``; 1 copies the policy. Unlike TRL, a policy that is an adapter is followed too, by a
copy of the adapter, and a step is a batch, however many optimizer steps it holds.

Source: arXiv:2404.09656. Run it: ``rlx run --algo dpo --sync-ref-model --ref-model-sync-steps 64``
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from rlx.core.errors import ConfigError
from rlx.plugins.contract import Callback
from rlx.plugins.hookspecs import hookimpl


class SyncRefModel(Callback):
    """Moves the reference when it is time; the reference's weights are in every checkpoint."""

    changes_training: ClassVar[bool] = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.last_sync_step = 0

    @hookimpl
    def on_run_start(self, run: Any) -> None:
        """Refuse to be there without the option, with which the reference is made one that can be moved."""
        if not run.settings.sync_ref_model:
            raise ConfigError(
                "the callback sync_ref_model acts with the option of the same name",
                code="E-CONFIG-CONFLICT",
                got="sync_ref_model: false",
                hint="--sync-ref-model in the place of --callback sync_ref_model",
            )

    @hookimpl
    def on_step_end(self, run: Any) -> None:
        """Move it, if a multiple of the steps was reached since the last time."""
        every = run.settings.ref_model_sync_steps
        # Not "every divides the step": a step whose end another callback broke is made up for.
        if run.global_step // every > self.last_sync_step // every:
            run.studio.reference.follow(run.settings.ref_model_mixup_alpha)
            self.last_sync_step = run.global_step

    def state_dict(self) -> dict[str, Any]:
        """The step of the last move."""
        return {"last_sync_step": self.last_sync_step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self.last_sync_step = state["last_sync_step"]
