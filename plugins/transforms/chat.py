"""Conversations: bring dialogues into one shape, and render prompts as the text that the model sees."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlx.core.errors import ConfigError, DataError
from rlx.core.options import opt
from rlx.core.text import safe_text
from rlx.plugins.contract import Transform
from rlx.plugins.transforms import BadRow

Row = dict[str, Any]
Messages = list[dict[str, Any]]

MAX_CHARACTERS = (
    4 * 2**20
)  # of one rendered prompt; no context is that long, and a template can make any length
UNUSABLE = re.compile(
    "[\x00\ud800-\udfff]"
)  # NUL, and halves of surrogate pairs, which no tokenizer can encode
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
ROLES = ("system", "developer", "user", "assistant", "tool")
CHATML = """\
{%- for message in messages -%}
{%- if message['tool_calls'] -%}{{- raise_exception('chatml has no form for tool calls') -}}{%- endif -%}
{{- '<|im_start|>' ~ message['role'] ~ '\n' ~ message['content'] ~ '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""


class ConversationPrompt(Transform):
    """A whole dialogue as a prompt: the turns up to the last user turn; the answers that follow are left out.

    ShareGPT's ``from`` and ``value`` become ``role`` and ``content``. Text in a column ``system`` is the
    first message.
    """

    takes = frozenset({"messages"})
    gives = frozenset({"prompt"})

    def __call__(self, rows: list[Row], tokenizer: Any = None) -> list[Row]:
        """Rows with ``prompt``, a list of messages."""
        return [{**row, "prompt": self._prompt(row)} for row in rows]

    def _prompt(self, row: Row) -> Messages:
        messages = standard_messages(row, "messages")
        while messages and messages[-1].get("role") == "assistant":
            messages.pop()
        return messages


class SplitConversation(Transform):
    """A dialogue as ``prompt``, the turns up to the last user turn, and ``completion``, those after it.

    Text in a column ``system`` is the first message.
    """

    takes = frozenset({"messages"})
    gives = frozenset({"prompt", "completion"})

    def __call__(self, rows: list[Row], tokenizer: Any = None) -> list[Row]:
        """Rows with both, lists of messages."""
        out = []
        for row in rows:
            messages = standard_messages(row, "messages")
            users = [place for place, turn in enumerate(messages) if turn.get("role") == "user"]
            cut = users[-1] + 1 if users else 0
            out.append({**row, "prompt": messages[:cut], "completion": messages[cut:]})
        return out


class ShareGPTMessages(Transform):
    """ShareGPT's ``conversations`` of ``from`` and ``value`` as ``messages`` of ``role`` and ``content``.

    Text in a column ``system`` is the first message.
    """

    gives = frozenset({"messages"})

    @dataclass(frozen=True)
    class Config:
        """Where the dialogues are."""

        column: str = opt("conversations", "column of dialogues")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.takes = frozenset({config.column})  # type: ignore[misc]  # known only with the option

    def __call__(self, rows: list[Row], tokenizer: Any = None) -> list[Row]:
        """Rows with ``messages``."""
        return [{**row, "messages": standard_messages(row, self.config.column)} for row in rows]


def standard_messages(row: Mapping[str, Any], column: str) -> Messages:
    """A dialogue as messages of ``role`` and ``content``; ShareGPT's ``from`` and ``value`` become them.

    Args:
        row: may have a column ``system``, text that is the first message where the dialogue has no such.
        column: of the dialogue.

    Raises:
        BadRow: for what is no list of mappings.
    """
    turns, system = row.get(column), row.get("system")
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise BadRow(f"{column} is {type(turns).__name__}, not a list of messages")
    messages = [
        dict(turn)
        if "role" in turn or "from" not in turn
        else {"role": SHAREGPT_ROLES.get(turn["from"], turn["from"]), "content": turn.get("value")}
        for turn in turns
    ]
    first = messages[0].get("role") if messages else None
    if isinstance(system, str) and system.strip() and first not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": system})
    return messages


def check_messages(messages: Any) -> None:
    """Whether a chat template can render the messages.

    Raises:
        BadRow: naming the turn and the rule.
    """
    if not messages:
        raise BadRow("prompt is an empty list of messages")
    previous = ""
    for number, turn in enumerate(messages):
        role = turn.get("role") if isinstance(turn, Mapping) else None
        if role not in ROLES:
            raise BadRow(f"turn {number}: role is {safe_text(role, 40)}; known are {', '.join(ROLES)}")
        if not isinstance(turn.get("content"), str) and not (role == "assistant" and _calls_tools(turn)):
            raise BadRow(f"turn {number}: content is {type(turn.get('content')).__name__}, not text")
        if role in ("system", "developer") and number > 0:
            raise BadRow(f"turn {number}: a {role} message is not the first")
        if role == "assistant" and previous in ("", "system", "developer"):
            raise BadRow(f"turn {number}: an assistant turn before any user turn")
        if role == previous and role != "tool":
            raise BadRow(f"turn {number}: two {role} turns in a row")
        previous = role
    if not any(turn["role"] == "user" and turn["content"].strip() for turn in messages):
        raise BadRow("prompt has no user turn with text")


def _calls_tools(turn: Mapping[str, Any]) -> bool:
    return turn.get("content") is None and bool(turn.get("tool_calls"))


def tools_of(value: Any) -> list[Any] | None:
    """The functions that a row offers to the model, None for no function.

    Args:
        value: of the column ``tools``: a list of JSON schemas, or the same as JSON text, as tables without
            nested types have it.

    Raises:
        BadRow: for anything else.
    """
    found = value
    if isinstance(value, str):
        try:
            found = json.loads(value) if value.strip() else None
        except ValueError:
            raise BadRow("tools is text, and no JSON") from None
    if not found:
        return None
    if not isinstance(found, list) or not all(isinstance(one, Mapping) for one in found):
        raise BadRow("tools is no list of JSON schemas")
    return found


class ChatTemplate(Transform):
    """Renders each prompt as the text that the model sees.

    A list of messages goes through the chat template, and so does text, as one user message; without a
    template text stays as it is. A prompt that ends with an assistant turn is one for the model to continue.
    """

    stage = "template"
    takes = frozenset({"prompt"})
    gives = frozenset({"_text", "_messages"})

    @dataclass(frozen=True)
    class Config:
        """Which template."""

        template: str = opt(
            "auto",
            "auto is the tokenizer's; a Jinja template, a file with one, chatml, or none for plain text",
        )
        system_prompt: str | None = opt(None, "system message before every prompt that has none")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.override = _template(config.template)

    def templated(self, tokenizer: Any) -> bool:
        """Whether prompts go through a chat template; if not they are plain text."""
        return self.config.template != "none" and bool(self.override or tokenizer.chat_template)

    def __call__(self, rows: list[Row], tokenizer: Any) -> list[Row]:
        """Rows with ``_text``, the rendered prompt, and ``_messages``, for prompts that are messages.

        Raises:
            BadRow: a prompt that is neither text nor messages, empty, not encodable, or refused by the
                template.
            ConfigError: a system prompt without a template.
            DataError: messages without a template.
        """
        self.check_system_prompt(tokenizer)
        return [{**row, **self._rendered(row, tokenizer)} for row in rows]

    def check_system_prompt(self, tokenizer: Any) -> None:
        """Refuse a system prompt that nothing would render.

        Raises:
            ConfigError: a system prompt without a template.
        """
        if self.config.system_prompt and not self.templated(tokenizer):
            raise ConfigError(
                "system_prompt needs a chat template",
                code="E-CONFIG-TEMPLATE",
                got="chat_template: none"
                if self.config.template == "none"
                else f"{_model(tokenizer)} has none",
                hint="--chat-template chatml, or a file with a Jinja template, or leave system_prompt out",
            )

    def _rendered(self, row: Row, tokenizer: Any) -> Row:
        prompt = row.get("prompt")
        messages = self.messages(prompt, tokenizer)
        if messages is None:
            text = str(prompt)
        else:
            continued = messages[-1]["role"] == "assistant"
            text = self.render(
                messages, tokenizer, opens=not continued, continues=continued, tools=row.get("tools")
            )
        if len(text) > MAX_CHARACTERS:
            raise BadRow(f"prompt is longer than {MAX_CHARACTERS:,} characters")
        return {"_text": text, "_messages": messages if isinstance(prompt, list) else None}

    def messages(self, prompt: Any, tokenizer: Any) -> Messages | None:
        """A prompt as the messages that go through the template, the system prompt put before them.

        Args:
            prompt: text or messages.
            tokenizer: of the model.

        Returns:
            Messages, or None for text that stays as it is.

        Raises:
            BadRow: a prompt that is neither text nor messages, empty, or not encodable.
            DataError: messages without a template.
        """
        if isinstance(prompt, str):
            if not prompt.strip():
                raise BadRow("prompt is empty")
            messages: Messages = [{"role": "user", "content": prompt}]
        elif isinstance(prompt, list):
            check_messages(prompt)
            messages = prompt
        else:
            raise BadRow(f"prompt is {type(prompt).__name__}, not text or a list of messages")
        check_encodable(messages, "prompt")
        if not self.templated(tokenizer):
            if messages is not prompt:
                return None
            raise DataError(
                f"the prompts are messages, but {_model(tokenizer)} has no chat template",
                code="E-DATA-TEMPLATE",
                expected="a tokenizer with a chat template, or prompts that are plain text",
                hint="--chat-template chatml, or a file with a Jinja template",
            )
        if self.config.system_prompt and messages[0]["role"] not in ("system", "developer"):
            messages = [{"role": "system", "content": self.config.system_prompt}, *messages]
        return messages

    def render(
        self,
        messages: Messages,
        tokenizer: Any,
        *,
        opens: bool = False,
        continues: bool = False,
        tools: Any = None,
    ) -> str:
        """Messages as text.

        Args:
            messages: checked ones.
            tokenizer: of the model.
            opens: end with what opens an assistant's turn.
            continues: leave the last turn open, for the model to continue.
            tools: the functions that the model may call, as ``tools_of`` takes them.

        Raises:
            BadRow: refused by the template, or ``tools`` of another kind.
            DataError: a template that asks for more memory than there is.
        """
        from jinja2 import TemplateError

        functions = tools_of(tools)
        try:
            text = tokenizer.apply_chat_template(
                messages,
                tools=functions,
                chat_template=self.override,
                add_generation_prompt=opens,
                continue_final_message=continues,
                tokenize=False,
            )
        except MemoryError as error:
            raise DataError(
                "the chat template asks for more memory than there is", code="E-DATA-TEMPLATE"
            ) from error
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise BadRow(f"the chat template refuses it: {safe_text(error, 120)}") from error
        return str(text)


def check_encodable(messages: Messages, column: str) -> None:
    """Refuse text that no tokenizer can encode.

    Raises:
        BadRow: naming the column.
    """
    contents = [turn.get("content") for turn in messages]
    if any(isinstance(content, str) and UNUSABLE.search(content) for content in contents):
        raise BadRow(f"{column} has a NUL or half a surrogate pair in it, which cannot be encoded")


def _template(option: str) -> str | None:
    """The Jinja text that the option stands for, None for the tokenizer's own or none at all."""
    if option in ("auto", "none"):
        return None
    if option == "chatml":
        return CHATML
    if "{%" in option or "{{" in option:
        return option
    try:
        return Path(option).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            "chat_template is neither a template nor a file that can be read",
            code="E-CONFIG-TEMPLATE",
            got=f"{safe_text(option, 80)} ({safe_text(error, 80)})",
            expected="Jinja text, a file with it, chatml, auto or none",
        ) from error


def _model(tokenizer: Any) -> str:
    return f"the tokenizer of {safe_text(tokenizer.name_or_path or 'the model', 120)}"


def shared_start(*texts: str) -> str:
    """What all texts begin with, to the character."""
    first, last = min(texts), max(texts)  # whatever lies between the two in order begins with it as well
    place = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:place]
