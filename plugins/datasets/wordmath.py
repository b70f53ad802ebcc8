"""The playground: one-step word problems in plain English, generated in code, with checkable answers.

Six families of sentences, three that add and three that subtract. The larger number always comes first and
the sum stays below 100 in every family, so the operation has to be read from the words; it cannot be guessed
from the sizes. A pair of operands belongs to one split only: no pair of the test split is ever trained on,
neither by a run nor by the model inside the package.

>>> import random
>>> problem(random.Random(4), "train")["prompt"]
'Jack has 40 coins and Zoe has 15. How many coins do they have together?'
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlx.core.errors import DataError
from rlx.core.options import opt

NAMES = "Tom Ann Sam Mia Ben Lily Max Zoe Leo Eva Dan Amy Jack Nora Omar Ruth".split()
ITEMS = (
    "apples books coins pens cards shells stamps marbles "
    "cookies stickers oranges flowers pencils balloons rocks toys"
).split()
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Family:
    """One kind of problem.

    Attributes:
        op: ``+`` or ``-``.
        templates: sentences with {A}, {B} (names), {x}, {y} (numbers) and {it} (items).
        confusion: how often ``flawed`` takes the other operation.
    """

    op: str
    templates: tuple[str, ...]
    confusion: float


FAMILIES = {
    "buy": Family(
        "+",
        (
            "{A} has {x} {it} and buys {y} more. How many {it} does {A} have now?",
            "{A} has {x} {it} and finds {y} more. How many {it} does {A} have now?",
        ),
        0.20,
    ),
    "total": Family("+", ("{A} has {x} {it} and {B} has {y}. How many {it} do they have together?",), 0.30),
    "more": Family("+", ("{A} has {x} {it}. {B} has {y} more than {A}. How many {it} does {B} have?",), 0.45),
    "give": Family(
        "-",
        (
            "{A} has {x} {it} and gives {y} to {B}. How many {it} does {A} have left?",
            "{A} has {x} {it} and loses {y}. How many {it} does {A} have left?",
        ),
        0.45,
    ),
    "fewer": Family(
        "-", ("{A} has {x} {it}. {B} has {y} fewer than {A}. How many {it} does {B} have?",), 0.60
    ),
    "diff": Family(
        "-", ("{A} has {x} {it} and {B} has {y}. How many more {it} does {A} have than {B}?",), 0.65
    ),
}


def held_out(x: int, y: int) -> bool:
    """Whether the operand pair belongs to the test split: one pair in eight, on every machine the same."""
    return zlib.crc32(f"{x},{y}".encode()) % 8 == 0


def problem(rng: random.Random, split: str) -> dict[str, Any]:
    """One problem, drawn uniformly over families, operand pairs, sentences, names and items.

    Args:
        rng: source of randomness.
        split: ``train`` or ``test``.

    Returns:
        A row: prompt, answer (the number as text), family, x, op, y.
    """
    name = rng.choice(list(FAMILIES))
    family = FAMILIES[name]
    while True:
        x, y = rng.randint(2, 97), rng.randint(2, 97)
        if y < x <= 99 - y and held_out(x, y) == (split == "test"):
            break
    a, b = rng.sample(NAMES, 2)
    prompt = rng.choice(family.templates).format(A=a, B=b, x=x, y=y, it=rng.choice(ITEMS))
    return {
        "prompt": prompt,
        "answer": str(_apply(x, family.op, y)),
        "family": name,
        "x": x,
        "op": family.op,
        "y": y,
    }


def _apply(x: int, op: str, y: int) -> int:
    return x + y if op == "+" else x - y


def _worked(x: int, op: str, y: int, z: int | str) -> str:
    return f"{x} {op} {y} = {z}. Answer: {z}"


def solution(row: Mapping[str, Any]) -> str:
    """The right completion of a row, for example ``34 - 15 = 19. Answer: 19``."""
    return _worked(row["x"], row["op"], row["y"], row["answer"])


def flawed(row: Mapping[str, Any], rng: random.Random, *, wrong: bool = False) -> str:
    """A completion as a sloppy pupil writes it: wrong operation, slips of the pen, a forgotten ``Answer:``.

    About 44 of 100 draws are right. The packaged model imitates these draws, so every method has something to
    mend.

    Args:
        row: a row of ``problem``.
        rng: source of randomness.
        wrong: draw until the answer is not the right one, for the rejected side of a pair.
    """
    x, y, op = row["x"], row["y"], row["op"]
    while True:
        used = op
        if rng.random() < FAMILIES[row["family"]].confusion:
            used = "-" if op == "+" else "+"
        z = _apply(x, used, y)
        if rng.random() < 0.15:
            z = max(0, z + rng.choice((-10, -2, -1, 1, 2, 10)))
        text = _worked(x, used, y, z)
        if rng.random() < 0.10:
            text = rng.choice((f"I think it is {z}.", f"{x} {used} {y} = {z}."))
        if not wrong or not text.endswith(f"Answer: {row['answer']}"):
            return text


def answers(row: Mapping[str, Any], eats: str, rng: random.Random, number: int) -> dict[str, Any]:
    """The columns that an algorithm learns from, beside the problem.

    Args:
        row: a row of ``problem``.
        eats: ``pairs`` get the right completion as chosen and a wrong draw as rejected, ``labeled`` one of
            the two in turn, ``demonstrations`` the right one, ``prompts`` nothing.
        rng: source of randomness.
        number: of the row.
    """
    if eats == "pairs":
        return {"chosen": solution(row), "rejected": flawed(row, rng, wrong=True)}
    if eats == "labeled":
        right = number % 2 == 0
        return {"completion": solution(row) if right else flawed(row, rng, wrong=True), "label": right}
    return {"completion": solution(row)} if eats == "demonstrations" else {}


class WordMath:
    """The registered data set ``wordmath``."""

    @dataclass(frozen=True)
    class Config:
        """How many problems there are; the defaults are the playground."""

        eats: str = opt(
            "prompts",
            "what the rows are for; what an algorithm eats is set for it",
            choices=("prompts", "pairs", "labeled", "demonstrations"),
        )
        train_rows: int | None = opt(
            None, "problems in the train split (default: 8192, and 4096 where nothing is sampled)", gt=0
        )
        test_rows: int = opt(512, "problems in the test split", gt=0)
        data_seed: int = opt(0, "another seed gives other problems", ge=0)

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or self.Config()

    def rows(self, split: str) -> list[dict[str, Any]]:
        """The problems of a split, no prompt twice; always the same for the same Config.

        Args:
            split: ``train`` or ``test``.

        Raises:
            DataError: for another split.
        """
        if split not in SPLITS:
            raise DataError(
                f"wordmath has no split {split!r}",
                code="E-DATA-SPLIT",
                got=split,
                expected=" or ".join(SPLITS),
            )
        wanted = self.config.test_rows
        if split == "train":
            wanted = self.config.train_rows or (8192 if self.config.eats == "prompts" else 4096)
        rng = random.Random(f"wordmath/{split}/{self.config.data_seed}")
        found: dict[str, dict[str, Any]] = {}
        while len(found) < wanted:
            row = problem(rng, split)
            found.setdefault(row["prompt"], row)
        rows = list(found.values())
        # A stream of its own: the problems are the same ones for every kind of algorithm.
        rng = random.Random(f"wordmath/{split}/{self.config.data_seed}/{self.config.eats}")
        return [{**row, **answers(row, self.config.eats, rng, number)} for number, row in enumerate(rows)]

    def recipe(self, algo: str) -> dict[str, Any]:
        """Options with which an algorithm learns on the packaged model and this data set within a minute.

        Args:
            algo: the algorithm's registered name.

        Returns:
            Option name → value; empty for an algorithm without a recipe.
        """
        return dict(RECIPES.get(algo, {}))


# The model is a thousand times smaller than what the algorithms' defaults are made for: hence the learning
# rates.
ONLINE: dict[str, Any] = {
    "max_steps": 45,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "warmup_steps": 3,
    "adam_beta2": 0.95,
    "max_completion_length": 24,
    "logging_steps": 1,
}
OFFLINE: dict[str, Any] = {
    "learning_rate": 3e-4,
    "warmup_steps": 5,
    "adam_beta2": 0.95,
    "batch_size": 64,
    "logging_steps": 4,
}
RECIPES: dict[str, dict[str, Any]] = {
    # A smaller beta over-optimises: chosen and rejected share most of their tokens.
    "dpo": {**OFFLINE, "beta": 0.5, "num_train_epochs": 1.0},
    "kto": {**OFFLINE, "beta": 0.5, "num_train_epochs": 1.0},
    # The problems are random draws: learning to write them takes all that the answers would need.
    "orpo": {**OFFLINE, "num_train_epochs": 1.0, "nll_on": "completion"},
    "cpo": {**OFFLINE, "num_train_epochs": 1.0},
    "sft": {**OFFLINE, "num_train_epochs": 1.0},
    "reward": {**OFFLINE, "learning_rate": 1e-3, "num_train_epochs": 3.0},
    "ppo": {
        **ONLINE,
        "batch_size": 64,
        "num_generations": 4,
        "num_ppo_epochs": 2,
        "num_mini_batches": 4,
        "value_learning_rate": 2e-3,
        "vf_coef": 0.5,
        "kl_coef": 0.03,
    },
    "rloo": {
        **ONLINE,
        "batch_size": 64,
        "num_generations": 4,
        "num_iterations": 2,
        "num_mini_batches": 4,
        "normalize_advantages": True,
        "beta": 0.03,
    },
    "grpo": {
        **ONLINE,
        "batch_size": 32,
        "num_generations": 8,
        "num_iterations": 2,
        "num_mini_batches": 4,
        "beta": 0.03,
    },
    "online_dpo": {
        **ONLINE,
        "batch_size": 64,
        "num_generations": 4,
        "learning_rate": 2e-4,
        "temperature": 1.0,
        "max_steps": 60,
    },
}
