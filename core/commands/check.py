"""``rlx check``, as typer sees it; its words are read by ``rlx.core.commands.train``."""

from __future__ import annotations

import typer

from rlx.core.commands.train import train_or_check

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
def check(ctx: typer.Context) -> None:
    """Check everything that rlx run would check before it loads weights."""
    train_or_check(ctx.args, dry_run=True)
