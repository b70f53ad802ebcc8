"""``rlx compare``: which of two sides answers better, by a reward or a judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlx.core.commands.reward import pairs
from rlx.core.errors import ConfigError
from rlx.core.plain import Plain
from rlx.core.text import safe_text

if TYPE_CHECKING:
    from rlx.core.contest import Outcome

app = typer.Typer(add_completion=False, rich_markup_mode=None)


A = Annotated[
    str, typer.Argument(metavar="A", help="a run folder, a checkpoint, a model, or a file of completions")
]
B = Annotated[str, typer.Argument(metavar="B", help="what A is compared with")]
Rewards = Annotated[
    list[str] | None,
    typer.Option(help="the higher reward wins: a name or reference; several, repeated, are added"),
]
JudgeName = Annotated[
    str | None, typer.Option(help="a judge: a name, module:Attribute or ./file.py:Attribute")
]
JudgeOptions = Annotated[
    list[str] | None, typer.Option(metavar="NAME=VALUE", help="an option of the judge, may be repeated")
]
Dataset = Annotated[
    str | None,
    typer.Option(help="prompts: a file, folder, hub id or registered name (default: those of the run)"),
]
Longest = Annotated[
    int | None, typer.Option(min=1, help="longest completion, in tokens (default: that of the run)")
]
Temperature = Annotated[
    float | None, typer.Option(help="of sampling, greater than 0 (default: that of the run)")
]
Tokenizer = Annotated[
    str | None, typer.Option(help="whose tokens are counted in a file (default: that of the other side)")
]


@app.command()
def compare(
    a: A,
    b: B,
    reward: Rewards = None,
    judge: JudgeName = None,
    option: JudgeOptions = None,
    dataset: Dataset = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="prompts at most, from the first")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="seed of the samples and of the order of each pair")] = 0,
    max_completion_length: Longest = None,
    temperature: Temperature = None,
    tokenizer: Tokenizer = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="write every pair and its verdict")
    ] = None,
    examples: Annotated[int, typer.Option(min=0, help="decided pairs to show")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Let two policies answer the same prompts, and count whose answers are better."""
    from rlx.core.components import choose_judge

    options = {name: Plain(value) for name, value in pairs("--option", option).items()}
    component = choose_judge(judge, reward or [], options)
    sampling = {
        "eval_dataset": dataset,
        "max_completion_length": max_completion_length,
        "temperature": temperature,
    }
    given = {name: value for name, value in sampling.items() if value is not None} | {"seed": seed}
    if output is not None and (output.exists() or not output.parent.is_dir()):
        raise ConfigError(
            f"{safe_text(output)} {'exists already' if output.exists() else 'would lie in no folder'}",
            code="E-CONFIG-OUTPUT",
            hint="choose another --output",
        )
    from rlx.core.contest import play
    from rlx.core.judging import JudgeRunner
    from rlx.core.peers import connect

    runner = JudgeRunner(component.name, component.make(), seed)
    try:
        outcome = play((a, b), runner, given, connect(), num_prompts=num_prompts, tokenizer=tokenizer)
    finally:
        runner.close()
    if output is not None:
        write(output, outcome)
    if as_json:
        print(json.dumps(summary(a, b, outcome), indent=2))
        return
    print("\n".join(table(a, b, component.name, outcome) + shown(outcome, examples)))


def summary(a: str, b: str, outcome: Outcome) -> dict[str, Any]:
    """The numbers, as JSON values."""
    tally = outcome.tally
    sides = {
        side: {
            "name": name,
            "length": sum(map(len, answers.ids)) / max(1, len(answers.ids)),
            "finished": sum(answers.finished) / max(1, len(answers.finished)) if answers.finished else None,
        }
        for side, name, answers in zip("ab", (a, b), outcome.answers, strict=True)
    }
    return {
        "win_rate": tally.rate,
        "low": tally.interval[0],
        "high": tally.interval[1],
        "pairs": tally.total,
        "wins": tally.wins,
        "losses": tally.losses,
        "ties": tally.ties,
        "no_verdict": tally.no_verdict,
        **sides,
    }


def table(a: str, b: str, judge: str, outcome: Outcome) -> list[str]:
    """The numbers, in lines."""
    found = summary(a, b, outcome)
    lines = [f"{found['pairs']} prompts, judge {safe_text(judge, 80)}"]
    for side in "ab":
        facts = found[side]
        ended = "" if facts["finished"] is None else f", {facts['finished']:.0%} finished"
        name = safe_text(facts["name"], 60)
        lines.append(f"  {side.upper()}  {name:<40}  {facts['length']:.1f} tokens on average{ended}")
    decided = outcome.tally.decided
    lines.append(
        f"A wins {found['win_rate']:.3f} of {decided} decided pairs"
        f" (95 % interval {found['low']:.3f} to {found['high']:.3f})"
        if decided
        else "no pair was decided"
    )
    lines.append(
        f"  A better {found['wins']}   B better {found['losses']}   equal texts {found['ties']}"
        f"   no verdict {found['no_verdict']}"
    )
    return lines


def shown(outcome: Outcome, count: int) -> list[str]:
    """Decided pairs in words, those that each side won in turn."""
    won = [[i for i, verdict in enumerate(outcome.verdicts) if verdict == side] for side in (0, 1)]
    most = max(map(len, won))
    turns = [i for place in range(most) for side in won for i in side[place : place + 1]]
    one, other = outcome.answers
    lines = []
    for i in turns[:count]:
        winner = "AB"[outcome.verdicts[i] or 0]
        lines += ["", f"{winner} better: {safe_text(one.prompts.texts[i], 300)}"]
        lines += [
            f"  {side}: {safe_text(text[i], 300)}" for side, text in (("A", one.texts), ("B", other.texts))
        ]
    return lines


def write(path: Path, outcome: Outcome) -> None:
    """Every pair with its verdict, one JSON object a line.

    Raises:
        SaveError: it could not be written.
    """
    from rlx.core.files import JsonLines

    one, other = outcome.answers
    file = JsonLines(path)
    for i, verdict in enumerate(outcome.verdicts):
        file.append({
            "row": one.prompts.rows[i],
            "prompt": one.prompts.texts[i],
            "a": one.texts[i],
            "b": other.texts[i],
            "better": None if verdict is None else "ab"[verdict],
        })  # fmt: skip
    file.close()
