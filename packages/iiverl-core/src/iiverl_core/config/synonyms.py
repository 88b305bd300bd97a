"""Names that other programs and other versions of verl use for keys of this configuration.

Those of other versions of verl are accepted, since they mean the same. Others are only suggested.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

ACTOR, REF, ROLLOUT = (f"actor_rollout_ref.{name}" for name in ("actor", "ref", "rollout"))
MODEL = "actor_rollout_ref.model"


class Synonym(NamedTuple):
    """The known key that a name means; `note` says how to write it if its values or conditions differ."""

    key: str
    note: str = ""


_VERL = {
    # Names of other versions of verl, with the same meaning.
    "model_engine": f"{ACTOR}.strategy",
    f"{ACTOR}.model_engine": f"{ACTOR}.strategy",
    "reward.custom_reward_function": "custom_reward_function",
    **{
        f"{section}reward_manager{name}": "reward_model.reward_manager"
        for section in ("reward.", "")
        for name in ("", ".name")
    },
    "reward.reward_model": "reward_model",
    **{f"{section}.num_workers": "custom_reward_function.workers" for section in ("reward", "reward_model")},
    "reward_model.model_path": "reward_model.model.path",
    "reward.sandbox_fusion": "reward_model.sandbox_fusion",
    "sandbox_fusion": "reward_model.sandbox_fusion",
    **{
        f"{section}.reward_kwargs.{name}": key
        for section in ("reward", "reward_model")
        for name, key in (
            ("overlong_buffer_cfg", "reward_model.overlong_buffer"),
            ("max_resp_len", "data.max_response_length"),
        )
    },
    f"{ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes": f"{ROLLOUT}.update_weights_bucket_megabytes",
    f"{ROLLOUT}.cudagraph_capture_sizes": f"{ROLLOUT}.engine_kwargs.vllm.compilation_config.cudagraph_capture_sizes",
    **{
        f"{ROLLOUT}.engine_kwargs.vllm.{name}": f"{ROLLOUT}.{key}"
        for name, key in (
            ("tensor_parallel_size", "tensor_model_parallel_size"),
            *(
                (same, same)
                for same in (
                    "disable_log_stats",
                    "dtype",
                    "enable_chunked_prefill",
                    "enable_prefix_caching",
                    "enforce_eager",
                    "gpu_memory_utilization",
                    "load_format",
                    "max_model_len",
                    "max_num_batched_tokens",
                    "max_num_seqs",
                    "seed",
                )
            ),
        )
    },
    **{
        f"{role}.megatron.{state}_offload": f"{role}.{state}_offload"
        for role in (ACTOR, "critic")
        for state in ("param", "grad", "optimizer")
    },
    **{
        f"{role}.megatron.override_transformer_config.{name}": f"{role}.megatron.{name}"
        for role in (ACTOR, REF, "critic", "reward_model")
        for name in ("recompute_method", "recompute_num_layers")
    },
    **{
        f"{role}.optim.override_optimizer_config.{name}": f"{role}.optim.{name}"
        for role in (ACTOR, "critic")
        for name in ("betas", "lr", "weight_decay")
    },
    f"{REF}.megatron.param_offload": f"{REF}.param_offload",
    "reward_model.megatron.param_offload": "reward_model.param_offload",
    f"{ACTOR}.megatron.use_remove_padding": f"{MODEL}.use_remove_padding",
    "critic.megatron.use_remove_padding": "critic.model.use_remove_padding",
    f"{ACTOR}.use_remove_padding": f"{MODEL}.use_remove_padding",
    f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size": f"{ACTOR}.ulysses_sequence_parallel_size",
    f"{REF}.fsdp_config.ulysses_sequence_parallel_size": f"{REF}.ulysses_sequence_parallel_size",
    "critic.fsdp": "critic.model.fsdp_config",
    "critic.fsdp_config": "critic.model.fsdp_config",
    **{
        f"critic.{section}.ulysses_sequence_parallel_size": "critic.ulysses_sequence_parallel_size"
        for section in ("fsdp", "fsdp_config", "model.fsdp_config")
    },
    "reward_model.fsdp_config": "reward_model.model.fsdp_config",
    **{
        f"{role}.optim.{name}": f"{role}.optim.{key}"
        for role in (ACTOR, "critic")
        for name, key in (
            ("lr_scheduler_type", "warmup_style"),
            ("lr_decay_style", "warmup_style"),
            ("lr_decay_steps", "total_training_steps"),
        )
    },
    **{f"{ACTOR}.policy_loss.{name}": f"{ACTOR}.{name}" for name in ("tau_pos", "tau_neg")},
    f"{ACTOR}.checkpoint.contents": f"{ACTOR}.checkpoint.save_contents",
    f"{MODEL}.tokenizer_path": "data.tokenizer",
    **{
        f"algorithm.rollout_correction.{name}": "algorithm.rollout_correction.bypass_old_log_prob"
        for name in ("bypass_mode", "bypass_old_logprob_for_rollout")
    },
    "ray_init": "ray_kwargs.ray_init",
    "trainer.profile_steps": "global_profiler.steps",
}

_VALUES = {
    name: {"dp": None}  # the default, whichever of FSDP's names is set beside it
    for name in ("model_engine", f"{ACTOR}.model_engine")
}
"""Values that another version of verl writes differently."""

_MOVED = {
    "reward.reward_kwargs": Synonym("custom_reward_function.reward_kwargs"),
    # The enclosing section is left out.
    **{name: Synonym(f"actor_rollout_ref.{name}") for name in ("actor", "ref", "rollout", "model")},
    **{
        f"{role}.{name}": Synonym(f"{role}.optim.{name}")
        for role in (ACTOR, "critic")
        for name in (
            "lr",
            "lr_warmup_steps",
            "lr_warmup_steps_ratio",
            "min_lr",
            "min_lr_ratio",
            "warmup_style",
            "betas",
            "weight_decay",
        )
    },
    **{
        f"{role}.{name}": Synonym(f"{role}.optim.warmup_style")
        for role in (ACTOR, "critic")
        for name in ("lr_scheduler_type", "lr_decay_style")
    },
    f"{ACTOR}.loss_mode": Synonym(f"{ACTOR}.policy_loss.loss_mode"),
    "critic.path": Synonym("critic.model.path"),
    "reward_model.path": Synonym("reward_model.model.path"),
    "algorithm.kl_coef": Synonym("algorithm.kl_ctrl.kl_coef"),
    "algorithm.target_kl": Synonym("algorithm.kl_ctrl.target_kl"),
    "algorithm.horizon": Synonym("algorithm.kl_ctrl.horizon"),
    "algorithm.use_kl_loss": Synonym(f"{ACTOR}.use_kl_loss"),
    "algorithm.kl_loss_coef": Synonym(f"{ACTOR}.kl_loss_coef"),
    "algorithm.rollout_is_threshold": Synonym("algorithm.rollout_correction.rollout_is_threshold"),
    "algorithm.rollout_is_level": Synonym("algorithm.rollout_correction.rollout_is"),
}

_RENAMED = {
    # Former names in verl, and names often mistaken for its names.
    f"{ACTOR}.kl_coef": Synonym(f"{ACTOR}.kl_loss_coef"),
    f"{ACTOR}.cliprange": Synonym(f"{ACTOR}.clip_ratio"),
    f"{ACTOR}.clip_range": Synonym(f"{ACTOR}.clip_ratio"),
    f"{ACTOR}.backend": Synonym(f"{ACTOR}.strategy"),
    f"{ROLLOUT}.backend": Synonym(f"{ROLLOUT}.name"),
    f"{ROLLOUT}.engine": Synonym(f"{ROLLOUT}.name"),
    f"{ROLLOUT}.tensor_parallel_size": Synonym(f"{ROLLOUT}.tensor_model_parallel_size"),
    f"{ROLLOUT}.num_return_sequences": Synonym(f"{ROLLOUT}.n"),
    f"{ROLLOUT}.max_tokens": Synonym("data.max_response_length"),
    **{
        f"{section}.{name}": Synonym(f"{role}.optim.{key}")
        for role in (ACTOR, "critic")
        for section in (role, f"{role}.optim")
        for name, key in (
            ("learning_rate", "lr"),
            ("warmup_ratio", "lr_warmup_steps_ratio"),
            ("warmup_steps", "lr_warmup_steps"),
        )
    },
    "data.batch_size": Synonym("data.train_batch_size"),
    "data.rollout_batch_size": Synonym("data.train_batch_size"),
    "algorithm.advantage_estimator": Synonym("algorithm.adv_estimator"),
    "algorithm.estimator": Synonym("algorithm.adv_estimator"),
    "algorithm.gae_lambda": Synonym("algorithm.lam"),
    "algorithm.lambda": Synonym("algorithm.lam"),
    "algorithm.norm_adv_by_std": Synonym("algorithm.norm_adv_by_std_in_grpo"),
    "trainer.backend": Synonym(f"{ACTOR}.strategy"),
    "trainer.num_nodes": Synonym("trainer.nnodes"),
    "trainer.gpus_per_node": Synonym("trainer.n_gpus_per_node"),
    "trainer.num_gpus_per_node": Synonym("trainer.n_gpus_per_node"),
    "trainer.n_devices_per_node": Synonym("trainer.n_gpus_per_node"),
    "trainer.epochs": Synonym("trainer.total_epochs"),
    "trainer.num_epochs": Synonym("trainer.total_epochs"),
    "trainer.total_steps": Synonym("trainer.total_training_steps"),
}

BY_NAME = {
    # Arguments of TRL and transformers, which have no sections, so users may put them in any, and of early DAPO scripts.
    "use_token_level_loss": Synonym(
        f"{ACTOR}.loss_agg_mode", "token-mean for true, seq-mean-token-mean for false"
    ),
    "learning_rate": Synonym(f"{ACTOR}.optim.lr"),
    "lr_scheduler_type": Synonym(f"{ACTOR}.optim.warmup_style"),
    "warmup_ratio": Synonym(f"{ACTOR}.optim.lr_warmup_steps_ratio"),
    "warmup_steps": Synonym(f"{ACTOR}.optim.lr_warmup_steps"),
    "max_grad_norm": Synonym(f"{ACTOR}.grad_clip"),
    "num_iterations": Synonym(f"{ACTOR}.ppo_epochs"),
    "per_device_train_batch_size": Synonym(f"{ACTOR}.ppo_micro_batch_size_per_gpu"),
    "gradient_checkpointing": Synonym(f"{MODEL}.enable_gradient_checkpointing"),
    "model_name_or_path": Synonym(f"{MODEL}.path"),
    "num_generations": Synonym(f"{ROLLOUT}.n"),
    "n_samples_per_prompt": Synonym(f"{ROLLOUT}.n"),
    "vllm_gpu_memory_utilization": Synonym(f"{ROLLOUT}.gpu_memory_utilization"),
    "vllm_tensor_parallel_size": Synonym(f"{ROLLOUT}.tensor_model_parallel_size"),
    "max_completion_length": Synonym("data.max_response_length"),
    "max_new_tokens": Synonym("data.max_response_length"),
    "scale_rewards": Synonym("algorithm.norm_adv_by_std_in_grpo"),
    "num_train_epochs": Synonym("trainer.total_epochs"),
    "max_steps": Synonym("trainer.total_training_steps"),
    "save_steps": Synonym("trainer.save_freq"),
    "eval_steps": Synonym("trainer.test_freq"),
    "output_dir": Synonym("trainer.default_local_dir"),
    "run_name": Synonym("trainer.experiment_name"),
    "report_to": Synonym("trainer.logger"),
}
"""Synonyms by the last part of an unknown key, except in the sections of `OTHER_MODELS`."""

OTHER_MODELS = (REF, "critic", "reward_model")

_FLAT = {
    # Arguments that could mean something else in other sections.
    "beta": Synonym(f"{ACTOR}.kl_loss_coef", "with use_kl_loss: true"),
    "epsilon": Synonym(f"{ACTOR}.clip_ratio"),
    "epsilon_high": Synonym(f"{ACTOR}.clip_ratio_high"),
    "loss_type": Synonym(
        f"{ACTOR}.loss_agg_mode",
        "seq-mean-token-mean for grpo, token-mean for dapo, seq-mean-token-sum-norm for dr_grpo",
    ),
}

BY_PATH = {
    **_MOVED,
    **_RENAMED,
    **{
        f"{section}{name}": synonym
        for section in ("", "algorithm.", f"{ACTOR}.")
        for name, synonym in _FLAT.items()
    },
}
"""Synonyms by the full path of the unknown key or section."""


def canonical(path: str, value: Any) -> tuple[str, Any]:
    """Translate a key of another version of verl, and its value, to this configuration's; others stay as they are.

    A key in a section with another name is one in the section that it names.
    """
    seen = set()
    while path not in seen:
        seen.add(path)
        head, rest = path, ""
        while head and head not in _VERL:
            head, _, name = head.rpartition(".")
            rest = f".{name}{rest}"
        if head:
            written = _VALUES.get(path, {})
            value = written.get(value, value) if isinstance(value, str) else value
            path = _VERL[head] + rest
    return path, value


def other_names() -> dict[str, str]:
    """Return the accepted names of other versions of verl, and the key or section of each."""
    return dict(_VERL)


def find_synonym(path: str) -> Synonym | None:
    """Find the known key or section that an unknown one means; a key in a section that moved has moved too."""
    head, rest = path, ""
    while head:
        if head in BY_PATH:
            known = BY_PATH[head]
            return known._replace(key=known.key + rest) if rest else known
        head, _, name = head.rpartition(".")
        rest = f".{name}{rest}"
    if path.startswith(tuple(f"{section}." for section in OTHER_MODELS)):
        return None
    return BY_NAME.get(path.rpartition(".")[2])


def below(path: str) -> Iterator[str]:
    """Yield the paths of the tables that are within an unknown section."""
    return (other for other in (*BY_PATH, *_VERL) if other.startswith(path + "."))
