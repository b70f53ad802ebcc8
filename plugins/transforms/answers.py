"""Renders prompts with the answers to them, by comparing what a chat template makes of one and of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlx.core.text import safe_text
from rlx.plugins.contract import NoOptions, Transform
from rlx.plugins.transforms import PLAIN, BadRow
from rlx.plugins.transforms.chat import (
    MAX_CHARACTERS,
    ChatTemplate,
    check_encodable,
    check_messages,
    shared_start,
)

Row = dict[str, Any]
Messages = list[dict[str, Any]]

PROBE = "\ue000"  # an answer that begins like no other: a character for private use


class RenderAnswers(Transform):
    """Each prompt and the answers to it as the text that the model sees.

    Through a chat template the prompt is rendered up to where the answer begins, and again with each answer
    behind it; what the second text has more is the answer. So it works for any template, and for answers that
    go on with an assistant's turn or have several turns. White space after the token that ends the last turn
    is left out: the model stops at that token. Text goes through the template as one user message and one
    assistant message; text that was cut out of whole dialogues, or meets no template, stays as it is.
    """

    gives = frozenset({"_prompt", "_answers", "_text"})

    def __init__(self, template: ChatTemplate, columns: Sequence[str]) -> None:
        """Take the chat template, and the columns that hold answers."""
        super().__init__(NoOptions())
        self.template = template
        self.columns = tuple(columns)
        self.takes = frozenset({"prompt", *columns})  # type: ignore[misc]  # known only with the columns

    def __call__(self, rows: list[Row], tokenizer: Any) -> list[Row]:
        """Rows with ``_prompt``, ``_answers`` (one text a column) and ``_text`` (False through a template).

        Raises:
            BadRow: what is neither text nor messages, empty, not encodable, or refused by the template.
            ConfigError: a system prompt without a template.
            DataError: messages without a template.
        """
        self.template.check_system_prompt(tokenizer)
        return [{**row, **self._rendered(row, tokenizer)} for row in rows]

    def _rendered(self, row: Row, tokenizer: Any) -> Row:
        prompt, answers = row.get("prompt"), [row.get(column) for column in self.columns]
        text = isinstance(prompt, str) and all(isinstance(answer, str) for answer in answers)
        turns = [as_turns(answer, column) for answer, column in zip(answers, self.columns, strict=True)]
        if isinstance(prompt, str) and not prompt.strip():
            raise BadRow("prompt is empty")
        messages = None if text and row.get(PLAIN) else self.template.messages(prompt, tokenizer)
        if messages is None and text:
            check_encodable([{"content": prompt}], "prompt")
            rendered: Row = {"_prompt": prompt, "_answers": answers, "_text": True}
        else:
            # Text with an answer in messages needs the template, and is told so if there is none.
            messages = messages or self.template.messages([{"role": "user", "content": prompt}], tokenizer)
            assert messages is not None
            start, ends = self._compared(messages, turns, tokenizer, row.get("tools"))
            rendered = {"_prompt": start, "_answers": ends, "_text": False}
        if len(rendered["_prompt"]) + max(map(len, rendered["_answers"])) > MAX_CHARACTERS:
            raise BadRow(
                f"prompt and {' or '.join(self.columns)} have more than {MAX_CHARACTERS:,} characters"
            )
        return rendered

    def _compared(
        self, prompt: Messages, answers: list[Messages], tokenizer: Any, tools: Any
    ) -> tuple[str, list[str]]:
        continued = prompt[-1]["role"] == "assistant"
        start = self.template.render(prompt, tokenizer, opens=not continued, continues=continued, tools=tools)
        wholes = []
        for column, answer in zip(self.columns, answers, strict=True):
            dialogue = joined(prompt, answer) if continued else [*prompt, *answer]
            try:
                check_messages(dialogue)
            except BadRow as error:
                raise BadRow(f"prompt with {column}: {error.what}") from error
            wholes.append(self.template.render(dialogue, tokenizer, tools=tools))
        if not all(whole.startswith(start) for whole in wholes):
            # The template opens a turn in another way than it renders one, with a mark for reasoning say: the
            # answer begins where the two part, and not within its own text.
            probe = [{"role": "assistant", "content": PROBE}]
            probe = joined(prompt, probe) if continued else [*prompt, *probe]
            start = shared_start(start, *wholes, self.template.render(probe, tokenizer, tools=tools))
        return start, [without_tail(whole[len(start) :], tokenizer) for whole in wholes]


class RenderDialogue(Transform):
    """Each conversation, or text where there is none, as the text that the model sees.

    The assistant's turns are found by comparing renderings. A turn begins where the conversation before it,
    with what opens an assistant's turn, ends; it ends where the conversation up to it ends. Where a template
    renders a turn in another way once others follow it, the turn ends where the rendering is the same again
    whatever its content, and with the special token after that.
    """

    gives = frozenset({"_whole", "_text", "_spans"})

    def __init__(self, template: ChatTemplate, spans: bool) -> None:
        """Take the chat template, and whether the assistant's turns are wanted."""
        super().__init__(NoOptions())
        self.template = template
        self.spans = spans

    def __call__(self, rows: list[Row], tokenizer: Any) -> list[Row]:
        """Rows with ``_whole``, ``_text`` (whether it is plain) and ``_spans`` (of the turns, or None).

        Raises:
            BadRow: what is neither text nor messages, empty, not encodable, or refused by the template.
            ConfigError: a system prompt without a template.
            DataError: messages without a template.
        """
        self.template.check_system_prompt(tokenizer)
        return [{**row, **self._rendered(row, tokenizer)} for row in rows]

    def _rendered(self, row: Row, tokenizer: Any) -> Row:
        if row.get("messages") is None:
            text = row.get("text")
            if not isinstance(text, str):
                raise BadRow(f"text is {type(text).__name__}, not text")
            if not text.strip():
                raise BadRow("text is empty")
            if self.spans:
                raise BadRow("text has no turns to learn, only messages have")
            check_encodable([{"content": text}], "text")
            rendered: Row = {"_whole": text, "_text": True, "_spans": None}
        else:
            messages, tools = self.template.messages(row["messages"], tokenizer), row.get("tools")
            assert messages is not None
            whole = without_tail(self.template.render(messages, tokenizer, tools=tools), tokenizer)
            spans = self._turns(messages, whole, tokenizer, tools) if self.spans else None
            rendered = {"_whole": whole, "_text": False, "_spans": spans}
        if len(rendered["_whole"]) > MAX_CHARACTERS:
            raise BadRow(f"more than {MAX_CHARACTERS:,} characters")
        return rendered

    def _turns(self, messages: Messages, whole: str, tokenizer: Any, tools: Any) -> list[tuple[int, int]]:
        """First and last character (not included) of each of the assistant's turns."""

        def render(turns: Messages, opens: bool = False) -> str:
            return self.template.render(turns, tokenizer, opens=opens, tools=tools)

        out = []
        for number, turn in enumerate(messages):
            if turn["role"] != "assistant":
                continue
            probed = [*messages[:number], {**turn, "content": PROBE}, *messages[number + 1 :]]
            probe = without_tail(render(probed), tokenizer)
            before, upto = render(messages[:number], opens=True), render(messages[: number + 1])
            upto = without_tail(upto, tokenizer)
            start = len(before)
            if not whole.startswith(before):
                start = len(shared_start(before, whole, probe))
            end = len(upto)
            if not whole.startswith(upto):
                end = len(whole) - len(shared_start(whole[::-1], probe[::-1]))
                end += _end_of_turn(whole[end:], tokenizer)
            if end <= start:
                raise BadRow(f"turn {number}: the chat template does not show it")
            out.append((start, end))
        if not out:
            raise BadRow("messages have no assistant turn to learn")
        return out


