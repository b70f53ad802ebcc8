"""What the processes of a program tell the test."""

import os


def say(process: int, line: str) -> None:
    """In one call: where Python does not buffer, ``print`` makes two, and the lines of two processes mix."""
    os.write(1, f"process {process}: {line}\n".encode())
