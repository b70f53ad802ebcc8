"""A request for scores in any of the dialects of reward servers, and what a reward answers to it.

The dialect shows in the request's keys: ``completions`` is rlx's own, ``query`` OpenRLHF's, ``messages``
LLaMA-Factory's. ``null`` in an answer means that the reward does not apply; what a reward could not score is
an error, never a number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from rlx.core.errors import ConfigError, RlxError
from rlx.core.reward_call import RUN_STEP, Signature, Unusable, Value, read_items, read_value, start, unwrap
from rlx.core.text import redact, safe_text


class Refusal(Exception):
    """A request that is not answered with scores.

    Args:
        status: of HTTP.
        why: one sentence.
    """

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status, self.why = status, why


@dataclass(frozen=True)
class Asked:
    """A request for scores of N completions.

    Attributes:
        dialect: ``native``, ``openrlhf`` or ``llamafactory``.
        prompts: N texts or message lists.
        texts: N prompts as the policy saw them.
        completions: N texts.
        completion_ids: N lists of token ids; None if the dialect does not bring them.
        columns: name → N values.
        ids: names of the items, None if none were given.
        step: the run's, None if none was told.
    """

    dialect: str
    prompts: list[Any]
    texts: list[str]
    completions: list[str]
    completion_ids: list[list[int]] | None
    columns: Mapping[str, list[Any]]
    ids: list[Any] | None
    step: int | None = None


def read_request(body: bytes, label_column: str = "answer") -> Asked:
    """A request in any of the dialects.

    Args:
        body: as it came.
        label_column: the column that the labels of an openrlhf request become.

    Raises:
        Refusal: no JSON, no dialect, or lists that do not fit.
    """
    try:
        said = json.loads(body.decode("utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise Refusal(400, "the body is no JSON") from None
    if not isinstance(said, dict):
        raise Refusal(400, "the body is no JSON object")
    if "completions" in said:
        return _read_native(said)
    if "query" in said:
        return _read_openrlhf(said, label_column)
    if "messages" in said:
        texts = _texts(said, "messages", None)
        return Asked("llamafactory", [""] * len(texts), [""] * len(texts), texts, None, {}, None)
    raise Refusal(422, "no completions, query or messages: the request is in no dialect that is known")


def _refuse(literal: str) -> NoReturn:
    raise ValueError(f"{literal} is no number in JSON")


def _read_native(said: Mapping[str, Any]) -> Asked:
    completions = _texts(said, "completions", None)
    count = len(completions)
    texts = _texts(said, "prompts", count) if "prompts" in said else [""] * count
    talks = _list(said.get("conversations", [None] * count), "conversations", count)
    if not all(talk is None or (isinstance(talk, list) and all(map(_is_message, talk))) for talk in talks):
        raise Refusal(422, "conversations is no list of message lists and nulls")
    prompts = [text if talk is None else talk for text, talk in zip(texts, talks, strict=True)]
    ids = said.get("completion_ids")
    if ids is not None:
        for tokens in _list(ids, "completion_ids", count):
            if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
                raise Refusal(422, "completion_ids is no list of lists of whole numbers")
    columns = said.get("columns", {})
    if not isinstance(columns, dict):
        raise Refusal(422, "columns is no mapping")
    for name, column in columns.items():
        _list(column, f"column {safe_text(name, 40)!r}", count)
    names = said.get("ids")
    if names is not None:
        _list(names, "ids", count)
    step = said.get("step")
    if step is not None and type(step) is not int:
        raise Refusal(422, "step is neither a whole number nor null")
    return Asked("native", prompts, texts, completions, ids, columns, names, step)


def _read_openrlhf(said: Mapping[str, Any], label_column: str) -> Asked:
    whole = _texts(said, "query", None)
    count = len(whole)
    prompts = _texts(said, "prompts", count) if "prompts" in said else [""] * count
    if not all(text.startswith(prompt) for text, prompt in zip(whole, prompts, strict=True)):
        raise Refusal(422, "a query does not begin with its prompt, so its completion is not known")
    completions = [text.removeprefix(prompt) for text, prompt in zip(whole, prompts, strict=True)]
    labels = said.get("labels")
    columns = {} if labels is None else {label_column: _list(labels, "labels", count)}
    return Asked("openrlhf", list(prompts), prompts, completions, None, columns, None)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and "content" in value


def _list(value: Any, name: str, count: int) -> list[Any]:
    if not isinstance(value, list) or len(value) != count:
        raise Refusal(422, f"{name} is no list of {count} items, one a completion")
    return value


def _texts(said: Mapping[str, Any], name: str, count: int | None) -> list[str]:
    value = said.get(name)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise Refusal(422, f"{name} is no list of texts")
    return value if count is None else _list(value, name, count)


class Served:
    """A reward that is called for requests.

    Args:
        name: how messages call it.
        fn: the function or built object.

    Raises:
        PluginError: it cannot be called as a reward.
        ConfigError: it needs a policy.
    """

    def __init__(self, name: str, fn: Any) -> None:
        self.name, self.fn = name, fn
        self.signature = Signature.of(fn, name)
        if getattr(fn, "needs_policy", False):  # plain functions need not have the attribute
            raise ConfigError(
                f"reward {name!r} scores with the weights of a run's policy, and a server has none",
                code="E-CONFIG-REWARD",
                hint="serve one with a base of its own: rlx reward serve reward_model --option model=DIR",
            )

    def answer(self, asked: Asked) -> dict[str, Any]:
        """The body of the answer to a request.

        Raises:
            Refusal: the request lacks what the reward needs, or the reward failed.
        """
        values, errors = self.score(asked)
        failed = [error for error in errors if error is not None]
        if failed and (asked.dialect != "native" or len(failed) == len(values)):
            raise Refusal(500, f"reward {self.name!r} {failed[0]} ({len(failed)} of {len(values)} items)")
        if asked.dialect != "native":
            return {"rewards" if asked.dialect == "openrlhf" else "scores": values}
        named = {} if asked.ids is None else {"ids": asked.ids}
        return {"scores": values, **named, **({"errors": errors} if failed else {})}

    def score(self, asked: Asked) -> tuple[list[Value], list[str | None]]:
        """One value a completion, and why there is none where the reward failed.

        Raises:
            Refusal: as ``answer``.
        """
        count = len(asked.completions)
        if not count:
            return [], []
        try:
            outcome = start(self.fn, self._arguments(asked)).result()
        except SystemExit as error:  # of a plain reward; it would end this thread without an answer
            raise Refusal(500, f"reward {self.name!r} raised {_told(error)}") from None
        if outcome.error is not None:
            raise Refusal(500, f"reward {self.name!r} raised {_told(outcome.error)}")
        try:
            result, _ = unwrap(outcome.result, count)
            items = read_items(result, count)
        except Unusable as fault:
            raise Refusal(500, f"reward {self.name!r} {_shown(fault)}") from None
        values: list[Value] = []
        errors: list[str | None] = []
        for i, item in enumerate(items):
            try:
                if asked.completion_ids is None and isinstance(item, list | tuple):
                    raise Unusable("returned one number a token", "a list", "one number: no ids were sent")
                tokens = 0 if asked.completion_ids is None else len(asked.completion_ids[i])
                values.append(read_value(item, tokens))
                errors.append(None)
            except Unusable as fault:
                values.append(None)
                errors.append(_shown(fault))
        return values, errors

    def close(self) -> None:
        """Let the reward give back what it holds."""
        if hasattr(self.fn, "close"):  # plain functions hold nothing
            self.fn.close()

    def _arguments(self, asked: Asked) -> dict[str, Any]:
        missing = [name for name in self.signature.needed if name not in asked.columns]
        if missing:
            raise Refusal(422, f"reward {self.name!r} needs the columns {', '.join(missing)}")
        standard = {
            "prompts": asked.prompts,
            "prompt_texts": asked.texts,
            "completions": asked.completions,
            "completion_ids": asked.completion_ids,
            RUN_STEP: asked.step,
        }
        if asked.completion_ids is None:
            del standard["completion_ids"]
            if "completion_ids" in self.signature.names:
                raise Refusal(422, f"reward {self.name!r} needs completion_ids, as native requests have them")
        return {
            name: value for name, value in {**asked.columns, **standard}.items() if self.signature.takes(name)
        }


def _told(error: BaseException) -> str:
    said = "; ".join(error.lines()) if isinstance(error, RlxError) else str(error)
    return str(redact(safe_text(f"{type(error).__name__}: {said}", 300)))


def _shown(fault: Unusable) -> str:
    return str(redact(safe_text(f"{fault.what}: {fault.got}", 300)))
