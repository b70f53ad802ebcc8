"""What kind of rows these are, and the transforms that bring them into the columns an algorithm reads.

A pure function of the names of the columns and the types in the first rows. Only the column of the prompt is
looked for under several names; every name that was taken is told.

| algorithm eats | columns it reads | found in |
|---|---|---|
| prompts | prompt | a prompt column; instruction + input; whole dialogues, up to the last user turn |
| pairs | prompt, chosen, rejected | a prompt column + chosen + rejected; whole dialogues chosen + rejected |
| labeled | prompt, completion, label | a prompt column + completion + label; dialogues + label; pairs |
| demonstrations | prompt, completion; or messages; or text | those; instruction + input + output; dialogues |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from rlx.plugins.transforms.chat import ConversationPrompt, ShareGPTMessages, SplitConversation
from rlx.plugins.transforms.columns import CHAT_COLUMNS, ColumnMap, InstructionPrompt, detect
from rlx.plugins.transforms.preference import ExtractPrompt, Unpair

# What each kind of algorithm needs at least, for messages about what is missing.
REQUIRED = {
    "prompts": ("prompt",),
    "pairs": ("chosen", "rejected"),
    "labeled": ("completion", "label"),
    "demonstrations": ("prompt", "completion"),
}
COMPLETIONS = ("completion", "response", "output")


@dataclass(frozen=True)
class Way:
    """How rows of one format become the columns that an algorithm reads.

    Attributes:
        transforms: in order.
        notes: what they do, a line each.
        answers: the columns that hold what is learned from, after the transforms.
    """

    transforms: list[Any] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    answers: tuple[str, ...] = ()


def find_way(columns: Iterable[str], rows: Sequence[Mapping[str, Any]], eats: str) -> Way | None:
    """The way from the rows' format to what an algorithm eats.

    Args:
        columns: names of the columns.
        rows: rows; only the first eight are looked at.
        eats: ``prompts``, ``pairs``, ``labeled`` or ``demonstrations``.

    Returns:
        None where the columns do not suffice.
    """
    names, first = set(columns), list(islice(rows, 8))
    if eats == "prompts":
        return _to_prompt(names, first)
    if eats == "pairs":
        return _pairs(names, first)
    if eats == "labeled":
        return _labeled(names, first)
    return _demonstrations(names, first)


def _to_prompt(names: set[str], first: list[Mapping[str, Any]], answers: tuple[str, ...] = ()) -> Way | None:
    if "prompt" in names:
        return Way(answers=answers)
    found = detect(names, first)
    if found is None:
        return None
    if found.name == "instruction":
        return Way(
            [InstructionPrompt(InstructionPrompt.Config())],
            [
                "prompt ← instruction, a blank line, input",
                *(["system is not used: alpaca_to_messages takes it"] if "system" in names else []),
            ],
            answers,
        )
    ((wanted, column),) = found.columns.items()
    rename = [ColumnMap(ColumnMap.Config(columns=found.columns))] if wanted != column else []
    if found.name == "conversation":
        return Way(
            [*rename, ConversationPrompt(ConversationPrompt.Config())],
            [f"prompt ← {column}, up to the last user turn", *_system(names)],
            answers,
        )
    return Way(rename, [f"prompt ← {column}"], answers)


def _pairs(names: set[str], first: list[Mapping[str, Any]]) -> Way | None:
    answers = ("chosen", "rejected")
    if not set(answers) <= names:
        return None
    way = None if _whole_dialogues(first) else _to_prompt(names - {*answers, *CHAT_COLUMNS}, first, answers)
    if way is not None:
        return way
    return Way(
        [ExtractPrompt(ExtractPrompt.Config())],
        [
            "prompt ← what the dialogues chosen and rejected begin with",
            *(_system(names) if first and isinstance(first[0].get("chosen"), list) else []),
        ],
        answers,
    )


def _whole_dialogues(first: list[Mapping[str, Any]]) -> bool:
    """Whether the answers of pairs repeat the prompt: as turns before the assistant's, or as text."""

    def repeats(row: Mapping[str, Any], column: str) -> bool:
        prompt, answer = row.get("prompt"), row.get(column)
        if isinstance(answer, list) and answer and isinstance(answer[0], Mapping):
            role = answer[0].get("role", answer[0].get("from"))
            return role in ("system", "developer", "user", "human")
        return isinstance(prompt, str) and isinstance(answer, str) and answer.startswith(prompt or "\0")

    return bool(first) and all(repeats(row, "chosen") and repeats(row, "rejected") for row in first)


def _labeled(names: set[str], first: list[Mapping[str, Any]]) -> Way | None:
    if "label" in names:
        if "completion" in names:
            return _to_prompt(names - {"completion", "label", *CHAT_COLUMNS}, first, ("completion",))
        chat = next((column for column in CHAT_COLUMNS if column in names), None)
        if chat is not None:
            return Way(
                [*_messages(chat), SplitConversation(SplitConversation.Config())],
                [
                    f"prompt, completion ← {chat}, before and after the end of the last user turn",
                    *_system(names),
                ],
                ("completion",),
            )
    way = _pairs(names, first)
    if way is None:
        return None
    return Way(
        [*way.transforms, Unpair(Unpair.Config())],
        [*way.notes, "pairs as single completions: chosen is desirable, rejected is not"],
        ("completion",),
    )


def _demonstrations(names: set[str], first: list[Mapping[str, Any]]) -> Way | None:
    found = next((column for column in COMPLETIONS if column in names), None)
    way = _to_prompt(names - {*CHAT_COLUMNS, *COMPLETIONS}, first, ("completion",)) if found else None
    if found is not None and way is not None:
        if found == "completion":
            return way
        copy = ColumnMap(ColumnMap.Config(columns={"completion": found}))
        return Way([*way.transforms, copy], [*way.notes, f"completion ← {found}"], way.answers)
    chat = next((column for column in CHAT_COLUMNS if column in names), None)
    if chat is not None:
        renamed = [f"messages ← {chat}"] if chat != "messages" else []
        return Way(_messages(chat), [*renamed, *_system(names)])
    return Way() if "text" in names else None


def _messages(column: str) -> list[Any]:
    """The transforms that bring dialogues of one column into ``messages``, ShareGPT's or the usual ones."""
    return [ShareGPTMessages(ShareGPTMessages.Config(column=column))]


def _system(names: set[str]) -> list[str]:
    """A note on the column that dialogues take their first message from, if there is one."""
    return ["the first message of dialogues ← system, where it has text"] if "system" in names else []
