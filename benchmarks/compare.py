"""rlx against TRL, the same work side by side: seconds, memory, tokens.

    python -m venv .oracle && .oracle/bin/pip install -c constraints.txt torch==2.13.0 trl==1.16.0 psutil
    python benchmarks/compare.py --algo dpo --size small --peer .oracle/bin/python

Each measurement is a process of its own; sides alternate (A B A B), so that a slow moment of the machine
meets both; medians are taken over steps, then over processes. Before anything is timed, both sides take two
steps in float32 on the same tokens, with a learning rate at which the second loss tells whether the first
gradient was the same, and their losses must agree within 1e-4. (Two cannot be compared so: TRL's
PPO samples by itself, and in a packed row of its SFT the documents see each other.)

Settings: ``tuned``: both in float32, TRL without gradient checkpointing. ``defaults``: each as it comes (TRL:
bf16 autocast and gradient checkpointing; rlx: float32 on a CPU). ``bf16``: both under bf16 autocast, TRL
without checkpointing. PPO needs TRL 1.12.0, the last one that has it: --ppo-peer.
Writes benchmarks/results/compare.json and compare.md; a run adds its rows to those that are there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import limits  # noqa: E402
import workload  # noqa: E402

ALGORITHMS = ("dpo", "kto", "orpo", "grpo", "rloo", "ppo", "sft", "sft_packed", "reward")
SETTINGS = {
    "tuned": {"tuned": True, "precision": "float32"},
    "defaults": {"tuned": False, "precision": "float32"},
    "bf16": {"tuned": True, "precision": "bfloat16"},
}
TARGETS = {  # seconds and memory of TRL over those of rlx, on small
    "dpo": (4, 2.5), "kto": (2.5, 1.7), "orpo": (2.5, 2.3), "grpo": (4.5, 2), "rloo": (5, 2), "ppo": (3, 1.5),
    "sft": (1, 1), "sft_packed": (1, 1), "reward": (1, 1),
}  # fmt: skip


def side(python, script, job):
    """One measurement in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        asked, found = Path(folder) / "job.json", Path(folder) / "result.json"
        asked.write_text(json.dumps(job))
        env = {**os.environ, "OMP_NUM_THREADS": str(job["threads"]), "TRL_EXPERIMENTAL_SILENCE": "1",
               "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
        done = subprocess.run(
            [python, HERE / script, asked, found], env=env, cwd=folder, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{script} failed on {job}:\n{done.stderr[-3000:]}")
        return json.loads(found.read_text())


def contest(algo, size, setting, options, folder):
    """The row of one algorithm: medians of both sides."""
    job = {"algo": algo, "folder": str(folder), "threads": options.threads, **SETTINGS[setting]}
    peer = options.ppo_peer if algo == "ppo" else options.peer
    apart = None
    if algo not in ("ppo", "sft_packed"):
        check = {**job, "steps": 2, "check": True, "tuned": True, "precision": "float32"}
        ours, theirs = (side(python, script, check)["losses"] for python, script in sides(peer))
        apart = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        if not apart < 1e-4:
            raise SystemExit(f"{algo}: the losses of two steps differ: {ours}, {theirs}")
    found = {"side_rlx.py": [], "side_trl.py": []}
    timed = {**job, "steps": 1 + options.steps, "check": False}
    for repeat in range(options.repeats):
        for python, script in sides(peer):
            found[script].append(side(python, script, {**timed, "seed": repeat}))  # other samples each time
    ours, theirs = (summary(results) for results in found.values())
    pairs = zip(*found.values(), strict=True)
    ratios = [cost(b) / cost(a) for a, b in pairs]
    rates = limits.rates(options.threads, SETTINGS[setting]["precision"])
    prompts, completions = tokens_of(algo, folder, options.steps)
    if algo in workload.GENERATIONS:
        completions = ours["tokens_per_step"]
    elif algo != "reward":  # whose loss has no tokens
        for one in (ours, theirs):
            one["tokens_per_second"] = completions / one["seconds"]
    least = limits.seconds(algo, size, prompts, completions, rates, SETTINGS[setting]["precision"])
    return {
        "algo": algo, "size": size, "setting": setting, "loss_apart": apart, "rlx": ours, "trl": theirs,
        "time_ratio": statistics.median(ratios), "ratios": ratios,
        "memory_ratio": theirs["peak_bytes"] / ours["peak_bytes"],
        "rates": rates, "least_seconds": least,
        "date": datetime.date.today().isoformat(), "threads": options.threads, "machine": machine(),
    }  # fmt: skip


def sides(peer):
    return ((sys.executable, "side_rlx.py"), (peer, "side_trl.py"))


def tokens_of(algo, folder, steps):
    """Prompt tokens of a step, one that is sampled from counted once, and completion tokens of its rows."""
    rows = json.loads((folder / "rows.json").read_text())
    return limits.offline_tokens(algo, rows, steps)


def cost(result):
    """Seconds a step, or a sampled token where a step samples."""
    seconds = sum(result["seconds"])
    return seconds / (sum(result["tokens"]) or len(result["seconds"]))


def summary(results):
    seconds = [statistics.median(one["seconds"]) for one in results]
    tokens = sum(sum(one["tokens"]) for one in results)
    return {
        "seconds": statistics.median(seconds),
        "peak_bytes": statistics.median(one["peak_bytes"] for one in results),
        "tokens_per_second": tokens / sum(sum(one["seconds"]) for one in results),
        "tokens_per_step": tokens / sum(len(one["seconds"]) for one in results),
        "phases": results[-1]["phases"],
    }


def machine():
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), "")
    return f"{name or platform.machine()}, {os.cpu_count()} cores"


