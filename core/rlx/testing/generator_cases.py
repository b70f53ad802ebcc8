"""What holds of every generator, on the packaged model: its tokens, log-probs, seeds, stops and weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlx.core.errors import ConfigError
from rlx.core.models import Policy, load_policy
from rlx.core.settings import Settings
from rlx.plugins.contract import Completions, Sampling
from rlx.plugins.telling import Complete, tells
from rlx.testing import data
from rlx.testing.kit import NotApplicable, Subject, case

NEW = 12  # tokens of the longest completion
GREEDY = Sampling(NEW, greedy=True)
DRAWN = Sampling(NEW)
SEEDS = (11, 12, 13, 14)
NARROWEST = {"top_k": 1, "top_p": 1e-6, "min_p": 1.0}  # each leaves the likeliest token alone
WORKS = ("n_adjacent_completions",)


def _policy(subject: Subject) -> Policy:
    policy: Policy = subject.once("policy", lambda: load_policy(Settings()))
    return policy


def _prompts(subject: Subject) -> list[list[int]]:
    texts = [data.row(number, "prompts, text")["prompt"] for number in range(len(SEEDS))]
    ids: list[list[int]] = _policy(subject).tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids


def _generate(
    subject: Subject, sampling: Sampling, n: int = 1, which: Sequence[int] = range(len(SEEDS)), shift: int = 0
) -> Completions:
    """N completions of some of the prompts, by a generator that was just synced."""
    generator, prompts = subject.once("generator", subject.make), _prompts(subject)
    generator.sync(_policy(subject))
    seeds = [SEEDS[number] + shift for number in which]
    done: Completions = generator.generate([prompts[number] for number in which], n, sampling, seeds)
    return done


def _by_model(subject: Subject) -> list[list[int]]:
    """What model.generate takes to be the most likely tokens after each prompt, alone."""
    found = []
    with torch.no_grad(), _policy(subject).active() as model:
        for prompt in _prompts(subject):
            out = model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=False, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
            found.append(out[0, len(prompt) :].tolist())
    return found


def _naive_logps(subject: Subject, prompt: list[int], ids: list[int], temperature: float) -> Tensor:
    """Log-probs by one forward without cache, batch or padding."""
    with torch.no_grad(), _policy(subject).active() as model:
        logits = model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits[0].float()
    logps = (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)
    taken: Tensor = logps.gather(1, torch.tensor(ids, dtype=torch.long)[:, None])[:, 0]
    return taken


def _stops(subject: Subject) -> tuple[int, ...]:
    """A token that ends some of the likeliest completions, and leaves others."""
    likeliest = _by_model(subject)
    some = [token for token in likeliest[0] if not all(token in ids for ids in likeliest)]
    assert some, "the packaged model says the same after every prompt"
    return (some[0],)


@case("generator")
def n_adjacent_completions(subject: Subject) -> None:
    """It gives n completions a prompt, next to each other, in the order of the prompts."""
    one, two = _generate(subject, GREEDY), _generate(subject, GREEDY, n=2)
    for done, n in ((one, 1), (two, 2)):
        expected = len(SEEDS) * n
        for name in ("ids", "finished", "logprobs"):
            values = getattr(done, name)
            if values is not None:
                assert len(values) == expected, f"{len(values)} {name}, not {expected}: {n} for each prompt"
    twice = [ids for ids in one.ids for _ in range(2)]
    assert two.ids == twice, "with n = 2 the likeliest completion of each prompt does not stand there twice"


@case("generator", after=WORKS)
def greedy_equals_generate(subject: Subject) -> None:
    """Greedy completions are those of model.generate, token for token."""
    done = _generate(subject, GREEDY)
    for number, (mine, theirs) in enumerate(zip(done.ids, _by_model(subject), strict=True)):
        assert mine[:NEW] == theirs, f"prompt {number}: {mine}, but model.generate gives {theirs}"


@case("generator", after=WORKS)
def logprobs_equal_recomputed(subject: Subject) -> str:
    """Log-probs are those of a plain forward, at the sampling temperature, before truncation."""
    sampling = replace(DRAWN, temperature=0.7, top_k=20)
    try:
        done, prompts = _generate(subject, sampling, n=2), _prompts(subject)
    except ConfigError:  # it has no top_k, and says so: nothing is truncated
        done, prompts = _generate(subject, replace(sampling, top_k=0), n=2), _prompts(subject)
    if done.logprobs is None:
        raise NotApplicable("it gives no log-probs; the run recomputes them")
    worst = 0.0
    for number, (ids, logps) in enumerate(zip(done.ids, done.logprobs, strict=True)):
        assert len(ids) == len(logps), f"completion {number} has {len(ids)} tokens, {len(logps)} log-probs"
        naive = _naive_logps(subject, prompts[number // 2], ids, 0.7)
        worst = max(worst, float((torch.tensor(logps) - naive).abs().max()))
    assert worst < 1e-3, f"log-probs are up to {worst:.3g} away from those of a plain forward"
    return f"within {worst:.1g}"


@case("generator", after=WORKS)
def stop_tokens_kept(subject: Subject) -> None:
    """A stop token ends a completion, and is its last token."""
    stops = _stops(subject)
    for sampling in (GREEDY, DRAWN):
        done = _generate(subject, replace(sampling, stop_token_ids=stops), n=2)
        for number, ids in enumerate(done.ids):
            inside = [token for token in ids[:-1] if token in stops]
            assert not inside, f"completion {number} goes on after the stop token {inside[0]}: {ids}"
            ended = len(ids) >= NEW or (ids and ids[-1] in stops)
            assert ended, f"completion {number} ends after {len(ids)} tokens without its stop token: {ids}"


@case("generator", after=WORKS)
def finished_flags_right(subject: Subject) -> None:
    """``finished`` is true where a stop token ended a completion, false where it was cut."""
    stops = _stops(subject)
    done = _generate(subject, replace(GREEDY, stop_token_ids=stops), n=2)
    for number, (ids, finished) in enumerate(zip(done.ids, done.finished, strict=True)):
        expected = len(ids) < NEW or ids[-1] in stops
        how = "was ended by a stop token" if expected else "was cut"
        assert bool(finished) == expected, f"completion {number} {how}, but finished is {finished}"


@case("generator", after=WORKS)
def max_length_respected(subject: Subject) -> None:
    """No completion has more than max_new_tokens tokens."""
    for longest in (1, 5, NEW):
        done = _generate(subject, replace(DRAWN, max_new_tokens=longest), n=2)
        most = max(map(len, done.ids))
        assert most <= longest, f"a completion has {most} tokens where max_new_tokens is {longest}"


@case("generator", after=WORKS)
def same_seed_same_samples(subject: Subject) -> None:
    """The same seed and prompt give the same samples, whatever else is in the batch; another seed others."""
    together = _generate(subject, DRAWN, n=3)
    assert _generate(subject, DRAWN, n=3).ids == together.ids, "asked again, it gives other samples"
    for number in range(len(SEEDS)):
        alone = _generate(subject, DRAWN, n=3, which=[number])
        assert alone.ids == together.ids[3 * number : 3 * number + 3], (
            f"prompt {number} has other samples alone than among others"
        )
    assert _generate(subject, DRAWN, n=3, shift=100).ids != together.ids, "other seeds give the same samples"
    assert len({tuple(ids) for ids in together.ids[:3]}) > 1, "the completions of a prompt are all the same"


@case("generator", after=WORKS)
def draws_as_told(subject: Subject) -> str:
    """Where top_k, top_p or min_p leave one token, it draws that one, or refuses with a ConfigError."""
    greedy, refused = _generate(subject, GREEDY), []
    for name, value in NARROWEST.items():
        options: Any = {name: value}
        try:
            drawn = _generate(subject, replace(DRAWN, **options))
        except ConfigError:
            refused.append(name)
            continue
        assert drawn.ids == greedy.ids, (
            f"{name} {value:g} leaves the likeliest token alone, and it draws others; what it cannot do it "
            "refuses with rlx.ConfigError"
        )
    if len(refused) == len(NARROWEST):
        raise NotApplicable(f"it refuses {', '.join(refused)}")
    return f"it refuses {', '.join(refused)}" if refused else ""


@contextmanager
def _other_weights(policy: Policy) -> Iterator[None]:
    """Within it the policy is another one."""
    kept = {name: parameter.detach().clone() for name, parameter in policy.trainable().items()}
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in policy.trainable().items():
                parameter.copy_(kept[name])


@case("generator", after=WORKS)
def tells_what_it_returns(subject: Subject) -> None:
    """What it tells to be complete is what it returns in the end, each completion at most once."""
    generator, prompts = subject.once("generator", subject.make), _prompts(subject)
    told: list[Complete] = []
    if not tells(generator):
        raise NotApplicable("its generate has no on_complete")
    generator.sync(_policy(subject))
    sampling, n = replace(GREEDY, stop_token_ids=_stops(subject)), 2
    done = generator.generate(prompts, n, sampling, SEEDS, on_complete=told.extend)
    places = [one.prompt * n + one.completion for one in told]
    assert len(set(places)) == len(places), "it tells a completion twice"
    for place, one in zip(places, told, strict=True):
        known = f"completion {one.completion} of prompt {one.prompt}"
        assert one.ids == done.ids[place], f"{known} is {one.ids} as told, and {done.ids[place]} in the end"
        assert bool(one.finished) == bool(done.finished[place]), (
            f"{known}: finished is told as {one.finished}"
        )


@case("generator", after=WORKS)
def follows_synced_weights(subject: Subject) -> None:
    """After ``sync`` it samples from the policy as it is now."""
    before = _generate(subject, GREEDY)
    with _other_weights(_policy(subject)):
        now = _generate(subject, GREEDY)
    assert now.ids != before.ids, "the policy's weights changed, sync was called, and the completions stayed"
    after = _generate(subject, GREEDY)
    assert after.ids == before.ids, "the policy's weights were put back, and the completions are others"


@case("generator", after=WORKS)
def leaves_the_policy_alone(subject: Subject) -> None:
    """Sampling changes neither the policy's weights nor its modes nor the global random numbers."""
    policy = _policy(subject)
    weights = {name: parameter.detach().clone() for name, parameter in policy.trainable().items()}
    policy.model.train()
    random = torch.get_rng_state()
    try:
        _generate(subject, DRAWN, n=2)
        assert policy.model.training, "the policy was in training mode, and is not any more"
    finally:
        policy.model.eval()
    changed = [name for name, p in policy.trainable().items() if not torch.equal(p, weights[name])]
    assert not changed, f"sampling changed the weights {', '.join(changed[:3])}"
    assert torch.equal(torch.get_rng_state(), random), "it drew from the global random numbers"


@case("generator", after=WORKS)
def takes_no_prompts(subject: Subject) -> None:
    """No prompts give no completions."""
    done: Any = _generate(subject, DRAWN, which=[])
    assert len(done.ids) == len(done.finished) == 0, f"{len(done.ids)} completions of no prompts"


@case("generator", after=WORKS)
def closes(subject: Subject) -> None:
    """``close`` gives back what it holds, also where nothing was synced, and can be called twice."""
    for synced in (False, True):
        generator = subject.make()
        if synced:
            generator.sync(_policy(subject))
        generator.close()
        generator.close()
