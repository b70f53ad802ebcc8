"""rlx: a plugin-registry framework for reinforcement learning and preference optimisation of language models.

The public face. Every name is imported when it is first asked for, so that ``import rlx`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlx.core.batch import (
        Batch,
        Demonstrations,
        Labeled,
        Loss,
        Pairs,
        Prompts,
        Rollouts,
        Scores,
        Sequences,
    )
    from rlx.core.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        DivergedError,
        Interrupted,
        MemoryExhausted,
        PeerError,
        PluginError,
        RewardError,
        RlxError,
        SaveError,
    )
    from rlx.core.options import opt
    from rlx.core.run import prepare, reopen, resume, run
    from rlx.core.workers import Workers
    from rlx.plugins.contract import (
        Algorithm,
        Callback,
        Completions,
        Dataset,
        Failed,
        Generator,
        Judge,
        NoOptions,
        Reward,
        Rewarded,
        Sampling,
        Transform,
    )
    from rlx.plugins.hookspecs import hookimpl
    from rlx.plugins.references import resolve
    from rlx.plugins.registry import Registry, available, discover, get, register, registry
    from rlx.plugins.telling import Complete
    from rlx.plugins.transforms import BadRow

    __version__: str

_HOMES = {
    "rlx.core.batch": ("Batch Demonstrations Labeled Loss Pairs Prompts Rollouts Scores Sequences"),
    "rlx.core.errors": (
        "CheckpointError ConfigError DataError DivergedError Interrupted MemoryExhausted PeerError"
        " PluginError RewardError RlxError SaveError"
    ),
    "rlx.core.options": "opt",
    "rlx.core.run": "prepare reopen resume run",
    "rlx.core.workers": "Workers",
    "rlx.plugins.contract": (
        "Algorithm Callback Completions Dataset Failed Generator Judge NoOptions Reward Rewarded"
        " Sampling Transform"
    ),
    "rlx.plugins.hookspecs": "hookimpl",
    "rlx.plugins.references": "resolve",
    "rlx.plugins.registry": "Registry available discover get register registry",
    "rlx.plugins.telling": "Complete",
    "rlx.plugins.transforms": "BadRow",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = [
    "Algorithm",
    "BadRow",
    "Batch",
    "Callback",
    "CheckpointError",
    "Complete",
    "Completions",
    "ConfigError",
    "DataError",
    "Dataset",
    "Demonstrations",
    "DivergedError",
    "Failed",
    "Generator",
    "Interrupted",
    "Judge",
    "Labeled",
    "Loss",
    "MemoryExhausted",
    "NoOptions",
    "Pairs",
    "PeerError",
    "PluginError",
    "Prompts",
    "Registry",
    "Reward",
    "RewardError",
    "Rewarded",
    "RlxError",
    "Rollouts",
    "Sampling",
    "SaveError",
    "Scores",
    "Sequences",
    "Transform",
    "Workers",
    "__version__",
    "available",
    "discover",
    "get",
    "hookimpl",
    "opt",
    "prepare",
    "register",
    "registry",
    "reopen",
    "resolve",
    "resume",
    "run",
]


def __getattr__(name: str) -> Any:
    """The public name, from the module that it lives in."""
    if name == "__version__":
        from importlib.metadata import version  # slow to import, rarely asked for

        value: Any = version("rlx")
    elif name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module 'rlx' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Every public name, imported or not."""
    return sorted({*globals(), *__all__})
