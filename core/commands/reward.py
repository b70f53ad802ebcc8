"""``rlx reward``: try a reward on texts, before a run depends on it, and serve it to others over HTTP."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlx.core.errors import ConfigError
from rlx.core.plain import Plain
from rlx.core.servers import fits_header
from rlx.core.text import safe_text

if TYPE_CHECKING:
    from rlx.core.components import Component

TOKEN = "RLX_REWARD_TOKEN"

app = typer.Typer(add_completion=False, rich_markup_mode=None, help="Try a reward, or serve it.")


@app.callback()
def reward() -> None:
    """Try a reward, or serve it."""


Ref = Annotated[
    str, typer.Argument(metavar="REWARD", help="a name, module:Attribute, ./file.py:Attribute or URL")
]
Options = Annotated[
    list[str] | None, typer.Option(metavar="NAME=VALUE", help="an option of the reward, may be repeated")
]


@app.command("try")
def try_reward(
    ref: Ref,
    prompt: Annotated[str | None, typer.Option(help="the prompt")] = None,
    completion: Annotated[list[str] | None, typer.Option(help="a completion, may be repeated")] = None,
    folder: Annotated[
        Path | None, typer.Option("--from", metavar="RUN_DIR", help="score the completions of a run instead")
    ] = None,
    columns: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="a data-set column, may be repeated")
    ] = None,
    option: Options = None,
    tokenizer: Annotated[str, typer.Option(help="whose tokens are counted")] = "tiny",
) -> None:
    """Score completions of a prompt, or those that a run kept, with a reward."""
    chosen, given = choose(ref, option), pairs("--columns", columns)
    if folder is not None and prompt is None and not completion:
        show_rescored(chosen, folder, given)
        return
    if folder is not None or prompt is None or not completion:
        raise ConfigError(
            "what is to be scored?",
            code="E-CONFIG-FLAG",
            expected="--prompt TEXT and --completion TEXT, or --from RUN_DIR alone",
        )
    scores = score(chosen, prompt, completion, given, tokenizer)
    for text, value in zip(completion, scores, strict=True):
        print(f"{_number(value):>10}  {safe_text(text, 100)}")


@app.command()
def serve(
    ref: Ref,
    host: Annotated[
        str, typer.Option(help="address to listen at; others than this machine's need a token")
    ] = ("127.0.0.1"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 8000,
    option: Options = None,
    token_env: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"environment variable with the token that clients must show [default: {TOKEN}, if set]",
        ),
    ] = None,
    calls: Annotated[int, typer.Option(min=1, help="calls of the reward at a time")] = 1,
    max_items: Annotated[int, typer.Option(min=1, help="completions of one request")] = 1024,
    max_bytes: Annotated[int, typer.Option(min=1, help="size of one request")] = 16 * 2**20,
    label_column: Annotated[str, typer.Option(help="column that OpenRLHF's labels become")] = "answer",
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="a name, beside localhost, by which clients may call a server without a token",
        ),
    ] = None,
) -> None:
    """Answer requests for scores over HTTP, in three dialects, until Ctrl-C."""
    from rlx.core.reward_requests import Served
    from rlx.core.reward_server import Limits, RewardServer, called_name

    chosen = choose(ref, option)
    served = Served(chosen.name, chosen.make())
    token = read_token(token_env)
    for name in allow_host or []:
        if not re.fullmatch(r"[^\s/@:\[\]]+(:[0-9]*)?|\[?[0-9a-fA-F:.]+\]?(:[0-9]*)?", name):
            raise ConfigError(
                "not the name of a host", where="--allow-host", got=name, expected="a name such as box.lan"
            )
    hosts = frozenset(name for name in map(called_name, allow_host or []) if name is not None)
    limits = Limits(body=max_bytes, items=max_items, calls=calls, hosts=hosts)
    server = RewardServer((host, port), served, token=token, limits=limits, label_column=label_column)
    needs = "; clients must show the token" if token else ""
    print(f"reward {safe_text(chosen.name, 80)} at {server.url}{needs}; Ctrl-C ends it", flush=True)
    server.serve()


def read_token(name: str | None) -> str:
    """The token that clients of a server must show, empty for none.

    Args:
        name: environment variable that must hold one; None for the default one, which need not be set.

    Raises:
        ConfigError: the variable that was named holds none, or one that no header can carry.
    """
    token = os.environ.get(TOKEN if name is None else name, "").strip()
    if (token or name is not None) and not fits_header(token):
        raise ConfigError(
            "the token has characters that no header takes" if token else "there is no token",
            code="E-CONFIG-TOKEN",
            where=f"environment variable {safe_text(name or TOKEN, 80)}",
            expected="printable ASCII without blanks",
        )
    return token


def choose(ref: str, words: list[str] | None) -> Component:
    """A reward as the command line names it.

    Args:
        ref: a reference.
        words: its options, ``name=value``.

    Raises:
        RlxError: an unknown reward, an option that it does not have.
    """
    from rlx.core.components import check_spec, read_specs

    given = {"name": ref, **{name: Plain(value) for name, value in pairs("--option", words).items()}}
    specs, problems = read_specs("reward", given, "reward", {"reward": "REWARD"})
    if problems:
        raise problems[0]
    return check_spec(specs[0])


def show_rescored(component: Component, folder: Path, columns: dict[str, str]) -> None:
    """Print the completions of a run with the score that they had and the one that they get.

    Args:
        component: the reward.
        folder: the run's.
        columns: data-set column → its value, the same for every completion.

    Raises:
        RlxError: there is nothing to score, or the reward fails.
    """
    from rlx.core.rescore import rescore

    rows = rescore(component, folder, columns)
    print(f"{'step':>6} {'old':>10} {'new':>10}")
    for row in rows:
        mark = "*" if row.changed else " "
        shown = f"{'eval: ' if row.held_out else ''}{safe_text(row.completion, 100)}"
        print(f"{row.step:>6} {_number(row.old):>10} {_number(row.new):>10} {mark} {shown}")
    told = []
    for name, scores in (("old", [row.old for row in rows]), ("new", [row.new for row in rows])):
        there = [value for value in scores if value is not None]
        told.append(f"{name} mean {_number(math.fsum(there) / len(there) if there else None)}")
        told.append(f"{len(scores) - len(there)} without" if len(there) < len(scores) else "")
    changed = sum(row.changed for row in rows)
    print(f"{len(rows)} completions: {', '.join(filter(None, told))}; {changed} differ (*)")


def _number(value: float | None) -> str:
    return "none" if value is None or math.isnan(value) else f"{value:.6g}"


def pairs(flag: str, words: list[str] | None) -> dict[str, str]:
    """``name=value`` words as a dict.

    Args:
        flag: that they were given with, for messages.
        words: as typed, None for none.

    Raises:
        ConfigError: a word without a name or a value.
    """
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
    for text in (prompt, *completions):
        if any("\ud800" <= char <= "\udfff" for char in text):  # how Python hands on bytes that are no UTF-8
            raise ConfigError("a text is not UTF-8", code="E-CONFIG-VALUE", got=safe_text(text, 80))
    encoder = load_tokenizer(Settings(model=tokenizer))
    ids = [encoder(text, add_special_tokens=False)["input_ids"] for text in [prompt, *completions]]
    prompts = Prompts(ids[:1], [prompt], [None], {name: [value] for name, value in columns.items()}, [0])
    try:
        scored = runner.score(prompts.take([0] * len(completions)), completions, ids[1:])
    finally:
        runner.close()
    return [float(value) for value in scored.rewards[component.name]]
