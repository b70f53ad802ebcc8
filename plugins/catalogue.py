"""The built-in components, offered through the same door as anybody's. Strings: nothing is imported here."""

from __future__ import annotations

from typing import Any

from rlx.plugins.hookspecs import hookimpl
from rlx.plugins.loading import load
from rlx.plugins.registry import Registry

COMPONENTS = {
    "algorithm": {
        "cpo": ("rlx.algorithms.cpo:CPO", "contrastive preference optimisation, SimPO, AlphaPO"),
        "dpo": ("rlx.algorithms.dpo:DPO", "direct preference optimisation, fifteen losses"),
        "kto": ("rlx.algorithms.kto:KTO", "learn from completions that are each just good or bad"),
        "orpo": ("rlx.algorithms.orpo:ORPO", "imitate and prefer at once, without a reference"),
        "ppo": ("rlx.algorithms.ppo:PPO", "proximal policy optimisation with a value function"),
        "rloo": ("rlx.algorithms.rloo:RLOO", "REINFORCE with the other completions as baseline"),
        "grpo": ("rlx.algorithms.grpo:GRPO", "advantages within a group; DAPO, Dr. GRPO, GSPO, CISPO"),
        "online_dpo": ("rlx.algorithms.online_dpo:OnlineDPO", "DPO on pairs that the policy samples"),
        "sft": ("rlx.algorithms.sft:SFT", "imitates demonstrations"),
        "reward": ("rlx.algorithms.reward:RewardModel", "a reward model from preference pairs"),
    },
    "reward": {
        "exact_match": ("rlx.rewards.exact_match:ExactMatch", "1 if the final answer is the data's"),
        "accuracy": (
            "rlx.rewards.accuracy:Accuracy",
            "1 if the final answer equals the data's as mathematics",
        ),
        "contains": ("rlx.rewards.contains:Contains", "1 if the completion contains keywords"),
        "regex": ("rlx.rewards.regex:Regex", "1 if a regular expression matches the completion"),
        "format": ("rlx.rewards.regex:Format", "1 if reasoning and answer stand in their tags"),
        "length": ("rlx.rewards.length:Length", "penalty for each token away from a target length"),
        "cosine_length": (
            "rlx.rewards.cosine_length:CosineLength",
            "right and wrong, scaled with the length",
        ),
        "json_valid": ("rlx.rewards.json_valid:JsonValid", "1 if the completion is JSON, with keys if asked"),
        "overlong": ("rlx.rewards.length:Overlong", "soft punishment near the longest length"),
        "reward_model": ("rlx.rewards.reward_model:RewardModel", "score of a sequence-classification model"),
        "http": ("rlx.rewards.http:Http", "scores from a server; its URL alone will do"),
        "lora": ("rlx.rewards.lora:LoraReward", "score of a classifier's LoRA adapter of the policy's base"),
        "repetition": ("rlx.rewards.repetition:Repetition", "penalty for repeated n-grams"),
    },
    "transform": {
        "alpaca_to_messages": (
            "rlx.plugins.transforms.columns:AlpacaMessages",
            "Alpaca's instruction, input and output as messages",
        ),
        "chat_template": (
            "rlx.plugins.transforms.chat:ChatTemplate",
            "renders conversations as text; always there, the last but packing",
        ),
        "column_map": ("rlx.plugins.transforms.columns:ColumnMap", "copies columns under other names"),
        "conversation_prompt": (
            "rlx.plugins.transforms.chat:ConversationPrompt",
            "a dialogue up to its last user turn as the prompt",
        ),
        "extract_prompt": (
            "rlx.plugins.transforms.preference:ExtractPrompt",
            "the prompt that the dialogues chosen and rejected begin with",
        ),
        "filter": ("rlx.plugins.transforms.selection:Filter", "rows whose column meets conditions"),
        "drop_duplicates": (
            "rlx.plugins.transforms.columns:DropDuplicates",
            "one row of each prompt, or of what other columns hold",
        ),
        "instruction_prompt": (
            "rlx.plugins.transforms.columns:InstructionPrompt",
            "Alpaca's instruction and input as the prompt",
        ),
        "packing": (
            "rlx.plugins.transforms.packing:Packing",
            "puts short demonstrations together into rows of one size",
        ),
        "sharegpt_to_messages": (
            "rlx.plugins.transforms.chat:ShareGPTMessages",
            "ShareGPT's conversations as messages",
        ),
        "split_conversation": (
            "rlx.plugins.transforms.chat:SplitConversation",
            "a dialogue as prompt and completion, cut after its last user turn",
        ),
        "truncate": ("rlx.plugins.transforms.selection:Truncate", "cuts a column of text to a few tokens"),
        "unpair": ("rlx.plugins.transforms.preference:Unpair", "pairs as single labelled completions"),
    },
    "callback": {
        "rich_progress": (
            "rlx.callbacks.rich_progress:RichProgress",
            "live panel on a terminal, plain lines elsewhere; always on",
        ),
        "log_completions": (
            "rlx.callbacks.completions:LogCompletions",
            "samples into completions.jsonl; always on",
        ),
        "plots": ("rlx.callbacks.plots:Plots", "curves as PNG files when the run ends; always on"),
        "health": ("rlx.callbacks.health:Health", "hints about what usually goes wrong; always on"),
        "model_card": ("rlx.callbacks.model_card:ModelCard", "README.md beside the policy; always on"),
        "sync_ref_model": (
            "rlx.callbacks.sync_ref_model:SyncRefModel",
            "moves the reference after the policy; on with sync_ref_model",
        ),
        "ema": (
            "rlx.callbacks.ema:EMA",
            "moving average of the policy's weights, evaluated and saved beside it",
        ),
        "trackers": ("rlx.callbacks.trackers:Trackers", "log lines to the trackers of report_to; always on"),
        "early_stopping": (
            "rlx.callbacks.early_stopping:EarlyStopping",
            "ends the run when a metric stops getting better",
        ),
        "best_checkpoint": (
            "rlx.callbacks.best_checkpoint:BestCheckpoint",
            "keeps the checkpoint at which a metric was best",
        ),
        "win_rate": ("rlx.callbacks.win_rate:WinRate", "how often the policy beats a baseline, by a judge"),
    },
    "generator": {
        "native": (
            "rlx.plugins.generators.native:Native",
            "prefill once a prompt, drop finished rows; the default",
        ),
        "transformers": ("rlx.plugins.generators.plain:Plain", "model.generate of transformers"),
        "paged": (
            "rlx.plugins.generators.paged:Paged",
            "continuous batching of transformers: paged cache, freed rows refilled",
        ),
    },
    "judge": {
        "reward": ("rlx.plugins.judges.reward:RewardJudge", "the higher reward wins"),
        "openai": (
            "rlx.plugins.judges.openai:OpenAIJudge",
            "a language model behind an OpenAI-compatible server",
        ),
        "random": ("rlx.plugins.judges.random:RandomJudge", "draws its verdicts, for tests"),
    },
    "dataset": {
        "wordmath": (
            "rlx.plugins.datasets.wordmath:WordMath",
            "one-step word problems with checkable answers, generated in code",
        ),
    },
}


@hookimpl
def rlx_validate(config: Any) -> None:
    """Refuse what could only fail later: options of paged, trackers, a reward adapter without its base."""
    if config.generator.ref == "paged":
        check_settings = load("rlx.plugins.generators.paged:check_settings")
        check_settings(config.settings)
    scoring = [component.ref for component, _ in config.rewards] + [part.ref for part in config.callbacks]
    # An object that Python was given may be unhashable, or compare in a way of its own.
    asked = any(isinstance(ref, str) and ref in ("lora", "win_rate") for ref in scoring)
    if config.judge is not None or asked:
        check_policy = load("rlx.rewards.lora:check_policy")
        check_policy(config)
    if config.settings.report_to:
        check_trackers = load("rlx.callbacks.trackers:check_trackers")
        check_trackers(config.settings.report_to, completions=config.settings.track_completions)


@hookimpl
def rlx_register(registry: Registry) -> None:
    """Offer every built-in component."""
    for kind, components in COMPONENTS.items():
        for name, (target, summary) in components.items():
            registry.add(kind, name, target, summary)
