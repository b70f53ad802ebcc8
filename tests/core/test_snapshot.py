"""Exact resume: a run that goes on from a checkpoint equals one never interrupted, bit for bit."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch

import rlx
from rlx.core import checkpoint, manifest, memory, snapshot
from rlx.core.errors import CheckpointError, RlxError
from rlx.core.loop import Run
from rlx.core.run import prepare, reopen, train

EVERYTHING = {
    "reward": "./graded.py:Remembering",
    "kl_controller": "adaptive",
    "kl_horizon": 50,
    "score_scaling": "standardise",
    "logging_steps": 3,
    "sync_ref_model": True,
    "ref_model_sync_steps": 2,
}
VARIANTS = {
    "logged every step": {},
    "lora": {"lora_r": 4, "learning_rate": 1e-2},
    "lora with dropout": {"lora_r": 4, "lora_dropout": 0.1, "learning_rate": 1e-2},
    "everything that has state": EVERYTHING,
    "data in its order": {"shuffle": False},
    "no optimizer moments": {"optim": "sgd", "learning_rate": 1e-1, "value_learning_rate": ...},
}


def everything(run) -> dict[str, object]:
    """All that a run is, apart from times."""
    found = {f"weight {name}": p.detach().clone() for name, p in run.policy.trainable().items()}
    updater = copy.deepcopy(run.updater.state_dict())
    for name, moments in updater.pop("optimizer")["moments"].items():
        found |= {f"{key} of {name}": value for key, value in moments.items()}
    found |= {f"updater {name}": value for name, value in updater.items()}
    found["rates"] = [group["lr"] for group in run.updater.optimizer.param_groups]
    found |= {f"algorithm {name}": value for name, value in run.algorithm.state_dict().items()}
    found |= {f"reference {name}": value for name, value in run.studio.reference.state_dict().items()}
    found["rewards"] = run.studio.reward_state()
    found["meter"] = {name: float(value) for name, value in run.journal.meter.sums.items()}
    found["tokens"] = run.journal.tokens
    log = run.path / "metrics.jsonl"
    found["metrics"] = log.exists() and [
        {k: v for k, v in json.loads(line).items() if not k.startswith("time/") and "second" not in k}
        for line in log.read_text().splitlines()
    ]
    return found


def differing(one: dict[str, object], other: dict[str, object]) -> list[str]:
    def same(a: object, b: object) -> bool:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    return [name for name in sorted({*one, *other}) if not same(one.get(name), other.get(name))]


def whole(options) -> dict[str, object]:
    run = prepare(**options)
    train(run)
    return everything(run)


def cut_off(folder: Path, step: int, to: Path) -> Path:
    """The run folder as it would be had the run been killed after a checkpoint and some more log lines."""
    shutil.copytree(folder, to)
    for path in to.glob("checkpoint-*"):
        if int(path.name.partition("-")[2]) > step:
            shutil.rmtree(path)
    return to


def resumed(folder: Path, **overrides) -> dict[str, object]:
    run = reopen(folder, overrides)
    train(run)
    return everything(run)


SLOW = ("lora", "data in its order", "no optimizer moments", "everything that has state")


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in VARIANTS]
)
def test_a_resumed_run_equals_the_uninterrupted_one(variant, small, tmp_path):
    options = small(save_steps=1, save_total_limit=None, **VARIANTS[variant])
    oracle = whole(options)
    first = prepare(**{**options, "output_dir": "start"})
    assert differing(everything(first), oracle)  # it moved
    first.close()
    # Rows 12, batch 8: the epoch ends inside step 2. Step 4 lies between two log lines of the third variant.
    for step in (2, 4) if variant != "everything that has state" else (1, 2, 3, 4, 5, 6):
        folder = cut_off(tmp_path / "run", step, tmp_path / f"from-{step}")
        assert differing(resumed(folder), oracle) == []


def test_a_resumed_run_keeps_its_budget_where_more_memory_is_free(small, tmp_path, monkeypatch):
    """Micro-batches of other sizes would give sums that differ by rounding."""
    monkeypatch.setattr(memory, "LEAST_TOKENS", 64)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    options = small(save_steps=1, save_total_limit=None)
    oracle = whole(options)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1 << 50)
    lines: list[str] = []
    monkeypatch.setattr(Run, "say", lambda run, line: lines.append(line))
    run = reopen(cut_off(tmp_path / "run", 2, tmp_path / "moved"))
    assert (run.updater.budget, run.studio.budget) == (64, 64)
    assert "micro-batches are of at most 64 tokens, as they were" in lines
    train(run)
    assert differing(everything(run), oracle) == []
    roomy = whole({**options, "output_dir": "roomy"})
    assert roomy["updater budget"] == 2048 and "metrics" in differing(roomy, oracle)


def test_two_runs_of_one_seed_are_equal_and_of_two_seeds_are_not(small):
    one, again, other = (
        whole(small(output_dir=name, seed=seed, max_steps=2)) for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert differing(one, again) == []
    assert differing(one, other)


@pytest.mark.slow
def test_fault_r31_a_chain_of_resumes_is_exact(small, tmp_path):
    options = small(save_steps=1, save_total_limit=None, **EVERYTHING)
    oracle = whole(options)
    folder = cut_off(tmp_path / "run", 1, tmp_path / "chain")
    for stop in (3, 5):
        run = reopen(folder)
        while run.global_step < stop:
            run.step()
            snapshot.save(run)
        run.close()
    assert differing(resumed(folder), oracle) == []


FORGET = {
    "optimizer": lambda state, fresh: state["updater"].update(optimizer=fresh["updater"]["optimizer"]),
    "position": lambda state, fresh: state["updater"].update(done=0),
    "algorithm": lambda state, fresh: state.update(algorithm=fresh["algorithm"]),
    "kl_coef": lambda state, fresh: state["algorithm"].update(kl_coef=fresh["algorithm"]["kl_coef"]),
    "seen": lambda state, fresh: state["algorithm"].update(seen=fresh["algorithm"]["seen"]),
    "meter": lambda state, fresh: state["ranks"][0].update(meter=fresh["ranks"][0]["meter"]),
    "rewards": lambda state, fresh: state["ranks"][0].update(rewards=fresh["ranks"][0]["rewards"]),
    "reference": lambda state, fresh: state.update(reference=fresh["reference"]),
    "step": lambda state, fresh: state.update(step=fresh["step"]),
    "tokens": lambda state, fresh: state.update(tokens=0),
    "offsets": lambda state, fresh: state.update(offsets={"metrics.jsonl": 1 << 30, "completions.jsonl": 0}),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Made by the first test that needs it: a run, its end, and the state at its start."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("item", ["weights", "value head", *FORGET])
def test_each_item_of_the_state_is_needed(item, small, tmp_path, monkeypatch, tmp_path_factory, saved):
    if not saved:
        saved["root"] = tmp_path_factory.mktemp("oracle")
        options = small(save_steps=2, save_total_limit=None, **EVERYTHING)
        saved["oracle"] = whole({**options, "output_dir": str(saved["root"] / "run")})
        run = prepare(**{**options, "output_dir": str(saved["root"] / "fresh")})
        snapshot.save(run)
        run.close()
        saved["fresh"] = checkpoint.load_state(saved["root"] / "fresh" / "checkpoint-0" / "state")
    folder = cut_off(saved["root"] / "run", 4, tmp_path / "cut")
    load = checkpoint.load_state
    if item in FORGET:

        def forgetful(path):
            state = load(path)
            FORGET[item](state, copy.deepcopy(saved["fresh"]))
            return state

        monkeypatch.setattr(checkpoint, "load_state", forgetful)
    elif item == "weights":
        monkeypatch.setattr("rlx.core.models.restore_weights", lambda *_: None)
    else:
        monkeypatch.setattr("rlx.core.models.load_value_head", lambda *_: None)
    assert differing(resumed(folder), saved["oracle"]), f"{item} is not needed, or the comparison is blind"


def test_fault_p12_a_callback_that_draws_random_numbers_changes_nothing(small):
    class Gambler:
        @rlx.hookimpl
        def on_step_end(self, run):
            torch.rand(1000)
            torch.manual_seed(run.global_step)

        @rlx.hookimpl
        def on_loss(self):
            torch.rand(7)

    options = small(max_steps=3, lora_r=4, lora_dropout=0.1)
    assert differing(whole(options), whole({**options, "output_dir": "b", "callback": Gambler()})) == []


def test_evaluating_and_saving_more_often_changes_no_weight(small):
    options = small(max_steps=3, reward="./graded.py:Remembering")
    often = whole({**options, "output_dir": "often", "eval_steps": 1, "save_steps": 1})
    assert [name for name in differing(whole(options), often) if name != "metrics"] == []


# What must be the same


@pytest.fixture
def stopped(small):
    """The folder of a run with a checkpoint at step 1 of 3."""

    def make(**changes) -> Path:
        options = small(max_steps=3, save_steps=1, save_total_limit=None, **changes)
        run = prepare(**options)
        run.step()
        snapshot.save(run)
        run.close("interrupted", 130)
        return Path(options["output_dir"])

    return make


def refused(folder: Path, **overrides) -> str:
    with pytest.raises(CheckpointError) as caught:
        reopen(folder, overrides)
    assert caught.value.exit_code == 8
    return str(caught.value)


@pytest.mark.parametrize(
    ("option", "value"), [("learning_rate", "3e-3"), ("cliprange", "0.3"), ("seed", "9")]
)
def test_fault_r18_r22_a_changed_option_is_refused_unless_overridden(option, value, stopped):
    folder = stopped()
    config = folder / "config.yaml"
    lines = config.read_text().splitlines()
    old = next(line for line in lines if line.startswith(f"{option}: "))
    config.write_text("\n".join(f"{option}: {value}" if line == old else line for line in lines) + "\n")
    message = refused(folder)
    assert option in message and "→" in message and old.partition(": ")[2] in message
    config.write_text("\n".join(lines) + "\n")
    run = reopen(folder, {option: value})
    train(run)
    assert run.global_step == 3


def test_an_override_that_is_refused_for_another_reason_leaves_the_config_alone(stopped, tmp_path):
    folder = stopped()
    before = (folder / "config.yaml").read_text()
    (tmp_path / "graded.py").write_text((tmp_path / "graded.py").read_text() + "\n# changed\n")
    assert "reward: its files are others" in refused(folder, learning_rate="3e-3")
    assert (folder / "config.yaml").read_text() == before
    reopen(folder, {"reward": True}).close()  # accepted as it is; and the folder is free again


def test_an_overridden_learning_rate_holds_from_the_first_step_on(stopped):
    run = reopen(stopped(warmup_steps=0, lr_scheduler_type="constant"), {"learning_rate": "0"})
    before = {name: p.detach().clone() for name, p in run.policy.trainable().items() if name[:6] != "value."}
    run.step()
    assert all(torch.equal(before[name], p) for name, p in run.policy.trainable().items() if name in before)
    run.close()


def test_fault_r19_cosmetic_options_may_change(stopped):
    run = reopen(stopped(), {"logging_steps": "2", "save_total_limit": "1"})
    assert run.settings.logging_steps == 2
    run.close()


def test_fault_p15_a_plugin_of_another_version_is_told_of(stopped, monkeypatch, capsys):
    old = [*manifest.plugins(), {"name": "toy", "distribution": "rlx-toy", "version": "0.1.0"}]
    with monkeypatch.context() as then:
        then.setattr(snapshot, "plugins", lambda: old)
        folder = stopped()
    reopen(folder).close()
    said = capsys.readouterr().out
    assert "since the checkpoint, plugin toy of rlx-toy 0.1.0 was there, and is no longer" in said
    now = [*manifest.plugins(), {**old[-1], "version": "0.2.0"}]
    monkeypatch.setattr(manifest, "plugins", lambda: now)
    reopen(folder).close()
    assert "since the checkpoint, plugin toy of rlx-toy: 0.1.0 → 0.2.0" in capsys.readouterr().out


def test_fault_p15_what_a_missing_plugin_brought_is_told_with_its_name(stopped):
    folder = stopped()
    config, file = folder / "config.yaml", folder / "manifest.json"
    config.write_text(config.read_text().replace("./graded.py:graded", "brevity"))
    written = json.loads(file.read_text())
    written["plugins"].append({"name": "toy", "distribution": "rlx-toy", "version": "0.1.0"})
    file.write_text(json.dumps(written))
    with pytest.raises(RlxError, match="no reward 'brevity'") as caught:
        reopen(folder)
    assert "plugin toy of rlx-toy 0.1.0 was there, and is no longer" in "\n".join(caught.value.lines())
    assert caught.value.exit_code == 2


def test_fault_r20_other_weights_under_the_same_name_are_refused(stopped, tmp_path):
    from rlx.plugins.datasets import tiny_path

    shutil.copytree(tiny_path(), tmp_path / "base")
    folder = stopped(model=str(tmp_path / "base"))
    weights = tmp_path / "base" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1000] ^= 1
    weights.write_bytes(content)
    assert "model: its files are others" in refused(folder)
    reopen(folder, {"model": True}).close()


def test_fault_r21_other_rows_are_refused(stopped, tmp_path):
    rows = tmp_path / "rows.jsonl"
    row = {"prompt": "Tom has 9 pens and loses 2. How many pens does Tom have left?", "answer": "7"}
    rows.write_text((json.dumps(row) + "\n") * 9)
    folder = stopped(dataset=str(rows), max_eval_rows=...)
    rows.write_text((json.dumps({**row, "answer": "8"}) + "\n") * 9)
    assert "data: the rows of the data set are others" in refused(folder)
    reopen(folder, {"data": True}).close()


def test_fault_r16_without_any_whole_checkpoint_every_reason_is_told(stopped):
    folder = stopped()
    (folder / "checkpoint-1" / "value_head.safetensors").write_bytes(b"")
    assert "value_head.safetensors" in refused(folder)
    shutil.rmtree(folder / "checkpoint-1")
    assert "no checkpoint-* folder" in refused(folder)


def test_fault_r13_a_broken_checkpoint_is_passed_over_with_a_word(small, tmp_path, capsys):
    options = small(save_steps=1, save_total_limit=None, max_steps=4)
    oracle = whole(options)
    folder = cut_off(tmp_path / "run", 3, tmp_path / "cut")
    file = folder / "checkpoint-3" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert differing(resumed(folder), oracle) == []
    assert "checkpoint-3 is not usable, an earlier one is taken: model.safetensors" in capsys.readouterr().out
    assert checkpoint.verify(folder / "checkpoint-3") is None  # written anew; the broken one was moved aside


def test_a_checkpoint_is_refused_inside_a_step(started):
    run = started()
    run.prepare(run.roll_out())
    with pytest.raises(ValueError, match="between two steps"):
        snapshot.save(run)
