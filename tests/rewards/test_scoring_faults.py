"""What rewards do wrong, and what the runner promises then (the W faults)."""

import asyncio
import decimal
import random
import threading
import traceback
import warnings

import numpy as np
import pytest
import torch

from rlx.core.batch import Prompts
from rlx.core.errors import ConfigError, PluginError, RewardError
from rlx.core.scoring import NamedReward, RewardRunner

HOSTILE = "\x1b[2J\x9b\u202e[bold]\nERROR forged \x07"


def make_prompts(count, **columns):
    talk = [[{"role": "user", "content": "hi"}] for _ in range(count)]
    return Prompts([[1]] * count, ["hi"] * count, talk, columns, [100 + i for i in range(count)])


def run(fn, completions=("a", "b", "c", "d"), **options):
    runner = RewardRunner([NamedReward("len", fn)], **options)
    return runner.score(make_prompts(len(completions)), list(completions), [[1, 2]] * len(completions))


def refusal(returned, **options):
    """The error that a reward returning this leads to, and its text."""
    with pytest.raises(RewardError) as caught:
        run(lambda completions: returned, **options)
    error, text = caught.value, str(caught.value)
    assert error.exit_code == 6
    assert "reward 'len' " in error.what
    assert "test_scoring_faults.py:" in error.where
    assert len(text.splitlines()) <= 12
    return error


def raises(completions):
    raise RuntimeError(f"remote 503 for {completions[0]}")


async def raises_later(completions):
    await asyncio.sleep(0)
    raise RuntimeError(f"remote 503 for {completions[0]}")


@pytest.mark.parametrize(
    "fn", [pytest.param(raises, id="fault[W1]"), pytest.param(raises_later, id="fault[W1] async")]
)
def test_an_exception_is_told_with_place_row_completion_and_cause(fn):
    with pytest.raises(RewardError) as caught:
        run(fn, ["first", "b"])
    error = caught.value
    assert (error.exit_code, error.code) == (6, "E-REWARD-RAISED")
    assert error.what == "reward 'len' raised RuntimeError"
    assert (
        f"test_scoring_faults.py:{fn.__code__.co_firstlineno}; 2 completions, the first of data row 100"
        in error.where
    )
    assert "'first'" in error.where
    assert error.got == "RuntimeError: remote 503 for first"
    assert isinstance(error.__cause__, RuntimeError)
    assert traceback.extract_tb(error.__cause__.__traceback__)[-1].name == fn.__name__


def test_an_error_that_says_where_and_what_it_got_is_told_whole():
    def refuses(completions):
        raise PluginError(
            "the licence ran out", where="licence.txt:3", got="2025", expected="2026", hint="renew"
        )

    with pytest.raises(RewardError) as caught:
        run(refuses, ["first", "b"])
    error = caught.value
    assert error.got == "PluginError: the licence ran out; where: licence.txt:3; got: 2025"
    assert (error.expected, error.hint) == ("2026", "renew")


@pytest.mark.parametrize(
    "fn", [pytest.param(raises, id="fault[W1] hostile"), pytest.param(raises_later, id="async")]
)
def test_hostile_completions_are_inert_in_messages(fn):
    with pytest.raises(RewardError) as caught:
        run(fn, [HOSTILE])
    lines = caught.value.lines()
    assert not set("\x1b\x9b\u202e\x07\n\r") & set("".join(lines))
    assert not any(line.startswith("ERROR") for line in lines)
    assert "\\x1b[2J" in str(caught.value)


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        pytest.param(float("nan"), "nan", id="fault[W2]"),
        pytest.param(float("inf"), "inf", id="fault[W3] inf"),
        pytest.param(float("-inf"), "-inf", id="fault[W3] -inf"),
        pytest.param(1e39, "1e+39", id="fault[W3] float32"),
        pytest.param(10**400, "inf", id="fault[W3] int"),
        pytest.param(np.float64("nan"), "nan", id="fault[W2] numpy"),
        pytest.param(torch.tensor(float("nan")), "nan", id="fault[W2] torch"),
        pytest.param("1.0", "str", id="fault[W8] text"),
        pytest.param({"score": 1}, "dict", id="fault[W8] dict"),
        pytest.param(decimal.Decimal(1), "Decimal", id="fault[W8] Decimal"),
        pytest.param(1j, "complex", id="fault[W8] complex"),
        pytest.param([1.0], "a list of 1 numbers", id="fault[W8] nested"),
        pytest.param([1.0, None], "None", id="fault[W8] None for a token"),
        pytest.param([1.0, float("nan")], "nan", id="fault[W2] nan for a token"),
        pytest.param(torch.zeros(1, 2), "Tensor", id="fault[W8] 2-d item"),
    ],
)
def test_one_unusable_item_is_named(bad, told):
    error = refusal([0.5, None, bad, 1.0])
    assert error.what == f"reward 'len' returned {told} for item 2"
    assert "data row 102: 'c'" in error.where
    assert error.expected


