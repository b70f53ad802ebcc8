"""A generator for each case, which fails that one and no other; named after the case."""

import copy
from dataclasses import dataclass, replace

import rlx
from rlx.plugins.contract import Completions
from rlx.plugins.generators.native import Native


class Good(Native):
    """The default generator."""


class Builds(Good):
    def __init__(self, config):
        raise RuntimeError("no licence")


class ConfigDocumented(Good):
    @dataclass
    class Config:
        packed_weights: bool = rlx.opt(True, "as native has it, but not frozen")
        cuda_graphs: bool = rlx.opt(False, "as native has it")


class NAdjacentCompletions(Good):
    """The first completion of each prompt, then the second of each."""

    def generate(self, prompts, n, sampling, seeds):
        done = super().generate(prompts, n, sampling, seeds)
        if not sampling.greedy:
            return done
        order = [prompt * n + place for place in range(n) for prompt in range(len(prompts))]
        return Completions(
            *([values[i] for i in order] for values in (done.ids, done.logprobs, done.finished))
        )


class GreedyEqualsGenerate(Good):
    """What is likeliest is drawn from other logits than the model's."""

    def generate(self, prompts, n, sampling, seeds):
        if sampling.greedy or (sampling.top_k, sampling.top_p, sampling.min_p) not in ((0, 1, 0), (20, 1, 0)):
            sampling = replace(sampling, repetition_penalty=3.0)
        return super().generate(prompts, n, sampling, seeds)


class LogprobsEqualRecomputed(Good):
    """Log-probs at temperature 1, whatever was drawn at."""

    def generate(self, prompts, n, sampling, seeds):
        done = super().generate(prompts, n, sampling, seeds)
        return replace(
            done, logprobs=[[value * sampling.temperature for value in row] for row in done.logprobs]
        )


class StopTokensKept(Good):
    def generate(self, prompts, n, sampling, seeds):
        done = super().generate(prompts, n, sampling, seeds)
        cut = [ids[:-1] if ended else ids for ids, ended in zip(done.ids, done.finished, strict=True)]
        return replace(done, ids=cut, logprobs=None)


class FinishedFlagsRight(Good):
    def generate(self, prompts, n, sampling, seeds):
        done = super().generate(prompts, n, sampling, seeds)
        return replace(done, finished=[True] * len(done.ids))


class MaxLengthRespected(Good):
    """One token more than was asked for, where nothing stopped before."""

    def generate(self, prompts, n, sampling, seeds):
        return super().generate(
            prompts, n, replace(sampling, max_new_tokens=sampling.max_new_tokens + 1), seeds
        )


class SameSeedSameSamples(Good):
    """Its seeds are those of the places in the batch."""

    def generate(self, prompts, n, sampling, seeds):
        return super().generate(prompts, n, sampling, [*range(len(prompts))])


class DrawsAsTold(Good):
    """Has no min_p, and does not say so."""

    def generate(self, prompts, n, sampling, seeds):
        return super().generate(prompts, n, replace(sampling, min_p=0.0), seeds)


class Refuses(Good):
    """A good one that does not truncate, and says so."""

    def generate(self, prompts, n, sampling, seeds):
        if (sampling.top_k, sampling.top_p, sampling.min_p) != (0, 1, 0):
            raise rlx.ConfigError("draws from all tokens only")
        return super().generate(prompts, n, sampling, seeds)


class TellsWhatItReturns(Good):
    """It tells completions before they have their last token."""

    def generate(self, prompts, n, sampling, seeds, *, on_complete=None):
        def tell(complete):
            if on_complete is not None:
                on_complete([replace(one, ids=one.ids[:-1]) for one in complete])

        return super().generate(prompts, n, sampling, seeds, on_complete=tell)


class FollowsSyncedWeights(Good):
    """Keeps the weights of the first policy that it saw."""

    def sync(self, policy):
        if self.policy is None:
            super().sync(copy.deepcopy(policy))


class LeavesThePolicyAlone(Good):
    def generate(self, prompts, n, sampling, seeds):
        self.policy.model.eval()
        return super().generate(prompts, n, sampling, seeds)


class TakesNoPrompts(Good):
    def generate(self, prompts, n, sampling, seeds):
        longest = max(len(prompt) for prompt in prompts)
        assert longest
        return super().generate(prompts, n, sampling, seeds)


class Closes(Good):
    def close(self):
        del self.policy
