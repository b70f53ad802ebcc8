"""The model card of a run folder, as Hugging Face reads it: front matter and a page of Markdown.

Numbers come from the log lines; text from outside is made harmless and kept inside code spans.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlx.core.manifest import command_line, versions
from rlx.core.samples import without_rows
from rlx.core.settings import EMBEDDED
from rlx.core.text import redact, safe_text

SHOWN = ("reward", "loss", "rewards/accuracies", "rewards/margins", "completion/length")
LIBRARIES = ("rlx", "torch", "transformers", "peft", "python")


def model_card(run: Any) -> str:
    """The README.md of a finished run.

    Args:
        run: its ``config``, ``folder``, ``metrics_history``, ``global_step`` and ``policy`` are read.
    """
    settings, history = run.config.settings, run.metrics_history
    adapter = hasattr(run.policy.model, "peft_config")  # peft's own mark of a model with adapters
    base, data = code(settings.model), code(without_rows({"dataset": settings.dataset})["dataset"])
    parts = [
        front_matter(settings, adapter=adapter),
        f"# {safe_text(run.folder.path.name, 100)}",
        f"{'An adapter for' if adapter else 'A policy trained from'} {base} with"
        f" **{safe_text(settings.algo, 60).upper()}** on {data}, by rlx.",
        *chosen(run.final_checkpoint),
        "## Results",
        results(history, run.global_step),
        "## Use",
        usage(run.folder.path.name, settings.model, adapter=adapter),
        "## Training",
        options_table(run.config),
        "## Reproduce",
        f"```bash\n{reproduce()}\n```",
        "`config.yaml` holds every option, `manifest.json` versions, plugins, hardware and the data's"
        " fingerprint, `metrics.jsonl` the log.",
        "Versions: " + ", ".join(f"{n} {v}" for n, v in versions().items() if n in LIBRARIES) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def chosen(checkpoint: Path | None) -> list[str]:
    """A sentence for a policy that is not that of the last step; nothing for any other."""
    if checkpoint is None:
        return []
    return [f"The policy is that of {code(checkpoint.name)}, the best one; the results are of the whole run."]


def front_matter(settings: Any, *, adapter: bool) -> str:
    """The YAML header that the hub reads."""
    lines = [
        "---",
        f"base_model: {json.dumps(safe_text(settings.model))}",
        f"library_name: {'peft' if adapter else 'transformers'}",
        "pipeline_tag: text-generation",
        f"tags: {json.dumps(['rlx', safe_text(settings.algo, 60)])}",
        "---",
    ]
    return "\n".join(lines)


def results(history: Sequence[Mapping[str, float]], steps: int) -> str:
    """A table of the metrics before and after; held-out numbers where there are any."""
    rows = []
    for name in SHOWN:
        for metric in (f"eval/{name}", name):
            values = [line[metric] for line in history if metric in line]
            if values:
                before = f"{values[0]:.4g}" if len(values) > 1 else ""
                rows.append(f"| `{metric}` | {before} | {values[-1]:.4g} |")
    if not rows:
        return f"{steps} steps; nothing was logged."
    head = f"{steps} steps. `eval/` is measured on held-out data."
    table = "\n".join(["| metric | first | last |", "|---|---:|---:|", *rows])
    return f"{head}\n\n{table}"


def usage(name: str, base: str, *, adapter: bool) -> str:
    """How to load the policy from its folder."""
    folder = json.dumps(safe_text(name, 100))
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    if adapter:
        embedded = base == EMBEDDED  # no name that transformers knows
        if embedded:
            lines.append("from rlx.plugins.datasets import tiny_path")
        where = "tiny_path()" if embedded else json.dumps(safe_text(base))
        lines += [
            "from peft import PeftModel",
            "",
            f"base = AutoModelForCausalLM.from_pretrained({where})",
            f"model = PeftModel.from_pretrained(base, {folder})",
        ]
    else:
        lines += ["", f"model = AutoModelForCausalLM.from_pretrained({folder})"]
    lines += [f"tokenizer = AutoTokenizer.from_pretrained({folder})"]
    return "```python\n" + "\n".join(lines) + "\n```"


def options_table(config: Any) -> str:
    """The options that somebody set, or an algorithm or recipe, with where they came from."""
    values = redact(without_rows(config.to_mapping()))
    rows = [
        f"| `{name}` | {code(values[name])} | {safe_text(source, 80)} |"
        for name, source in config.sources.items()
        if source != "default" and name in values
    ]
    if not rows:
        return "All options are at their defaults."
    return "\n".join(["| option | value | from |", "|---|---|---|", *rows])


def reproduce() -> str:
    """The command line, shown on one line."""
    import sys

    return safe_text(command_line(sys.argv), 2000)


def code(value: Any) -> str:
    """Any value as a code span in a Markdown table."""
    text = safe_text(value, 120).replace("`", "'").replace("|", r"\|")
    return f"`{text}`"