@pytest.mark.parametrize(
    "returned",
    [
        pytest.param([float("nan")] * 4, id="fault[W4]"),
        pytest.param(torch.full((4,), float("nan")), id="fault[W4] torch"),
        pytest.param(np.full(4, np.nan), id="fault[W4] numpy"),
    ],
)
def test_nan_is_never_taken_for_not_applicable(returned):
    assert refusal(returned).what == "reward 'len' returned nan for item 0"


@pytest.mark.parametrize(
    ("returned", "nans"),
    [
        pytest.param([None, 1.0, 2.0, 3.0], 1, id="fault[W5] one"),
        pytest.param([None] * 4, 4, id="fault[W5] all"),
    ],
)
def test_none_abstains(returned, nans):
    scored = run(lambda completions: returned)
    assert int(scored.score.isnan().sum()) == nans
    assert torch.equal(scored.score.isnan(), scored.rewards["len"].isnan())


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        pytest.param(
            [1.0], "returned 1 rewards, but 4 were expected (one per prompt-completion pair)", id="fault[W6]"
        ),
        pytest.param([], "returned 0 rewards, but 4 were expected", id="fault[W6] empty"),
        pytest.param(torch.zeros(5), "returned 5 rewards, but 4 were expected", id="fault[W6] torch"),
        pytest.param(1.0, "returned float", id="fault[W7]"),
        pytest.param(None, "returned None", id="fault[W7] None"),
        pytest.param(torch.tensor(1.0), "returned a Tensor of shape ()", id="fault[W7] 0-d"),
        pytest.param("1234", "returned str", id="fault[W8] text"),
        pytest.param({0: 1.0}, "returned dict", id="fault[W8] dict"),
        pytest.param((x for x in [1.0] * 4), "returned generator", id="fault[W8] generator"),
        pytest.param(torch.zeros(4, 1), "returned a Tensor of shape (4, 1)", id="fault[W8] torch Nx1"),
        pytest.param(np.zeros((4, 1)), "returned a ndarray of shape (4, 1)", id="fault[W8] numpy Nx1"),
        pytest.param([[1.0]] * 4, "returned a list of 1 numbers for item 0", id="fault[W8] list Nx1"),
    ],
)
def test_a_result_of_the_wrong_shape_is_told(returned, told):
    assert told in refusal(returned).what


def test_items_of_the_wrong_type_are_shown_inert_and_short():
    error = refusal([HOSTILE * 1000, 1.0, 1.0, 1.0])
    assert error.got.startswith("str ")
    assert len(error.got) < 550
    assert not set("\x1b\x9b\u202e\x07\n") & set(error.got)


@pytest.mark.parametrize(
    "kind", [pytest.param(lambda t: t, id="fault[W9]"), pytest.param(list, id="fault[W9] items")]
)
def test_a_tensor_with_gradient_is_detached_with_one_warning(kind):
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    runner = RewardRunner([NamedReward("len", lambda completions: kind(weight * 2))])
    arguments = make_prompts(4), ["a"] * 4, [[1]] * 4
    with pytest.warns(UserWarning, match="'len' returned a tensor that requires grad"):
        scored = runner.score(*arguments)
    assert scored.score.tolist() == [2.0, 4.0, 6.0, 8.0]
    assert not scored.score.requires_grad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runner.score(*arguments)


@pytest.mark.parametrize("_", [pytest.param(0, id="fault[W10]")])
def test_a_reward_works_on_copies(_):
    def vandal(prompts, completions, completion_ids, gold):
        prompts[0][0]["content"] = "changed"
        prompts.clear()
        completions[0] = "changed"
        completion_ids[0].append(99)
        gold[0]["x"] = 99
        return [1.0, 1.0]

    def witness(prompts, completions, completion_ids, gold):
        assert (prompts[0][0]["content"], completions, completion_ids, gold) == (
            "hi",
            ["a", "b"],
            [[1], [2]],
            [{"x": 1}] * 2,
        )
        return [1.0, 1.0]

    prompts, completions, ids = make_prompts(2, gold=[{"x": 1}, {"x": 1}]), ["a", "b"], [[1], [2]]
    RewardRunner([NamedReward("vandal", vandal), NamedReward("witness", witness)]).score(
        prompts, completions, ids
    )
    assert prompts == make_prompts(2, gold=[{"x": 1}, {"x": 1}])
    assert (completions, ids) == (["a", "b"], [[1], [2]])


async def out_of_order(completions):
    """What ``asyncio.as_completed`` gives: the results in the order in which they came."""

    async def one(text):
        await asyncio.sleep(0.001 * len(text))
        return float(len(text))

    return [await done for done in asyncio.as_completed([one(text[:20]) for text in completions])]


async def in_order(completions):
    async def one(text):
        await asyncio.sleep(0.001 * len(text))
        return float(len(text))

    return await asyncio.gather(*[one(text[:20]) for text in completions])


