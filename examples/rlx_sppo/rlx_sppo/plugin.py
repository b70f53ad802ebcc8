"""What this package offers; imported for every command of rlx, so nothing heavy here."""

import rlx


@rlx.hookimpl
def rlx_register(registry: rlx.Registry) -> None:
    """Offer the algorithm, the transform and the callback under their short names."""
    registry.add("algorithm", "sppo", "rlx_sppo.sppo:SPPO", "self-play preference optimisation")
    registry.add("transform", "balance", "rlx_sppo.balance:Balance", "as many rows of each value of a column")
    registry.add("callback", "winners", "rlx_sppo.winners:Winners", "the best completion of each log line")
