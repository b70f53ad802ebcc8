"""``rlx reward try``: what a reward says of a text, before a run depends on it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer

from rlx.core.errors import ConfigError
from rlx.core.plain import Plain
from rlx.core.text import safe_text

if TYPE_CHECKING:
    from rlx.core.components import Component

app = typer.Typer(add_completion=False, rich_markup_mode=None, help="Try a reward on a text.")


@app.callback()
def reward() -> None:
    """Try a reward on a text."""


@app.command("try")
def try_reward(
    ref: Annotated[
        str, typer.Argument(metavar="REWARD", help="a name, module:Attribute or ./file.py:Attribute")
    ],
    prompt: Annotated[str, typer.Option(help="the prompt")],
    completion: Annotated[list[str], typer.Option(help="a completion, may be repeated")],
    columns: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="a data-set column, may be repeated")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="an option of the reward, may be repeated")
    ] = None,
    tokenizer: Annotated[str, typer.Option(help="whose tokens are counted")] = "tiny",
) -> None:
    """Score completions of a prompt with a reward."""
    from rlx.core.components import check_spec, read_specs

    given = {"name": ref, **{name: Plain(value) for name, value in _pairs("--option", option).items()}}
    specs, problems = read_specs("reward", given, "reward", {"reward": "REWARD"})
    if problems:
        raise problems[0]
    scores = score(check_spec(specs[0]), prompt, completion, _pairs("--columns", columns), tokenizer)
    for text, value in zip(completion, scores, strict=True):
        print(f"{'none' if math.isnan(value) else f'{value:.6g}':>10}  {safe_text(text, 100)}")


def _pairs(flag: str, words: list[str] | None) -> dict[str, str]:
    out = {}
    for word in words or []:
        name, sign, value = word.partition("=")
        if not sign or not name:
            raise ConfigError(
                f"{flag} {safe_text(word, 80)}: no value", code="E-CONFIG-FLAG", hint=f"{flag} name=value"
            )
        out[name] = value
    return out


def score(
    component: Component, prompt: str, completions: list[str], columns: dict[str, str], tokenizer: str
) -> list[float]:
    """Scores as a run would get them.

    Args:
        component: the reward.
        prompt: one prompt for all completions.
        completions: what is scored.
        columns: data-set column → its value, the same for every completion.
        tokenizer: folder, hub id, or ``tiny``.

    Returns:
        One score a completion; a reward of single tokens summed; NaN where the reward does not apply.

    Raises:
        RlxError: the reward fails, or needs a column that is not given.
    """
    from rlx.core.batch import Prompts
    from rlx.core.scoring import NamedReward, RewardRunner
    from rlx.core.settings import Settings
    from rlx.core.tokenizer import load_tokenizer

    runner = RewardRunner([NamedReward(component.name, component.make())])
    missing = [name for names in runner.columns_needed.values() for name in names if name not in columns]
    if missing:
        raise ConfigError(
            f"reward {component.name} needs the columns {', '.join(missing)}",
            code="E-CONFIG-MISSING",
            hint=" ".join(f"--columns {name}=…" for name in missing),
        )
    encoder = load_tokenizer(Settings(model=tokenizer))
    ids = [encoder(text, add_special_tokens=False)["input_ids"] for text in [prompt, *completions]]
    prompts = Prompts(ids[:1], [prompt], [None], {name: [value] for name, value in columns.items()}, [0])
    scored = runner.score(prompts.take([0] * len(completions)), completions, ids[1:])
    return [float(value) for value in scored.rewards[component.name]]
