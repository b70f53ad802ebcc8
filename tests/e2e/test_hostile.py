"""Hostile text through every place that shows or writes completions, prompts and data: it stays inert.

Inert: no character that acts on a terminal, and as many lines as harmless text makes in its place.
"""

from __future__ import annotations

import itertools
import json
import logging
import unicodedata
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import rlx
from rlx.callbacks.completions import LogCompletions
from rlx.callbacks.health import CHECKS, Health
from rlx.callbacks.model_card import ModelCard
from rlx.callbacks.rich_progress import plain_line
from rlx.callbacks.trackers import Trackers
from rlx.core.batch import Prompts, Rollouts, Sequences
from rlx.core.commands.failure import told
from rlx.core.commands.main import main
from rlx.core.config import from_mapping
from rlx.core.data import check_data
from rlx.core.folder import RunFolder
from rlx.core.parts import Parts
from rlx.core.scoring import NamedReward, RewardRunner
from rlx.core.settings import Settings
from rlx.plugins.events import Events

BENIGN = "a harmless text"
LONGEST = 20_000  # characters; files keep text whole
OPTIONS = {"reward": "length", "log_completions": -1, "report_to": ["tensorboard"], "track_completions": True}
FILES = ("completions", "metrics", "manifest")
ACTS = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def acting(shown: str) -> list[str]:
    """The characters of a text that act on a terminal."""
    return sorted({char for char in shown if char not in "\t\n" and unicodedata.category(char) in ACTS})


def prompts_of(text: str) -> Prompts:
    return Prompts([[1]], [text], [None], {"answer": [text]}, [0])


def errors_of(work: Callable[[], Any]) -> str:
    """An error as a terminal shows it and as Python does."""
    with pytest.raises(rlx.RlxError) as caught:
        work()
    return "\n".join(told(caught.value)[0]) + "\n" + str(caught.value)


def data(rows: Any, **options: Any) -> list[str]:
    """The report on rows."""
    from rlx.core.models import load_tokenizer

    settings = Settings(dataset=rows, max_completion_length=64, **options)
    eats = "labeled" if options.get("algo") == "kto" else "prompts"
    found, _ = check_data(
        settings, load_tokenizer(Settings()), [], eats=eats, columns_needed={}, max_positions=256
    )
    return found.report