def _end_of_turn(rest: str, tokenizer: Any) -> int:
    """Characters up to the end of the special token that follows a turn's content, 0 where none does."""
    blank = len(rest) - len(rest.lstrip())
    found = [token for token in special_texts(tokenizer) if rest.startswith(token, blank)]
    return blank + max(map(len, found)) if found else 0


def as_turns(answer: Any, column: str) -> Messages:
    """An answer as messages, the first of them an assistant's.

    Raises:
        BadRow: for anything else than text or such messages.
    """
    if isinstance(answer, str):
        turns: Messages = [{"role": "assistant", "content": answer}]
    elif isinstance(answer, list):
        turns = answer
        if not turns or not isinstance(turns[0], dict) or turns[0].get("role") != "assistant":
            role = turns[0].get("role") if turns and isinstance(turns[0], dict) else None
            raise BadRow(f"{column}, turn 0: role is {safe_text(role, 40)}, not assistant")
    else:
        raise BadRow(f"{column} is {type(answer).__name__}, not text or a list of messages")
    check_encodable([turn for turn in turns if isinstance(turn, dict)], column)
    return turns


def joined(prompt: Messages, answer: Messages) -> Messages:
    """The dialogue in which the answer's first turn goes on with the prompt's last one."""
    content = f"{prompt[-1].get('content') or ''}{answer[0].get('content') or ''}"
    return [*prompt[:-1], {**answer[0], "content": content}, *answer[1:]]


def without_tail(text: str, tokenizer: Any) -> str:
    """The text without white space after a special token at its end."""
    short = text.rstrip()
    return short if short.endswith(tuple(special_texts(tokenizer))) else text


def special_texts(tokenizer: Any) -> list[str]:
    """The tokens that have a meaning of their own, as text."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*tokenizer.all_special_tokens, *added})
