"""One file a reward family."""
