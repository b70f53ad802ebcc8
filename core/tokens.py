"""Texts to token ids, a prompt and the answer to it kept apart without losing or shifting a character."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def tokenised(tokenizer: Any, texts: Sequence[str], *, special: bool) -> list[list[int]]:
    """Token ids of each text.

    Args:
        tokenizer: of the model.
        texts: rendered ones.
        special: plain text, which begins with what begins a text; a chat template has put it there already.

    Returns:
        One list a text, without the end-of-sequence token that some tokenizers put after every text.
    """
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
    eos = tokenizer.eos_token
    if not special or eos is None:
        return ids
    return [
        one[:-1] if one and one[-1] == tokenizer.eos_token_id and not text.endswith(eos) else one
        for one, text in zip(ids, texts, strict=True)
    ]


def split_tokenised(
    tokenizer: Any, prompts: Sequence[str], answers: Sequence[str], *, special: bool
) -> list[tuple[list[int], list[int]]]:
    """Token ids of prompts and of the answers to them.

    Both are tokenised as one text where the prompt's tokens are the same with and without an answer after
    them. Where a token would reach over the boundary they are tokenised apart, so that the prompt is what the
    model is given when it samples. Where apart is another text, as with tokenizers that begin every text with
    a space, the token that reaches over goes to the answer, whole.

    Args:
        tokenizer: of the model.
        prompts: rendered ones.
        answers: rendered ones, one a prompt.
        special: as for ``tokenised``.

    Returns:
        (prompt ids, answer ids), one pair a prompt. Decoded one after the other they are the two texts.
    """
    wholes = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    begun = tokenised(tokenizer, prompts, special=special)
    joint = tokenised(tokenizer, wholes, special=special)
    out = []
    for prompt, whole, answer in zip(begun, joint, answers, strict=True):
        if whole[: len(prompt)] == prompt:
            out.append((prompt, whole[len(prompt) :]))
            continue
        apart: list[int] = tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"]
        if tokenizer.decode(prompt + apart) == tokenizer.decode(whole):
            out.append((prompt, apart))
            continue
        same = next(
            place for place, pair in enumerate(zip(prompt, whole, strict=False)) if pair[0] != pair[1]
        )
        out.append((whole[:same], whole[same:]))
    return out


def fitted(
    prompt: list[int], answers: Sequence[list[int]], limit: int, mode: str
) -> tuple[list[int], list[list[int]]] | None:
    """A prompt and the answers to it, cut so that the prompt and any of the answers keep within the limit.

    Args:
        prompt: token ids.
        answers: token ids, all after the same prompt.
        limit: most tokens of prompt and answer.
        mode: ``keep_start`` cuts answers at their end, ``keep_end`` cuts the prompt at its start, ``drop``
            cuts nothing.

    Returns:
        Both, or None where the rule leaves no prompt, or no room for an answer.
    """
    over = len(prompt) + max(map(len, answers)) - limit
    if over <= 0:
        return prompt, list(answers)
    if mode == "keep_start" and len(prompt) < limit:
        return prompt, [answer[: limit - len(prompt)] for answer in answers]
    if mode == "keep_end" and over < len(prompt):
        return prompt[over:], list(answers)
    return None


def cut_places(tokenizer: Any, text: str, ids: list[int], cuts: Sequence[int]) -> list[int]:
    """Where a tokenised text is cut, in tokens; a token that reaches over a cut goes to what follows.

    Args:
        tokenizer: of the model.
        text: a text that a chat template rendered.
        ids: its token ids.
        cuts: places in characters.

    Returns:
        One place in ``ids`` a cut.
    """
    heads = tokenised(tokenizer, [text[:cut] for cut in cuts], special=False)
    return [
        next((place for place, (a, b) in enumerate(zip(head, ids, strict=False)) if a != b), len(head))
        for head in heads
    ]
