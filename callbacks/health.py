"""Health hints: what usually goes wrong, said once in words while the run goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rlx.plugins.contract import Callback
from rlx.plugins.hookspecs import hookimpl

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Check:
    """One thing to look out for.

    Attributes:
        sick: whether a log line shows it; a metric that is missing raises KeyError and counts as healthy.
        lines: how many log lines in a row must show it.
        hint: what to say; may name metrics in braces.
    """

    sick: Callable[[Metrics, Metrics], bool]
    lines: int
    hint: str


# Each takes a log line and the first one of the run. Thresholds are far outside what a healthy run shows.
CHECKS: dict[str, Check] = {
    "negative_kl": Check(
        lambda now, first: now["kl"] < -0.05,
        3,
        "KL is below zero ({kl:.3f}) for three log lines: completions are not drawn from the distribution"
        " that is scored. Compare temperature, top_p and generation_dtype, and leave disable_dropout on.",
    ),
    "equal_rewards": Check(
        lambda now, first: "reward" in now and now["reward/std"] < 1e-8,  # no reward: none applied
        5,
        "All rewards are equal ({reward:.4g}) for five log lines: there is nothing to learn from. The task"
        " may be solved or out of reach, or the reward never fires: see completions.jsonl, `rlx reward try`.",
    ),
    "no_stop": Check(
        lambda now, first: now["completion/eos_rate"] == 0.0,
        3,
        "No completion ends by itself: all are cut at max_completion_length. Raise it, set stop_strings, or"
        " check the model's end-of-sequence token.",
    ),
    "unscorable": Check(
        lambda now, first: now["reward/unscorable"] > 0.5,
        5,
        "More than half of the completions ({reward/unscorable:.0%}) get no score and teach nothing. See in"
        " completions.jsonl why the rewards do not apply.",
    ),
    "entropy_collapse": Check(
        # Imitating demonstrations lowers it too, and rightly so: only samples need it.
        lambda now, first: "completion/length" in now and now["entropy"] < 0.05 * first["entropy"],
        3,
        "Entropy fell to {entropy:.3g} nats, below a twentieth of its start: the policy hardly explores."
        " Lower the learning rate, or raise the temperature or an entropy bonus.",
    ),
    "ratio": Check(
        lambda now, first: abs(now["policy/ratio"] - 1.0) > 0.5,
        2,
        "The probability ratio is {policy/ratio:.2f} on average, far from 1: the policy moves too far on one"
        " batch. Lower the learning rate, or take fewer epochs a batch.",
    ),
    "clipping": Check(
        lambda now, first: now["policy/clip_fraction"] > 0.5,
        5,
        "More than half of the tokens are clipped ({policy/clip_fraction:.0%}): most of the batch gives no"
        " gradient. Lower the learning rate, or take fewer epochs a batch.",
    ),
}


class Health(Callback):
    """Watches the log lines and says each hint at most once a run, resumed or not."""

    observer: ClassVar[bool] = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._first: dict[str, float] = {}
        self._streaks: dict[str, int] = {}
        self._said: list[str] = []

    @hookimpl
    def on_log(self, run: Any, metrics: dict[str, float]) -> None:
        """Look at one log line."""
        if not run.is_main or all(name == "step" or name.startswith("eval/") for name in metrics):
            return
        self._first = {**metrics, **self._first}
        for name, check in CHECKS.items():
            try:
                sick = check.sick(metrics, self._first)
            except KeyError:
                sick = False
            self._streaks[name] = self._streaks.get(name, 0) + 1 if sick else 0
            if self._streaks[name] >= check.lines and name not in self._said:
                self._said.append(name)
                run.say("hint: " + check.hint.format_map(metrics))

    def state_dict(self) -> dict[str, Any]:
        """What was seen and said."""
        return {"first": self._first, "streaks": self._streaks, "said": self._said}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self._first, self._streaks = dict(state["first"]), dict(state["streaks"])
        self._said = list(state["said"])
