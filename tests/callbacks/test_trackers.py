"""What goes to trackers, read back from the files of the real packages: numbers and options, no text."""

from __future__ import annotations

import json
import math
import shutil
import socket

import pytest

import rlx
from rlx.callbacks.completions import LogCompletions
from rlx.callbacks.trackers import Trackers, check_trackers, public
from rlx.core.errors import ConfigError

ROWS = [{"prompt": f"SECRET-PROMPT {n}", "answer": "7"} for n in range(4)]


@pytest.mark.parametrize("fault", [pytest.param("S16", id="fault[S16]")])
@pytest.mark.parametrize("asked", [False, True], ids=["default", "track_completions"])
def test_numbers_and_options_go_out_and_text_of_completions_if_asked(
    make_run, rollouts, monkeypatch, fault, asked
):
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

    calls = []

    class Fake(GeneralTracker):
        name, requires_logging_directory, tracker = "fake", False, None

        def store_init_configuration(self, values):
            calls.append(values)

        def log(self, values, step=None, **kwargs):
            calls.append({"at": step, **values})

        def finish(self):
            calls.append("finished")

    monkeypatch.setattr("accelerate.tracking.filter_trackers", lambda names, folder: [Fake()])
    monkeypatch.setattr("rlx.callbacks.trackers.check_trackers", lambda names, completions: None)
    run = make_run(report_to=["fake"], track_completions=asked, dataset=ROWS, system_prompt="SECRET-SYSTEM")
    run.accelerator, run.rollouts = (
        Accelerator(),
        rollouts(["SECRET-COMPLETION\n# x"], prompt="SECRET-PROMPT"),
    )
    trackers = Trackers(None)
    trackers.on_run_start(run)
    for callback in (trackers, LogCompletions(None)):
        callback.on_log(run, {"step": 3, "reward": 0.5, "kl": math.nan})
    trackers.on_run_end(run)
    sent = [
        "    eval: False\n    prompt: SECRET-PROMPT\n    completion: SECRET-COMPLETION\\n# x\n"
        "    score: 1.0\n    finished: True"
    ]
    assert calls[0]["learning_rate"] == run.config.settings.learning_rate
    assert (calls[0]["dataset"], calls[0]["system_prompt"]) == ("4 rows given in Python", "13 characters")
    assert calls[1:] == [
        {"at": 3, "reward": 0.5}, *({"at": 3, "completions": text} for text in sent if asked), "finished",
    ]  # fmt: skip
    assert "SECRET" not in repr(calls[0]) and ("SECRET" in repr(calls)) == asked
    assert "SECRET-COMPLETION" in (run.folder.path / "completions.jsonl").read_text()


def test_a_mixture_of_named_data_sets_is_an_option_and_secrets_are_none():
    mixture = [{"name": "wordmath", "fraction": 0.5}]
    shown = public({"dataset": mixture, "hub_token": "hf_abcdefghijklmnop", "seed": 3, "plots": True})
    assert shown == {"dataset": str(mixture), "hub_token": "<redacted>", "seed": 3, "plots": True}


@pytest.mark.parametrize(
    "options",
    [
        {"callback": [{"name": "win_rate", "dataset": [{"prompt": "SECRET"}] * 3}]},
        {"callback": [{"name": "win_rate", "dataset": {"train": [{"prompt": "SECRET"}]}}]},
        {"transform": [{"name": "chat_template", "system_prompt": "SECRET"}]},
        {"dataset": [{"prompt": "SECRET", "fraction": 0.5}]},
        {"eval_dataset": ({"prompt": "SECRET"},)},
        {"dataset": {"name": "my_pkg:Rows", "rows": [{"prompt": "SECRET"}]}},
    ],
)
def test_rows_and_system_prompts_stay_out_wherever_they_stand(options):
    from rlx.core.samples import without_rows

    assert "SECRET" not in repr(public(options))
    assert (
        "SECRET" not in repr(without_rows(options)) or "transform" in options
    )  # the card may tell the prompt
    assert "given in Python" in repr(public(options)) or "6 characters" in repr(public(options))


def test_nothing_is_tracked_by_default(make_run):
    run = make_run()  # has no accelerator: touching it would fail
    trackers = Trackers(None)
    trackers.on_run_start(run)
    trackers.on_log(run, {"step": 1})
    trackers.on_run_end(run)


