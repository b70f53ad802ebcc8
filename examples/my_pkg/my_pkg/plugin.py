"""Short names for what this package has, found by rlx once it is installed."""

from __future__ import annotations

import rlx


@rlx.hookimpl
def rlx_register(registry: rlx.Registry) -> None:
    """``--reward closeness`` is then ``--reward my_pkg:MyReward``, ``--judge closer`` the judge."""
    registry.add("reward", "closeness", "my_pkg:MyReward", "how close the last number is to the right one")
    registry.add("judge", "closer", "my_pkg.judge:Closer", "the completion whose number is nearer")