class Places:
    """What each place shows of a text: a method a place."""

    def __init__(self, folder: Path, capsys: Any, caplog: Any) -> None:
        self.folder, self.capsys, self.caplog, self.count = folder, capsys, caplog, itertools.count()
        self.config = from_mapping(OPTIONS)

    def fresh(self) -> Path:
        """A path where nothing is."""
        return self.folder / f"place-{next(self.count)}"

    def run_with(self, text: str, **options: Any) -> Any:
        """A run in whose data, completions and metrics the text stands."""
        sources = {**self.config.sources, **dict.fromkeys(options, "--flag")}
        config = replace(self.config, settings=replace(self.config.settings, **options), sources=sources)
        folder = RunFolder.create(self.fresh())
        score = torch.tensor([1.0])
        rollouts = Rollouts(
            Sequences.from_lists([[1]], [[3]]), prompts=prompts_of(text), texts=[text],
            finished=torch.tensor([True]), score=score, rewards={"length": score},
        )  # fmt: skip
        said: list[str] = []
        run = SimpleNamespace(
            config=config, folder=folder, path=folder.path, is_main=True, rollouts=rollouts, evaluated=None,
            global_step=1, total_steps=2, metrics_history=[{"step": 1, "reward": 1.0, text: 1.0}], said=said,
            policy=SimpleNamespace(model=object()), printers=[said.append], final_checkpoint=None,
        )  # fmt: skip
        run.say = lambda line: Parts.say(run, line)
        return run

    def completions(self, text: str) -> str:
        run = self.run_with(text)
        LogCompletions(None).on_log(run, {"step": 1, "reward": 1.0})
        written = (run.path / "completions.jsonl").read_bytes().decode()
        [line] = written.splitlines()  # one for every reader of lines
        assert json.loads(line)["completion"] == json.loads(line)["prompt"] == text
        return written

    def metrics(self, text: str) -> str:
        run = self.run_with(text)
        run.folder.log_metrics({"step": 1, f"reward/{text}": 1.0})
        return (run.path / "metrics.jsonl").read_bytes().decode()

    def plain(self, text: str) -> str:
        run = self.run_with(text)
        line = {"step": 1, "reward": 1.0, text: 1.0}
        return plain_line(run, line, 1.0, 0)

    def said(self, text: str) -> str:
        run = self.run_with(text)
        run.say(f"hint: {text}".replace("\n", " "))
        return "\n".join(run.said)

    def health(self, text: str) -> str:
        run, watching = self.run_with(text), Health(None)
        sick = {"step": 1, "completion/eos_rate": 0.0, "reward": 1.0, text: 1.0}
        for _ in range(CHECKS["no_stop"].lines):
            watching.on_log(run, sick)
        assert len(run.said) == 1
        return run.said[0]

    def card(self, text: str) -> str:
        options = {"model": text, "dataset": text, "system_prompt": text, "chat_template": text}
        run = self.run_with(text, **{name: value or "x" for name, value in options.items()})
        ModelCard(None).on_save(run, run.path)
        return (run.path / "README.md").read_text()

    def manifest(self, text: str) -> str:
        run = self.run_with(text)
        return run.folder.write_json("manifest.json", {"command": text, text: [text]}).read_text()

    def tracked(self, text: str) -> str:
        run, sent = self.run_with(text), []
        tracker = SimpleNamespace(
            name="tensorboard", log=lambda values, step: sent.append(values["completions"])
        )
        run.accelerator = SimpleNamespace(trackers=[tracker], log=lambda values, step: None)
        Trackers(None).on_log(run, {"step": 1, "reward": 1.0})
        return sent[0]

    def reward_error(self, text: str) -> str:
        def failing(completions, answer):
            raise ValueError(f"cannot score {completions[0]} with {answer[0]}")

        return errors_of(
            lambda: RewardRunner([NamedReward("mine", failing)]).score(prompts_of(text), [text], [[1]])
        )

    def reward_value(self, text: str) -> str:
        runner = RewardRunner([NamedReward("mine", lambda completions: [text])])
        return errors_of(lambda: runner.score(prompts_of(text), [text], [[1]]))

    def reward_warning(self, text: str) -> str:
        def failing(completions):
            raise ValueError(completions[0])

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            RewardRunner([NamedReward("mine", failing)], "none").score(prompts_of(text), [text], [[1]])
        return str(caught[0].message)

    def reward_try(self, text: str) -> str:
        words = [
            "reward",
            "try",
            "contains",
            "--prompt",
            text,
            "--completion",
            text,
            "--option",
            "keywords=x",
        ]
        assert main(words) == (2 if "\ud800" in text else 0)
        shown = self.capsys.readouterr()
        return shown.out or shown.err.partition("\n")[0] + "\n"

    def compare(self, text: str) -> str:
        text, folder = text.replace("\ud800", ""), self.fresh()
        folder.mkdir()
        for side, answer in (("a", text), ("b", f"longer {text}")):
            line = {"prompt": f"p {text}", "completion": answer}
            (folder / f"{side}.jsonl").write_text(json.dumps(line) + "\n")
        code = "def second(completions):\n    return [float(text[:6] == 'longer') for text in completions]\n"
        (folder / "better.py").write_text(code)
        sides = [str(folder / f"{side}.jsonl") for side in "ab"]
        reward = f"{folder / 'better.py'}:second"
        assert main(["compare", *sides, "--reward", reward, "--tokenizer", "tiny"]) == 0
        return self.capsys.readouterr().out

    def show(self, text: str) -> str:
        text = text.replace("\ud800", "") or "x"  # YAML cannot hold it
        run = self.run_with(text, model=text, dataset=text)
        (run.path / "config.yaml").write_text(run.config.to_yaml())
        run.folder.log_metrics({"step": 1, "reward": 1.0, "loss": text})
        (run.path / "checkpoint-1").mkdir()
        (run.path / "checkpoint-1" / "manifest.json").write_text(json.dumps({"schema": text}))
        run.folder.close()
        assert main(["show", str(run.path)]) == 0
        return self.capsys.readouterr().out

    def role(self, text: str) -> str:
        return errors_of(lambda: data([{"prompt": [{"role": text, "content": "x"}]}]))

    def column(self, text: str) -> str:
        return errors_of(lambda: data([{text or "x": "x"}]))

    def label(self, text: str) -> str:
        return errors_of(lambda: data([{"prompt": "x", "completion": "y", "label": text or "x"}], algo="kto"))

    def template(self, text: str) -> str:
        jinja = "{{ raise_exception('no: ' + messages[0]['content']) }}"
        return errors_of(
            lambda: data(
                [{"prompt": f"x{text}".replace("\0", "").replace("\ud800", "")}], chat_template=jinja
            )
        )

    def repeated(self, text: str) -> str:
        prompt = f"x{text}"[:150].replace("\0", "").replace("\ud800", "")
        return "\n".join(data([{"prompt": prompt}] * 2))

    def file_name(self, text: str) -> str:
        name = text[:40].replace("\0", "").replace("/", "").replace("\ud800", "") or "x"
        file = self.folder / f"{name}.jsonl"
        file.write_text('{"prompt": "x"}\n{"prompt": ""}\n')
        shown = "\n".join(data(str(file), on_bad_row="drop", max_bad_rows=1.0))
        return shown + errors_of(lambda: data(str(file)))

    def row_of_a_file(self, text: str) -> str:
        file = self.fresh().with_suffix(".jsonl")
        file.write_bytes(f'{{"prompt": {text}\n'.encode(errors="surrogatepass"))
        return errors_of(lambda: data(str(file)))

    def observer(self, text: str) -> str:
        class Watching:
            observer = True

            @rlx.hookimpl
            def on_step_end(self):
                raise ValueError(text)

        self.caplog.clear()
        events = Events()
        events.add(Watching(), "watching")
        with self.caplog.at_level(logging.WARNING):
            events.emit("on_step_end", run=SimpleNamespace(global_step=1), metrics={})
        return self.caplog.records[0].getMessage() + "\n" + events.disabled["watching"]

    def unexpected(self, text: str) -> str:
        return "\n".join(told(ValueError(text))[0])


PLACES = [name for name in vars(Places) if name not in ("__init__", "fresh", "run_with") and name[0] != "_"]


@pytest.mark.parametrize("place", PLACES, ids=[f"fault[G13]-{place}" for place in PLACES])
def test_no_text_acts_where_it_is_shown(place, hostile, tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.setattr("sys.argv", ["rlx", "run"])
    show = getattr(Places(tmp_path, capsys, caplog), place)
    lines, leaks = show(BENIGN).count("\n"), {}
    for name, text in hostile.items():
        shown = show(text)
        if acting(shown) or shown.count("\n") != lines or (len(shown) > LONGEST and place not in FILES):
            leaks[name] = (acting(shown), shown.count("\n") - lines, len(shown), shown[:300])
    assert leaks == {}
