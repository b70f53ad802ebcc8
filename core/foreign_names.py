"""Option names of other trainers, and what rlx calls the same thing: an unknown option's error says it.

From LLaMA-Factory, TRL, ms-swift and axolotl. A name that maps to several stands for the first that the run
has.
"""

from __future__ import annotations

from collections.abc import Container

FOREIGN_NAMES: dict[str, tuple[str, ...]] = {
    # model
    "model_name_or_path": ("model",),
    "model_name": ("model",),
    "base_model": ("model",),
    "model_id": ("model",),
    "sft_model_path": ("model",),
    "ref_model": ("reference_model",),
    "ref_model_path": ("reference_model",),
    "ref_adapters": ("reference_adapter",),
    "ref_model_adapters": ("reference_adapter",),
    "reward_model_path": ("reward",),
    "value_model_path": ("value_model",),
    "tokenizer_name_or_path": ("tokenizer",),
    "tokenizer_path": ("tokenizer",),
    "torch_dtype": ("dtype",),
    "infer_dtype": ("generation_dtype",),
    "attn_impl": ("attn_implementation",),
    "flash_attn": ("attn_implementation",),
    "flash_attention": ("attn_implementation",),
    "upcast_layernorm": ("upcast_norms",),
    "disable_gradient_checkpointing": ("gradient_checkpointing",),
    # adapters
    "adapter_name_or_path": ("adapter",),
    "adapters": ("adapter",),
    "lora_model_dir": ("adapter",),
    "lora_rank": ("lora_r",),
    "lora_target": ("lora_target_modules",),
    "target_modules": ("lora_target_modules",),
    "finetuning_type": ("lora_r",),
    "tuner_type": ("lora_r",),
    "use_peft": ("lora_r",),
    # data
    "dataset_name": ("dataset",),
    "datasets": ("dataset",),
    "dataset_dir": ("dataset",),
    "dataset_path": ("dataset",),
    "dataset_train_split": ("dataset_split",),
    "val_dataset": ("eval_dataset",),
    "val_size": ("eval_dataset",),
    "max_samples": ("max_rows",),
    "num_samples": ("max_rows",),
    "template": ("chat_template",),
    "default_system": ("system_prompt",),
    "system": ("system_prompt",),
    "cutoff_len": ("max_length", "max_prompt_length"),
    "sequence_len": ("max_length", "max_prompt_length"),
    "max_seq_length": ("max_length", "max_prompt_length"),
    "max_seq_len": ("max_length", "max_prompt_length"),
    "dataset_shuffle": ("shuffle",),
    # sampling
    "max_new_tokens": ("max_completion_length",),
    "response_length": ("max_completion_length",),
    "max_response_length": ("max_completion_length",),
    "stop": ("stop_strings",),
    "stop_words": ("stop_strings",),
    "num_return_sequences": ("num_generations",),
    "generations_per_prompt": ("num_generations",),
    "rloo_k": ("num_generations",),
    # training
    "stage": ("algo",),
    "rlhf_type": ("algo",),
    "rl": ("algo",),
    "lr": ("learning_rate",),
    "num_epochs": ("num_train_epochs",),
    "epochs": ("num_train_epochs",),
    "total_episodes": ("max_steps",),
    "train_batch_size": ("batch_size",),
    "per_device_batch_size": ("per_device_train_batch_size",),
    "micro_batch_size": ("per_device_train_batch_size",),
    "mini_batch_size": ("num_mini_batches",),
    "lr_scheduler": ("lr_scheduler_type",),
    "optimizer": ("optim",),
    "gradient_clipping": ("max_grad_norm",),
    "bf16": ("mixed_precision",),
    "fp16": ("mixed_precision",),
    "padding_free": ("share_prefix",),
    "use_remove_padding": ("share_prefix",),
    "random_seed": ("seed",),
    # algorithms
    "ppo_epochs": ("num_ppo_epochs",),
    "init_kl_coef": ("kl_coef",),
    "kl_beta": ("kl_coef", "beta"),
    "kl_penalty": ("kl_estimator",),
    "adap_kl_ctrl": ("kl_controller",),
    "ppo_target": ("kl_target",),
    "target": ("kl_target",),
    "horizon": ("kl_horizon",),
    "clip_range": ("cliprange", "epsilon"),
    "clip_range_value": ("cliprange_value",),
    "ppo_score_norm": ("score_scaling",),
    "use_score_scaling": ("score_scaling",),
    "use_score_norm": ("score_scaling",),
    "ppo_whiten_rewards": ("whiten_rewards",),
    "pref_beta": ("beta",),
    "dpo_beta": ("beta",),
    "rl_beta": ("beta",),
    "reward_funcs": ("reward",),
    "reward_model": ("reward",),
    "reward_weights": ("reward_weight",),
    "reward_model_type": ("reward",),
    "reward_model_adapters": ("reward",),
    "reward_adapters": ("reward",),
    "use_ema": ("callback",),
    "enable_ema": ("callback",),
    "ema_decay": ("callback",),
    "ema_beta": ("callback",),
    # run
    "output": ("output_dir",),
    "run_name": ("output_dir",),
    "overwrite_output": ("overwrite_output_dir",),
    "log_steps": ("logging_steps",),
    "save_strategy": ("save_steps",),
    "eval_strategy": ("eval_steps",),
    "evaluation_strategy": ("eval_steps",),
    "saves_total_limit": ("save_total_limit",),
    "resume_from_checkpoint": ("resume",),
    "plot_loss": ("plots",),
    "callbacks": ("callback",),
    "custom_register_path": ("reward",),
    "external_plugins": ("reward",),
}

