"""A roll-out with a reward server that takes its time, asked after sampling and while it goes on.

GRPO on a model of ``workload``: 16 prompts with eight completions each, lengths geometric up to 96 tokens,
sampled again and again from the same seeds. The server, a process of its own, scores one request at a time
and sleeps some milliseconds an item. Both ways take turns; the table gives medians of wall-clock seconds.
Run: ``python benchmarks/overlap.py`` (writes benchmarks/results/overlap.md).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PROMPTS, GENERATIONS = 16, 8
WAYS = {"after": False, "meanwhile": True}


def serve(milliseconds: float) -> None:
    """A reward server that sleeps for each item; its port is printed."""
    one_at_a_time = threading.Lock()

    class Score(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with one_at_a_time:
                time.sleep(milliseconds / 1000 * len(asked["ids"]))
            scores = [len(text) % 7 / 7 for text in asked["completions"]]
            answer = json.dumps({"ids": asked["ids"], "scores": scores}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *words: Any) -> None:
            """Keep quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Score)
    print(server.server_port, flush=True)
    server.serve_forever()


def prepared(size: str, folder: str, port: int) -> Any:
    """A run of GRPO whose reward is the server."""
    import workload

    import rlx

    workload.write(f"{folder}/{size}", size, steps=1)
    rows = workload.rows_for("grpo", json.loads(Path(folder, size, "rows.json").read_text()))
    return rlx.prepare(
        algo="grpo", model=f"{folder}/{size}/policy", dataset=rows, beta=0.0, batch_size=PROMPTS,
        reward=[{"name": "http", "url": f"http://127.0.0.1:{port}/", "dialect": "native"}],
        num_generations=GENERATIONS, max_completion_length=workload.LONGEST, chat_template="none",
        learning_rate=workload.RATE, max_steps=1, mixed_precision="no", plots=False, progress="none",
        log_completions=0, output_dir=f"{folder}/run-{size}-{port}",
    )  # fmt: skip


def measure(run: Any, runs: int) -> dict[str, dict[str, list[float]]]:
    """Wall-clock seconds of roll-outs of the same step, both ways in turns, and of their phases."""
    found: dict[str, dict[str, list[float]]] = {
        way: {"all": [], "generate": [], "reward": []} for way in WAYS
    }
    scores = set()
    for turn in range(runs + 1):
        for way, overlap_rewards in WAYS.items():
            run.studio.settings = replace(run.studio.settings, overlap_rewards=overlap_rewards)
            run.studio.clock.seconds.clear()
            start = time.perf_counter()
            rollouts = run.roll_out()
            if turn:  # the first one warms up
                found[way]["all"].append(time.perf_counter() - start)
                for phase in ("generate", "reward"):
                    found[way][phase].append(run.studio.clock.seconds[f"time/{phase}"])
            scores.add(tuple(rollouts.score.tolist()))
    assert len(scores) == 1, "the ways differ in their scores"
    return found


def main() -> None:
    """Measure every server, print the table, write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="roll-outs of each way")
    parser.add_argument("--size", choices=("tiny", "small"), default="tiny")
    parser.add_argument("--serve", type=float, help="be the server, with so many milliseconds an item")
    arguments = parser.parse_args()
    if arguments.serve is not None:
        serve(arguments.serve)
    import torch

    torch.set_num_threads(1)
    size = arguments.size
    lines = [
        "# A roll-out with a slow reward server, asked after sampling and while it goes on",
        "",
        f"Random Qwen2 in float32 ({size} of workload.py); {PROMPTS} prompts × {GENERATIONS} completions of",
        "at most 96 tokens, 40 in the mean. The server scores one request at a time.",
        f"{date.today()}, {platform.machine()}, 1 thread, torch {torch.__version__};",
        f"{arguments.runs} roll-outs of each way, wall-clock time.",
        "",
        "| server | scoring s | sampling s | roll-out s, after | meanwhile | waited s, after | meanwhile |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for milliseconds in (2, 5, 10, 20):
            words = [sys.executable, __file__, "--serve", str(milliseconds)]
            server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
            try:
                assert server.stdout is not None
                run = prepared(size, folder, int(server.stdout.readline()))
                found = measure(run, arguments.runs)
                run.close()
            finally:
                server.kill()
            after, meanwhile = (
                {phase: statistics.median(own) for phase, own in found[way].items()} for way in WAYS
            )
            lines.append(
                f"| {milliseconds} ms an item | {milliseconds * PROMPTS * GENERATIONS / 1000:.2f} "
                f"| {after['generate']:.2f} | {after['all']:.2f} | {meanwhile['all']:.2f} "
                f"| {after['reward']:.2f} | {meanwhile['reward']:.2f} |"
            )
            print(lines[-1], flush=True)
    lines.append(f"\nLoad average {os.getloadavg()[0]:.1f} at the end.")
    target = Path(__file__).parent / "results" / "overlap.md"
    target.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
