"""The tokenizer: loaded, given a pad token, and compared with the model that it feeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlx.core.errors import ConfigError
from rlx.core.pretrained import Source, check_code, translated
from rlx.core.settings import Settings
from rlx.core.text import safe_text

# Tokens that models reserve for padding without declaring them, most telling first.
PAD_LIKE = (
    "<pad>",
    "[PAD]",
    "<|pad|>",
    "<|padding|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_0|>",
)


def load_tokenizer(
    settings: Settings, *, stop_token_ids: Sequence[int] = (), report: list[str] | None = None
) -> Any:
    """The policy's tokenizer, with a pad token.

    A missing pad token is chosen among the tokens that exist, so that nothing is resized: one reserved for
    padding (``PAD_LIKE``), else the unknown token, else EOS. Masks come from lengths, so EOS as pad costs
    nothing.

    Args:
        settings: model, tokenizer, model_revision, trust_remote_code, stop_strings.
        stop_token_ids: tokens that the algorithm ends completions with.
        report: gets a line for each decision.

    Raises:
        ConfigError: not to be found, code without consent, no EOS and nothing else that ends a completion.
    """
    from transformers import AutoTokenizer

    source = Source.of(
        settings.tokenizer or settings.model,
        role="tokenizer" if settings.tokenizer else "model",
        revision=None if settings.tokenizer else settings.model_revision,
        trust_remote_code=settings.trust_remote_code,
    )
    source.check_exists()
    if source.folder is not None:
        check_code(source, source.folder / "tokenizer_config.json")
        check_code(source, source.folder / "config.json")
    with translated(source):
        tokenizer = AutoTokenizer.from_pretrained(source.name, **source.arguments)
    return ready_tokenizer(tokenizer, can_stop=bool(settings.stop_strings or stop_token_ids), report=report)


def ready_tokenizer(tokenizer: Any, *, can_stop: bool = False, report: list[str] | None = None) -> Any:
    """A tokenizer with a pad token, after checking that completions can end.

    Args:
        tokenizer: gets a pad token where it has none.
        can_stop: something other than EOS ends a completion.
        report: gets a line for each decision.

    Raises:
        ConfigError: no EOS token and nothing else that ends a completion.
    """
    lines = report if report is not None else []
    if tokenizer.eos_token_id is None and not can_stop:
        raise ConfigError(
            "the tokenizer has no end-of-sequence token, so completions could not end",
            code="E-TOKENIZER-EOS",
            where=safe_text(tokenizer.name_or_path, 120),
            hint="set eos_token in tokenizer_config.json, or give --stop-strings or --stop-token-id",
        )
    if tokenizer.pad_token_id is None:
        vocabulary = tokenizer.get_vocab()
        found = [token for token in PAD_LIKE if token in vocabulary]
        chosen = next(
            (token for token in (*found, tokenizer.unk_token, tokenizer.eos_token) if token is not None), None
        )
        if chosen is None:
            chosen = tokenizer.convert_ids_to_tokens(0)  # any token does: padding is masked by length
        tokenizer.pad_token = chosen
        lines.append(
            f"pad token: {safe_text(chosen, 40)} ({tokenizer.pad_token_id}), chosen: the tokenizer has none"
        )
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        lines.append(
            "pad token is the EOS token: EOS is trained and scored all the same, masks come from lengths"
        )
    return tokenizer


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Every token that the tokenizer can produce has a row in the embedding.

    Raises:
        ConfigError: naming the token with the highest number.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])
    token, number = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if number >= rows:
        raise ConfigError(
            "the tokenizer knows tokens that the model does not",
            code="E-TOKENIZER-VOCABULARY",
            got=f"token {safe_text(token, 40)!r} id {number} ≥ {rows}",
            expected=f"ids below {rows}, the rows of the model's embedding",
            hint="use the tokenizer that came with the model, or resize and train its embedding first",
        )


def stop_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """End-of-sequence tokens of the tokenizer and of the model's generation config, sorted."""
    declared = model.generation_config.eos_token_id if model.can_generate() else None
    several = declared if isinstance(declared, list | tuple) else [declared]
    return tuple(sorted({int(i) for i in (tokenizer.eos_token_id, *several) if i is not None}))