# Where the value changes with the name.
REMARKS: dict[str, str] = {
    "finetuning_type": "lora_r: 8 trains a LoRA adapter, lora_r: 0 all weights",
    "tuner_type": "lora_r: 8 trains a LoRA adapter, lora_r: 0 all weights",
    "use_peft": "lora_r: 8 trains a LoRA adapter, lora_r: 0 all weights",
    "bf16": "mixed_precision: bf16, or dtype: bfloat16",
    "fp16": "mixed_precision: bf16",
    "use_score_norm": "score_scaling: standardise",
    "ppo_score_norm": "score_scaling: standardise",
    "use_score_scaling": "score_scaling: std",
    "adap_kl_ctrl": "kl_controller: adaptive",
    "mini_batch_size": "num_mini_batches: batch_size / mini_batch_size",
    "total_episodes": "max_steps: total_episodes / batch_size",
    "disable_gradient_checkpointing": "gradient_checkpointing: false",
    "val_size": "eval_dataset: a file or data set of its own",
    "resume_from_checkpoint": "rlx resume DIR",
    "custom_register_path": "reward: ./file.py:Attribute, or any other reference",
    "external_plugins": "reward: ./file.py:Attribute, or any other reference",
    "reward_model_type": "reward: lora:DIR, an adapter of the policy's base; reward_model; or a URL",
    "reward_model_adapters": "reward: lora:DIR",
    "reward_adapters": "reward: lora:DIR",
    "use_ema": "callback: ema",
    "enable_ema": "callback: ema",
    "ema_decay": "callback: {name: ema, decay: …}",
    "ema_beta": "callback: {name: ema, decay: …}",
    "save_strategy": "save_steps: a number; leave it out for none",
    "eval_strategy": "eval_steps: a number; leave it out for before and after the run",
    "evaluation_strategy": "eval_steps: a number; leave it out for before and after the run",
    "stage": "algo: ppo",
    "rlhf_type": "algo: ppo",
    "rl": "algo: ppo",
}


def our_name(name: str, known: Container[str]) -> str:
    """What rlx calls an option of another trainer.

    Args:
        name: the unknown option.
        known: options that the run has.

    Returns:
        ``name: value`` advice or the name alone; empty if the name is not known from elsewhere.
    """
    if name in REMARKS:
        return REMARKS[name]
    ours = FOREIGN_NAMES.get(name, ())
    return next((option for option in ours if option in known), ours[0] if ours else "")
