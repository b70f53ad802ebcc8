"""``rlx check``: everything that ``rlx run`` would check before it loads weights."""

from __future__ import annotations

import typer

from rlx.core.commands.run import Words, train_or_check

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(cls=Words)
def check(ctx: typer.Context) -> None:
    """Check a config, its data and rewards, and print the plan."""
    train_or_check(ctx.args, dry_run=True)