def table(rows):
    lines = [
        "| algorithm | size | setting | rlx s/step | at least | TRL s/step | TRL/rlx time | wanted | "
        "rlx peak MB | TRL peak MB | TRL/rlx memory | wanted | rlx tokens/s | TRL tokens/s | "
        "loss apart | date |",
        "|" + "---|" * 16,
    ]
    for row in rows:
        ours, theirs, (time, memory) = row["rlx"], row["trl"], TARGETS[row["algo"]]
        time = 3 if row["setting"] == "defaults" and time > 3 else time
        if row["size"] == "tiny":
            time = memory = "-"
        least = f"{row['least_seconds']:.2g}" if "least_seconds" in row else "-"  # an older row
        apart = "-" if row["loss_apart"] is None else f"{row['loss_apart']:.0e}"
        tokens = [
            f"{one['tokens_per_second']:.0f}" if one["tokens_per_second"] else "-" for one in (ours, theirs)
        ]
        lines.append(
            f"| {row['algo']} | {row['size']} | {row['setting']} | {ours['seconds']:.3g} | "
            f"{least} | {theirs['seconds']:.3g} | {row['time_ratio']:.2f} | {time} | "
            f"{ours['peak_bytes'] / 1e6:.0f} | "
            f"{theirs['peak_bytes'] / 1e6:.0f} | {row['memory_ratio']:.2f} | {memory} | {tokens[0]} | "
            f"{tokens[1]} | {apart} | {row['date']} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--algo", nargs="+", default=ALGORITHMS[:5], choices=ALGORITHMS)
    parser.add_argument("--size", nargs="+", default=["small"], choices=list(workload.VOCABULARY))
    parser.add_argument("--setting", nargs="+", default=["tuned"], choices=list(SETTINGS))
    parser.add_argument("--peer", default=".oracle/bin/python", help="the Python of TRL 1.16.0's environment")
    parser.add_argument("--ppo-peer", default=".oracle-ppo/bin/python", help="the same with TRL 1.12.0")
    parser.add_argument("--repeats", type=int, default=2, help="processes of each side")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a process")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    options.peer, options.ppo_peer = (os.path.abspath(path) for path in (options.peer, options.ppo_peer))
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    store = results / "compare.json"
    rows = json.loads(store.read_text()) if store.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        for size in options.size:
            workload.write(f"{folder}/{size}", size, 1 + options.steps)
            for algo in options.algo:
                for setting in options.setting:
                    row = contest(algo, size, setting, options, Path(folder) / size)
                    print(table([row]).splitlines()[-1], flush=True)
                    key = (algo, size, setting)
                    rows = [r for r in rows if (r["algo"], r["size"], r["setting"]) != key] + [row]
                    store.write_text(json.dumps(rows, indent=1) + "\n")
                    (results / "compare.md").write_text(report(rows))


def report(rows):
    about = (
        f"{rows[-1]['machine']}, {rows[-1]['threads']} threads. Settings and method: the head of "
        "benchmarks/compare.py. Peak memory is what a process adds while it trains: gradients, optimizer "
        "state, activations. Where completions are sampled, the ratio of times is per sampled token. "
        "*At least* is what matrix products, or reading the weights, take by themselves "
        "(benchmarks/limits.py). Tokens a second are completion tokens in the loss."
    )
    return f"# rlx against TRL\n\n{about}\n\n{table(sorted(rows, key=lambda r: (r['size'], r['algo'])))}\n"


if __name__ == "__main__":
    main()
