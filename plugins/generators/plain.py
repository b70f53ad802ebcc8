"""transformers' own ``generate`` as a generator: the plain peer of ``native``, with the same draws."""

from __future__ import annotations

from typing import ClassVar

from rlx.plugins.generators.native import Native


class Plain(Native):
    """``model.generate``, without shared prompts and dropped rows."""

    plain: ClassVar[bool] = True
