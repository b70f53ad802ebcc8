"""What compares two completions."""