def test_an_unknown_missing_or_unfit_tracker_is_a_config_error():
    with pytest.raises(ConfigError, match="did you mean 'tensorboard'"):
        check_trackers(["tensorbord"])
    from accelerate.tracking import get_available_trackers

    missing = [
        name
        for name in ("aim", "swanlab", "dvclive", "clearml")
        if name not in map(str, get_available_trackers())
    ]
    with pytest.raises(ConfigError, match="not installed"):
        check_trackers(missing[:1])


def test_completions_go_only_to_trackers_that_take_them(monkeypatch):
    with pytest.raises(ConfigError, match="report_to names no tracker"):
        rlx.run(reward="length", track_completions=True, dry_run=True)
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["mlflow", "wandb"])
    check_trackers(["mlflow", "wandb"])
    with pytest.raises(ConfigError, match="'mlflow' takes no completions"):
        check_trackers(["wandb", "mlflow"], completions=True)


def short(folder, tracker, **changes):
    """Options of a run of two short steps on rows given in Python."""
    return dict(
        reward="length", dataset=ROWS, batch_size=2, num_generations=1, num_ppo_epochs=1, num_mini_batches=1,
        max_completion_length=6, max_steps=2, logging_steps=1, plots=False, progress="none",
        report_to=[tracker], output_dir=str(folder), **changes,
    )  # fmt: skip


def scalars(folder):
    """Metric → [(step, value)] of all that tensorboard would show."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "trackers" / "rlx"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events, {
        tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def logged(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = {name for line in lines for name in line} - {"step"}
    return {name: [(line["step"], pytest.approx(line[name])) for line in lines] for name in names}


def everything(folder) -> bytes:
    return b"".join(path.read_bytes() for path in sorted((folder / "trackers").rglob("*")) if path.is_file())


@pytest.mark.parametrize("asked", [False, True], ids=["fault[S16]-default", "track_completions"])
def test_tensorboard_shows_what_was_logged(tmp_path, asked):
    result = rlx.run(**short(tmp_path / "run", "tensorboard", track_completions=asked))
    events, shown = scalars(result.folder)
    assert shown == logged(result.folder) and len(shown["loss"]) == 2
    samples = [sample["completion"] for sample in result.completions]
    assert len(samples) == 4 and (b"SECRET-PROMPT" in everything(result.folder)) == asked
    if asked:
        texts = [
            tensor.tensor_proto.string_val[0].decode()
            for tensor in events.Tensors("completions/text_summary")
        ]
        assert [text.count("SECRET-PROMPT") for text in texts] == [2, 2]


def test_a_resumed_run_shows_each_step_once_in_tensorboard(tmp_path):
    run = rlx.prepare(**{**short(tmp_path / "run", "tensorboard"), "max_steps": 4})
    with pytest.raises(KeyError), run:
        run.step()
        run.save()
        run.step()
        raise KeyError
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")  # as if lost with the process
    rlx.resume(tmp_path / "run")
    shown = scalars(tmp_path / "run")[1]
    assert [step for step, _ in shown["loss"]] == [1, 2, 3, 4] and shown == logged(tmp_path / "run")


@pytest.mark.parametrize("asked", [False, True], ids=["fault[S16]-default", "track_completions"])
def test_wandb_offline_writes_files_and_reaches_for_no_network(tmp_path, monkeypatch, asked):
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        for name, value in {
            "WANDB_MODE": "offline", "WANDB_BASE_URL": address, "WANDB_ERROR_REPORTING": "false",
            "WANDB_SILENT": "true", "HTTPS_PROXY": address, "HTTP_PROXY": address,
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(tmp_path)
        result = rlx.run(**short(tmp_path / "run", "wandb", track_completions=asked))
        with pytest.raises(BlockingIOError):
            server.accept()  # nobody called
    assert not (tmp_path / "wandb").exists()  # its files lie in the run folder
    [file] = (result.folder / "trackers").rglob("run-*.wandb")
    content = file.read_bytes()
    assert b"policy/ratio" in content and b"learning_rate" in content
    assert (b"SECRET-PROMPT" in everything(result.folder)) == asked
