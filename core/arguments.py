"""Command-line words → option values. Syntax only: what the names mean is decided in ``rlx.core.config``.

``--learning-rate 1e-5``, ``--learning-rate=1e-5``, ``--shuffle``, ``--no-shuffle``, ``--shuffle false``,
``--length.target 50``, ``--columns prompt=question``; an option that takes a list is repeated. Names may be
written with dashes or underscores. Nothing is abbreviated and nothing is dropped.
"""

from __future__ import annotations

import os
import re
import typing
from typing import Any

from rlx.core.errors import ConfigError, ErrorGroup, RlxError
from rlx.core.options import FALSE, TRUE, Option, is_list, options
from rlx.core.plain import Plain
from rlx.core.settings import Settings
from rlx.core.text import safe_text

_FLAG = re.compile(r"--([A-Za-z][\w.-]*)(?:=(.*))?", re.DOTALL)


def parse_arguments(argv: list[str]) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Read flags; a value stays text until its option is known.

    Args:
        argv: the words after the verb.

    Returns:
        Values by option name (dotted for a component's), where each was given (``--flag``), and the words
        that belong to no flag.

    Raises:
        ConfigError: for a word that is no flag, a flag without its value, a flag given twice; all of them at
            once.
    """
    reader = _Reader(argv)
    reader.read()
    if reader.problems:
        raise reader.problems[0] if len(reader.problems) == 1 else ErrorGroup(reader.problems)
    return reader.values, reader.where, reader.positional


def switch_words(option: Option) -> tuple[str, ...]:
    """Words that may follow a flag which alone means true; none for an option that needs a value."""
    literals = typing.get_args(option.type) if typing.get_origin(option.type) is typing.Literal else ()
    switch = option.type is bool or any(one is True for one in literals)
    return TRUE + FALSE + tuple(one for one in literals if isinstance(one, str)) if switch else ()


class _Reader:
    """One pass over the words."""

    def __init__(self, argv: list[str]) -> None:
        self.words = list(argv)
        self.core = options(Settings)
        self.values: dict[str, Any] = {}
        self.where: dict[str, str] = {}
        self.positional: list[str] = []
        self.problems: list[RlxError] = []

    def read(self) -> None:
        """Consume all words."""
        before = ""
        while self.words:
            word = self.words.pop(0)
            match = _FLAG.fullmatch(word)
            if word == "--":
                self.positional += self.words
                return
            if match:
                self._flag(match[1], match[2])
            elif word.startswith("-") and word != "-":
                self._problem(f"{safe_text(word, 80)!r} is no flag", hint="flags are written --name value")
            else:
                self._apart(word, before)
            before = word

    def _apart(self, word: str, before: str) -> None:
        """A word that belongs to no flag: the config file, or a second value of the flag before it."""
        flag = before.partition("=")[0]
        if flag not in self.where.values() or word.endswith((".yaml", ".yml")) or os.path.exists(word):
            self.positional.append(word)
        else:
            shown = safe_text(word, 80)
            self._problem(
                f"{shown!r} after {flag} is neither its value nor a config file",
                hint=f"an option that takes several values is repeated: {flag} … {flag} {shown}",
            )

    def _flag(self, written: str, value: str | None) -> None:
        name, flag = written.replace("-", "_"), f"--{written}"
        option = self.core.get(name)
        if option is None and name.startswith("no_") and value is None and "." not in name:
            name, value = name[3:], "false"
            option = self.core.get(name)
            if option is not None and not switch_words(option):
                self._problem(
                    f"{flag}: {name} is no switch", hint=f"leave --{written[3:]} out, or give it a value"
                )
                return
        if value is None:
            value = self._value(option)
        if value is None:
            self._problem(f"{flag} needs a value", hint=option.doc if option else "")
            return
        self._store(name, flag, value, option)

    def _value(self, option: Option | None) -> str | None:
        """The flag's value: the next word, or ``true`` for a switch; None if it is missing."""
        following = self.words[0] if self.words else None
        if option is not None and (words := switch_words(option)):
            takes = following is not None and following.lower() in words
            return self.words.pop(0) if takes else "true"
        if following is None or following.startswith("--"):
            # An algorithm's switch is not known here; what is no switch will refuse "true".
            return "true" if option is None else None
        return self.words.pop(0)

    def _store(self, name: str, flag: str, text: str, option: Option | None) -> None:
        value: Any = Plain(text)
        if option is not None and option.type == dict[str, str]:
            wanted, sign, found = text.partition("=")
            if not sign or not wanted:
                self._problem(f"{flag} {safe_text(text, 80)}: no mapping", hint=f"{flag} wanted=found")
                return
            self.values.setdefault(name, {})[wanted] = found
        elif option is not None and is_list(option):
            self.values.setdefault(name, []).append(value)
        elif name not in self.values:
            self.values[name] = value
        elif option is None:  # perhaps a list of a component: its Config decides
            before = self.values[name]
            self.values[name] = [*before, value] if isinstance(before, list) else [before, value]
        else:
            self._problem(f"{flag} is given twice", hint="give it once")
        self.where[name] = flag

    def _problem(self, what: str, hint: str = "") -> None:
        self.problems.append(ConfigError(what, code="E-CONFIG-FLAG", hint=hint))