@pytest.mark.parametrize(
    ("fn", "status"),
    [pytest.param(out_of_order, "failed", id="fault[W11]"), (in_order, "ok")],
)
def test_the_check_of_plugins_sees_results_in_another_order(fn, status):
    from rlx.testing.kit import check

    (outcome,) = check(fn, "reward", only=["order_follows_input"])
    assert outcome.status == status


@pytest.mark.parametrize(
    ("fn", "told"),
    [
        pytest.param(
            lambda completions: [random.random() for _ in completions], "varies by", id="fault[W12]"
        ),
        (lambda completions: [1.0 for _ in completions], "the same scores each time"),
    ],
)
def test_the_check_of_plugins_tells_how_much_scores_vary_and_allows_it(fn, told):
    from rlx.testing.kit import check

    (outcome,) = check(fn, "reward", only=["repeatable"])
    assert outcome.status == "ok" and outcome.note.startswith(told)


@pytest.mark.gpu
@pytest.mark.parametrize("_", [pytest.param(0, id="fault[W9] device")])
def test_a_tensor_on_another_device_is_moved(_):
    assert run(lambda completions: torch.arange(4.0, device="cuda")).score.tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("rewards", "told"),
    [
        pytest.param(
            [("a", 1.0), ("b", float("nan"))], "the weight of reward 'b' is not finite", id="fault[W34] nan"
        ),
        pytest.param([("a", float("inf"))], "the weight of reward 'a' is not finite", id="fault[W34] inf"),
        pytest.param([("a", 0.0), ("b", 0.0)], "every reward has the weight 0", id="fault[W34] zero"),
        pytest.param([], "there is no reward", id="fault[W34] none"),
    ],
)
def test_a_mix_that_cannot_teach_is_a_config_error(rewards, told):
    with pytest.raises(ConfigError, match=told) as caught:
        RewardRunner([NamedReward(name, lambda completions: [0.0], weight) for name, weight in rewards])
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("_", [pytest.param(0, id="fault[W34] unknown")])
def test_an_unknown_name_in_the_mix_is_a_config_error(_):
    from rlx.plugins.references import resolve

    with pytest.raises(ConfigError, match="exact_match") as caught:
        resolve("reward", "exact_mach")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "options", [{"on_error": "ignore"}, {"on_error": "value", "error_value": float("nan")}]
)
def test_an_unknown_policy_is_a_config_error(options):
    with pytest.raises(ConfigError):
        RewardRunner([NamedReward("a", lambda completions: [0.0])], **options)


@pytest.mark.parametrize(("policy", "filled"), [("none", float("nan")), ("value", -2.0)])
def test_under_a_policy_single_items_are_replaced_counted_and_said_once(policy, filled):
    runner = RewardRunner(
        [NamedReward("len", lambda completions: [1.0, float("nan"), "x", None])],
        on_error=policy,
        error_value=-2.0,
    )
    arguments = make_prompts(4), ["a", "b", "c", "d"], [[1]] * 4
    with pytest.warns(UserWarning) as told:
        scored = runner.score(*arguments)
    assert len(told) == 1
    assert "reward 'len' returned nan for item 1" in str(told[0].message)
    assert "reward/len/errors" in str(told[0].message)
    expected = torch.tensor([1.0, filled, filled, float("nan")])
    assert torch.allclose(scored.score, expected, equal_nan=True, rtol=0, atol=0)
    assert scored.metrics["reward/len/errors"] == [2.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert runner.score(*arguments).metrics["reward/len/errors"] == [2.0]


@pytest.mark.parametrize(
    "fn", [raises, raises_later, lambda completions: [1.0]], ids=["raises", "async", "length"]
)
def test_under_a_policy_a_failed_call_counts_for_every_completion(fn):
    with pytest.warns(UserWarning, match="counted as 0"):
        scored = run(fn, on_error="value")
    assert scored.score.tolist() == [0.0] * 4
    assert scored.metrics["reward/len/errors"] == [4.0]


def test_errors_are_counted_as_0_where_there_are_none():
    assert run(lambda completions: [1.0] * 4, on_error="none").metrics["reward/len/errors"] == [0.0]


def test_a_weighted_sum_beyond_float32_is_an_error():
    rewards = [NamedReward("a", lambda completions: [3e38]), NamedReward("b", lambda completions: [3e38])]
    with pytest.raises(RewardError, match="does not fit into float32"):
        RewardRunner(rewards).score(make_prompts(1), ["a"], [[1]])


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("policy", ["raise", "none"])
def test_interrupts_pass_through(interrupt, policy):
    def plain(completions):
        raise interrupt

    async def later(completions):
        await asyncio.sleep(0)
        raise interrupt

    for fn in (plain, later):
        with pytest.raises(interrupt):
            run(fn, on_error=policy)


def test_after_an_error_the_async_rewards_still_under_way_are_cancelled():
    cancelled = threading.Event()

    async def patient(completions):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    with pytest.raises(RewardError):
        RewardRunner([NamedReward("bad", raises), NamedReward("patient", patient)]).score(
            make_prompts(1), ["a"], [[1]]
        )
    assert cancelled.wait(5)
