"""Self-play preference optimisation for rlx."""
