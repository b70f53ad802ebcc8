"""``python -m rlx`` and the command ``rlx``."""

from __future__ import annotations


def main() -> int:
    """Run the command line.

    Returns:
        The exit code.
    """
    from rlx.core.commands.main import main as command_line

    return command_line()


if __name__ == "__main__":
    raise SystemExit(main())
