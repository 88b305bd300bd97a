"""Keys of other versions of verl that nothing here reads, and why.

They are not in the sections, so they have no default and are not shown; users who set one get the reason as a warning, or
as an error if the run would be a different one. A key that means something here is a key of a section or, under another
name, in `synonyms`.
"""

import re
from collections.abc import Iterator
from functools import cache

from iiverl_core.config.sections.section import NoEffect, NotYet

ACTOR, REF, ROLLOUT = (f"actor_rollout_ref.{name}" for name in ("actor", "ref", "rollout"))
MODEL = "actor_rollout_ref.model"
TRAINED = (ACTOR, "critic")
ROLES = (ACTOR, REF, "critic", "reward_model")
MODELS = (MODEL, "critic.model", "reward_model.model")
FSDP = (
    f"{ACTOR}.fsdp_config",
    f"{REF}.fsdp_config",
    "critic.model.fsdp_config",
    "reward_model.model.fsdp_config",
)
MEGATRON = tuple(f"{role}.megatron" for role in ROLES)
OPTIM = tuple(f"{role}.optim" for role in TRAINED)
MULTI_TURN, ASYNC, LORA, MTP = (
    "responses of several turns",
    "verl's asynchronous training (trainer.max_staleness and trainer.rollout_devices do the like)",
    "LoRA under Megatron",
    "multi-token prediction",
)
DISTILLATION, ROUTER_REPLAY, QAT = (
    "distillation",
    "replaying the routing of experts",
    "training with quantized weights",
)
LOGITS = "log-probs and entropy are always computed without the logits of a whole micro-batch"
HUGGING_FACE = "weights are read from and written to Hugging Face files by iiverl itself"
FUSIONS = "fused kernels are chosen by what is installed"
STAGES = "stages of different sizes"
LOSS = "the loss is not compiled; fsdp_config.compile_blocks compiles transformer blocks"

Mark = NoEffect | NotYet


def _each(sections: tuple[str, ...], **marks: Mark) -> dict[str, Mark]:
    return {f"{section}.{name}": mark for section in sections for name, mark in marks.items()}


def _whole(section: str, mark: Mark) -> dict[str, Mark]:
    return {section: mark, f"{section}.**": mark}


_EVERYWHERE: dict[str, Mark] = {
    **{
        path: NoEffect("overrides are read without Hydra") for path in ("hydra.**", "**._target_", "_target_")
    },
    **{
        f"{role}.{name}.**": NoEffect(f"read only by verl's backend {backend}")
        for role in ROLES
        for name, backend in (
            ("veomni", "veomni"),
            ("torchtitan", "torchtitan"),
            ("mindspeed", "mindspeed"),
            ("engine", "of this name"),
        )
    },
    **{
        f"{role}.rollout_n": NoEffect(f"{ROLLOUT}.n is the size of a group for every model") for role in ROLES
    },
    **_each(
        (ACTOR, "critic"),
        data_loader_seed=NoEffect("mini-batches are shuffled by data.seed"),
    ),
}

_MODEL: dict[str, Mark] = {
    **_each(
        MODELS,
        hf_config_path=NotYet("a config.json in another folder than the weights", (None,)),
        use_shm=NoEffect("the first process reads the weights where they are, and sends them to the others"),
        custom_chat_template=NotYet("a chat template that is not the tokenizer's", (None,)),
        enable_activation_offload=NotYet("activations in CPU memory", (False,), blocks=False),
        use_fused_kernels=NoEffect(LOGITS),
    ),
    **{
        f"{model}.{name}": mark
        for model in MODELS
        for name, mark in {
            "fused_kernel_options.**": NoEffect(LOGITS),
            "tiled_mlp.enabled": NotYet("an MLP in tiles", (False,), blocks=False),
            "tiled_mlp.**": NoEffect("read only with tiled_mlp.enabled, which is not supported"),
            "mtp.enable": NotYet(MTP, (False,)),
            "mtp.**": NoEffect("read only with mtp.enable, which is not supported"),
            "lora.rank": NotYet(LORA, (0,)),
            "lora.**": NoEffect(
                "read only with lora.rank, which is not supported; under FSDP, LoRA has keys without a section: lora_rank, lora_alpha"
            ),
        }.items()
    },
    "reward_model.model.tokenizer_path": NoEffect("the tokenizer is in the folder of the model"),
    **_each((MODEL, "critic.model"), mtp=NotYet(MTP, (None,))),
    **_each(
        ("actor_rollout_ref", "critic", "reward_model"),
        nccl_timeout=NoEffect("trainer.stall_timeout ends a run in which nothing moves"),
    ),
}

_LAYOUT: dict[str, Mark] = {
    **_each(
        FSDP,
        strategy=NoEffect("all models share the backend of actor_rollout_ref.actor.strategy"),
        grad_offload=NoEffect("gradients are offloaded with the weights, by param_offload"),
        min_num_params=NoEffect("FSDP2 wraps each layer of the model"),
        forward_prefetch=NoEffect("FSDP2 gathers the next layer's weights while one is computed"),
        use_orig_params=NoEffect("FSDP2 always keeps the model's parameters"),
        entropy_checkpointing=NoEffect(LOGITS),
        entropy_from_logits_with_chunking=NoEffect(LOGITS),
        entropy_from_logits_chunk_size=NoEffect(LOGITS),
        use_torch_compile=NoEffect(LOSS),
        dtype=NoEffect("mixed_precision.param_dtype is the dtype of forward and backward passes"),
        forward_only=NoEffect("the role of a model decides whether it is trained"),
        seed=NoEffect("data.seed and actor_rollout_ref.rollout.seed decide all random numbers"),
        full_determinism=NoEffect("trainer.deterministic does it for all models and engines"),
        pad_to_length=NoEffect("sequences are packed, or padded to the longest"),
        pad_to_length_bucket=NoEffect("sequences are packed, or padded to the longest"),
    ),
    **_each(
        (f"{REF}.megatron", "reward_model.megatron"),
        grad_offload=NoEffect("only a trained model has gradients"),
        optimizer_offload=NoEffect("only a trained model has an optimizer"),
        use_remove_padding=NoEffect("use_remove_padding of the model decides"),
    ),
    **{f"{section}.qat.enable": NotYet(QAT, (False,)) for section in (*FSDP, *MEGATRON, ACTOR)},
    **{
        f"{section}.qat.**": NoEffect("read only with qat.enable, which is not supported")
        for section in (*FSDP, *MEGATRON, ACTOR)
    },
    **_each(
        MEGATRON,
        expert_tensor_parallel_size=NotYet("experts that are split by tensor", (None, 1)),
        use_distributed_optimizer=NotYet("an optimizer that is not distributed", (True,), blocks=False),
        use_dist_checkpointing=NoEffect(HUGGING_FACE),
        dist_checkpointing_path=NoEffect(HUGGING_FACE),
        dist_checkpointing_prefix=NoEffect(HUGGING_FACE),
        dist_ckpt_optim_fully_reshardable=NoEffect("every parallel layout can read a checkpoint"),
        distrib_optim_fully_reshardable_mem_efficient=NoEffect("every parallel layout can read a checkpoint"),
        use_mbridge=NoEffect(HUGGING_FACE),
        vanilla_mbridge=NoEffect(HUGGING_FACE),
        num_layers_per_virtual_pipeline_stage=NotYet(
            "chunks of a stage by their layers; virtual_pipeline_model_parallel_size counts them", (None,)
        ),
        use_megatron_fsdp=NotYet("Megatron-FSDP; the backend fsdp shards all weights", (False,)),
        dynamic_context_parallel=NotYet(
            "context parallelism that depends on lengths", (False,), blocks=False
        ),
        max_seqlen_per_dp_cp_rank=NotYet(
            "context parallelism that depends on lengths", (None,), blocks=False
        ),
        pad_bshd_to_minibatch_max=NoEffect(
            "padded sequences have the length of the longest of their micro-batch"
        ),
        pad_to_length=NoEffect("sequences are packed, or padded to the longest"),
        pad_to_length_bucket=NoEffect("sequences are packed, or padded to the longest"),
        entropy_from_logits_with_chunking=NoEffect(LOGITS),
        entropy_from_logits_chunk_size=NoEffect(LOGITS),
        forward_only=NoEffect("the role of a model decides whether it is trained"),
        override_ddp_config=NotYet("options of Megatron's gradient buffers", ({}, None), blocks=False),
        override_mcore_model_config=NotYet("options of Megatron's models", ({}, None)),
        override_transformer_config=NoEffect("its keys are read one by one"),
    ),
    **{
        f"{section}.{name}": mark
        for section in (*MEGATRON, ACTOR, REF)
        for name, mark in {
            "router_replay.mode": NotYet(ROUTER_REPLAY, ("disabled",)),
            "router_replay.**": NoEffect("read only with router_replay.mode, which is not supported"),
        }.items()
    },
    **{
        f"{section}.override_transformer_config.{name}": mark
        for section in MEGATRON
        for name, mark in {
            "recompute_granularity": NoEffect(
                "enable_gradient_checkpointing of the model decides whether whole layers are recomputed"
            ),
            "recompute_modules": NoEffect("whole layers are recomputed, not parts of them"),
            "attention_backend": NoEffect("attention is chosen by the layout and by what is installed"),
            "use_flash_attn": NoEffect("attention is chosen by the layout and by what is installed"),
            "sequence_parallel": NoEffect("the key sequence_parallel of the section megatron decides"),
            "context_parallel_size": NoEffect(
                "the key context_parallel_size of the section megatron decides"
            ),
            "context_parallel_algo": NoEffect("read only by verl's backend mindspeed"),
            "cp_partition_mode": NoEffect("sequences are split evenly over the processes"),
            "max_seqlen_per_dp_cp_rank": NotYet(
                "context parallelism that depends on lengths", (None,), blocks=False
            ),
            "sequence_packing_scheduler": NoEffect("micro-batches are balanced by iiverl itself"),
            "use_distributed_optimizer": NotYet(
                "an optimizer that is not distributed", (True,), blocks=False
            ),
            **{
                name: NoEffect(FUSIONS)
                for name in (
                    "apply_rope_fusion",
                    "bias_activation_fusion",
                    "bias_dropout_fusion",
                    "gradient_accumulation_fusion",
                    "masked_softmax_fusion",
                    "moe_grouped_gemm",
                    "moe_permute_fusion",
                    "moe_shared_expert_overlap",
                    "persist_layer_norm",
                    "use_fused_rmsnorm",
                    "use_fused_swiglu",
                    "use_fused_mhc",
                    "use_naive_l2norm",
                    "apply_dsa_kernel_fusion",
                )
            },
            "normalization": NoEffect("the architecture of the model decides"),
            "swiglu": NoEffect("the architecture of the model decides"),
            "deallocate_pipeline_outputs": NoEffect("outputs are freed once the next stage has them"),
            "moe_router_dtype": NotYet("another dtype of the router than fp32", ("fp32",), blocks=False),
            "moe_token_dispatcher_type": NotYet(
                "another dispatcher than alltoall", ("alltoall",), blocks=False
            ),
            "moe_enable_deepep": NotYet("DeepEP", (False,), blocks=False),
            "moe_router_load_balancing_type": NotYet(
                "auxiliary losses of the router, which would depend on how the work is divided", ("none",)
            ),
            "moe_aux_loss_coeff": NotYet(
                "auxiliary losses of the router, which would depend on how the work is divided", (0,)
            ),
            "moe_z_loss_coeff": NotYet(
                "auxiliary losses of the router, which would depend on how the work is divided", (0, None)
            ),
            "moe_router_enable_expert_bias": NotYet("a bias of the router that changes", (False,)),
            "moe_router_bias_update_rate": NotYet("a bias of the router that changes", (0,)),
            "dsa_indexer_loss_coeff": NoEffect("the models that have an indexer are not supported"),
            "dsa_indexer_use_sparse_loss": NoEffect("the models that have an indexer are not supported"),
            "pipeline_model_parallel_layout": NotYet(STAGES, (None,)),
            "num_layers_in_first_pipeline_stage": NotYet(STAGES, (None,)),
            "num_layers_in_last_pipeline_stage": NotYet(STAGES, (None,)),
            "account_for_embedding_in_pipeline_split": NotYet(STAGES, (False,)),
            "account_for_loss_in_pipeline_split": NotYet(STAGES, (False,)),
        }.items()
    },
}

_TRAINING: dict[str, Mark] = {
    **_each(
        (ACTOR, REF),
        use_fused_kernels=NoEffect(LOGITS),
        entropy_from_logits_with_chunking=NoEffect(LOGITS),
        entropy_from_logits_chunk_size=NoEffect(LOGITS),
        entropy_checkpointing=NoEffect(LOGITS),
        use_prefix_grouper=NoEffect("what the responses of a group share is computed once in any case"),
        pad_to_length=NoEffect("sequences are packed, or padded to the longest"),
        calculate_entropy=NoEffect("the entropy is always computed"),
        calculate_sum_pi_squared=NotYet("sums of squared probabilities", (False,), blocks=False),
        sum_pi_squared_checkpointing=NoEffect(
            "read only with calculate_sum_pi_squared, which is not supported"
        ),
    ),
    f"{REF}.use_torch_compile": NoEffect(LOSS),
    f"{REF}.model": NotYet("a reference that is not the initial policy", (None,)),
    f"{REF}.model.**": NotYet("a reference that is not the initial policy", (None,)),
    f"{ACTOR}.policy_loss.dro_beta": NotYet("the policy loss DRO", (None,), blocks=False),
    "critic.loss_agg_mode": NoEffect(f"{ACTOR}.loss_agg_mode is that of both losses"),
    "critic.loss_scale_factor": NoEffect(f"{ACTOR}.loss_scale_factor is that of both losses"),
    **_whole("critic.checkpoint", NoEffect(f"{ACTOR}.checkpoint decides for the whole run")),
    f"{ACTOR}.checkpoint.load_contents": NoEffect("a run resumes with everything that its checkpoint has"),
    f"{ACTOR}.checkpoint.strict": NoEffect("weights that are missing or left over are always errors"),
    f"{ACTOR}.checkpoint.mbridge_config": NoEffect(HUGGING_FACE),
    f"{ACTOR}.checkpoint.mbridge_config.**": NoEffect(HUGGING_FACE),
    **_each(
        OPTIM,
        optimizer=NotYet("an optimizer other than AdamW", ("AdamW", "adam")),
        optimizer_impl=NotYet("an optimizer other than AdamW", ("torch.optim",), blocks=False),
        num_cycles=NotYet("more than half a cosine", (0.5,)),
        zero_indexed_step=NotYet("a first step whose learning rate is not 0", (True,), blocks=False),
        lr_warmup_init=NotYet("a warm-up that does not begin at 0", (0,)),
        weight_decay_incr_style=NotYet("a weight decay that changes", ("constant",)),
        lr_wsd_decay_style=NoEffect("read only with a schedule that is not supported"),
        lr_wsd_decay_steps=NoEffect("read only with a schedule that is not supported"),
        use_checkpoint_opt_param_scheduler=NoEffect("the schedule is that of the YAML file"),
        use_precision_aware_optimizer=NotYet("optimizer states that are not fp32", (False,), blocks=False),
        main_grads_dtype=NotYet("optimizer states that are not fp32", ("fp32",), blocks=False),
        exp_avg_dtype=NotYet("optimizer states that are not fp32", ("fp32",), blocks=False),
        exp_avg_sq_dtype=NotYet("optimizer states that are not fp32", ("fp32",), blocks=False),
        use_layer_wise_distributed_optimizer=NotYet("the optimizer Muon", (False,), blocks=False),
        override_optimizer_config=NotYet("other options of AdamW", ({}, None)),
    ),
    **{
        f"{optim}.muon_*": NoEffect("read only by the optimizer Muon, which is not supported")
        for optim in OPTIM
    },
    **{
        f"{optim}.override_optimizer_config.{name}": mark
        for optim in OPTIM
        for name, mark in {
            "use_precision_aware_optimizer": NotYet(
                "optimizer states that are not fp32", (False,), blocks=False
            ),
            "decoupled_weight_decay": NotYet("an optimizer other than AdamW", (True,)),
            "amsgrad": NotYet("an optimizer other than AdamW", (False,)),
            "maximize": NotYet("an optimizer other than AdamW", (False,)),
            **{name: NotYet("an epsilon of AdamW other than 1e-8", (1e-8,)) for name in ("eps", "adam_eps")},
            **{
                name: NoEffect("the key betas of the section optim decides")
                for name in ("adam_beta1", "adam_beta2")
            },
            **{
                name: NoEffect("AdamW takes its step in torch's fused kernel")
                for name in ("capturable", "differentiable", "foreach", "fused")
            },
            **{
                name: NoEffect(
                    "optimizer_offload keeps the optimizer's state in CPU memory; its step runs on the device"
                )
                for name in (
                    "optimizer_cpu_offload",
                    "optimizer_offload_fraction",
                    "offload_fraction",
                    "overlap_cpu_optimizer_d2h_h2d",
                )
            },
        }.items()
    },
}

_ROLLOUT: dict[str, Mark] = {
    **_each(
        (ROLLOUT,),
        nnodes=NotYet(ASYNC, (0,)),
        n_gpus_per_node=NoEffect("trainer.rollout_devices counts the devices that only generate"),
        data_parallel_size=NoEffect("there are as many engines as the devices hold"),
        pipeline_model_parallel_size=NotYet("an engine that is split into stages", (1,), blocks=False),
        expert_parallel_size=NotYet(
            "an engine that distributes experts; they are split like other weights", (1,), blocks=False
        ),
        moe_tensor_parallel_size=NoEffect("read only by verl's engine trtllm"),
        full_determinism=NoEffect("trainer.deterministic does it for all models and engines"),
        logprobs_mode=NoEffect("log-probs are those of the distribution that is sampled from"),
        scheduling_policy=NotYet(
            "another order of requests than that of their arrival", ("fcfs",), blocks=False
        ),
        layered_summon=NoEffect("weights are always sent tensor by tensor"),
        multi_stage_wake_up=NoEffect("weights are always woken before the cache"),
        over_sample_rate=NotYet(ASYNC, (0,)),
        skip_rollout=NotYet("responses of an earlier run", (False,)),
        skip_dump_dir=NoEffect("read only with skip_rollout, which is not supported"),
        skip_tokenizer_init=NoEffect("the engine reads and writes token ids"),
        quantization=NotYet("an engine with quantized weights", (None,)),
        quantization_config_file=NotYet("an engine with quantized weights", (None,)),
        enable_rollout_routing_replay=NotYet(ROUTER_REPLAY, (False,)),
        moe_load_balance_metrics_interval=NotYet("metrics of experts", (0,), blocks=False),
        limit_images=NoEffect("a prompt may have any number of images"),
        chat_scheduler=NotYet(MULTI_TURN, (None,)),
        mtp=NotYet(MTP, (None,)),
        qat=NotYet(QAT, (None,)),
    ),
    **{
        f"{ROLLOUT}.{name}": mark
        for name, mark in {
            "engine_kwargs.sglang": NoEffect("read only by verl's engine sglang"),
            "engine_kwargs.sglang.**": NoEffect("read only by verl's engine sglang"),
            "engine_kwargs.trtllm": NoEffect("read only by verl's engine trtllm"),
            "engine_kwargs.trtllm.**": NoEffect("read only by verl's engine trtllm"),
            "checkpoint_engine.**": NoEffect("how weights are sent depends on the devices alone"),
            **{
                f"multi_turn.{name}": NoEffect("read only by verl's loops of turns")
                for name in (
                    "completion_callback",
                    "function_tool_path",
                    "interaction_config_path",
                    "max_parallel_calls",
                    "num_repeat_rollouts",
                    "tokenization_sanity_check_mode",
                    "tool_config_path",
                    "use_inference_chat_template",
                )
            },
            "agent.agent_loop_config_path": NotYet(MULTI_TURN, (None,)),
            "agent.agent_loop_manager_class": NotYet(MULTI_TURN, (None,)),
            "agent.custom_async_server.**": NotYet(MULTI_TURN, (None,)),
            "agent.num_workers": NoEffect("read only by verl's agent loops"),
            "trace.backend": NotYet("traces of responses", (None,), blocks=False),
            "trace.**": NoEffect("read only with trace.backend, which is not supported"),
            "prometheus.enable": NotYet("metrics of engines for Prometheus", (False,), blocks=False),
            "prometheus.**": NoEffect("read only with prometheus.enable, which is not supported"),
            "disaggregation.enabled": NotYet("engines of their own for prompts", (False,)),
            "disaggregation.**": NoEffect("read only with disaggregation.enabled, which is not supported"),
        }.items()
    },
}

_DATA: dict[str, Mark] = _each(
    ("data",),
    use_shm=NoEffect("datasets are read where they are"),
    tool_config_path=NotYet(MULTI_TURN, (None,)),
    function_tool_path=NotYet(MULTI_TURN, (None,)),
    return_full_prompt=NoEffect("prompts always keep their columns"),
    return_multi_modal_inputs=NoEffect("images are processed where responses are generated"),
    dataloader_num_workers=NoEffect("prompts are tokenized once, before the first step"),
    filter_overlong_prompts_workers=NoEffect("prompts are tokenized in one pass"),
    image_patch_size=NoEffect("the model's processor knows it"),
    video_key=NoEffect("prompts have texts and images only"),
    audio_key=NoEffect("prompts have texts and images only"),
    mm_processor_kwargs=NotYet(
        "arguments of the processor other than data.min_pixels and data.max_pixels", ({}, None)
    ),
    validation_shuffle=NotYet("shuffling the validation prompts", (False,), blocks=False),
) | {
    "data.custom_cls.**": NotYet("a dataset class of the user's", (None,)),
    "data.sampler.class_path": NotYet("a sampler of the user's", (None,)),
    "data.sampler.class_name": NotYet("a sampler of the user's", (None,)),
    "data.datagen.path": NotYet("generated data", (None,)),
    "data.datagen.name": NotYet("generated data", (None,)),
    "data.continuous_token.enable": NotYet(MULTI_TURN, (False,)),
    "data.continuous_token.**": NoEffect("read only with continuous_token.enable, which is not supported"),
}

_REWARDS: dict[str, Mark] = {
    **_each(
        ("reward", "reward_model"),
        launch_reward_fn_async=NoEffect("rewards are computed while responses are generated"),
        use_reward_loop=NoEffect("rewards are computed while responses are generated"),
        enable_resource_pool=NotYet("a reward model on devices of its own", (False, None)),
        n_gpus_per_node=NoEffect("the reward model runs on the devices that train"),
        nnodes=NoEffect("the reward model runs on the devices that train"),
        reward_loop_source=NotYet("reward managers of the user's", (None, "register")),
        reward_loop_module_path=NotYet("reward managers of the user's", (None,)),
        reward_loop_class_name=NotYet("reward managers of the user's", (None,)),
    ),
    "reward.reward_manager.source": NotYet("reward managers of the user's", ("register",)),
    "reward_model.reward_manager.source": NotYet("reward managers of the user's", ("register",)),
    "reward_model.reward_manager.module.**": NoEffect("read only with another source of reward managers"),
    "reward.reward_manager.module.**": NoEffect("read only with another source of reward managers"),
    "reward_model.rollout.**": NoEffect("the reward model runs in the training backend, without an engine"),
    "reward_model.sandbox_fusion.url": NotYet("Sandbox Fusion without a reward server", (None,)),
    "reward_model.sandbox_fusion.**": NoEffect("read only with sandbox_fusion.url, which is not supported"),
}

_ALGORITHM: dict[str, Mark] = {
    "algorithm.use_pf_ppo": NotYet("PF-PPO", (False,)),
    "algorithm.pf_ppo.**": NoEffect("read only with use_pf_ppo, which is not supported"),
    "algorithm.gdpo_reward_keys": NotYet("GDPO", (None,), blocks=False),
    "algorithm.gdpo_reward_weights": NotYet("GDPO", (None,), blocks=False),
    "algorithm.filter_groups.max_inflight_gen_batches": NotYet(ASYNC, (1,), blocks=False),
    "algorithm.rollout_correction.loss_type": NotYet(
        "another loss of rollout correction", ("ppo_clip", None)
    ),
    "algorithm.rollout_correction.rollout_is_batch_normalize": NotYet(
        "importance weights whose mean is 1", (False,)
    ),
    "distillation.enabled": NotYet(DISTILLATION, (False,)),
    "distillation.**": NoEffect("read only with distillation.enabled, which is not supported"),
}

_TRAINER: dict[str, Mark] = {
    **_each(
        ("trainer",),
        use_legacy_worker_impl=NoEffect("there is one implementation of workers"),
        use_v1=NoEffect("there is one trainer"),
        esi_redundant_time=NoEffect("a run saves when it is asked to end"),
        ray_wait_register_center_timeout=NoEffect("workers are waited for as long as they make progress"),
    ),
    "trainer.v1.trainer_mode": NotYet(ASYNC, ("sync",)),
    "trainer.v1.**": NoEffect("read only by verl's asynchronous trainers"),
    "trainer.npu_profile.**": NoEffect("read only by the profiler npu"),
    "trainer.controller_nsight_options.**": NoEffect("read only by the profiler nsys"),
    "trainer.worker_nsight_options.**": NoEffect("read only by the profiler nsys"),
    "async_training.**": NotYet(ASYNC, ()),
    "rollout.nnodes": NotYet(ASYNC, (0,)),
    "rollout.n_gpus_per_node": NoEffect("trainer.rollout_devices counts the devices that only generate"),
    "rollout.total_rollout_steps": NotYet(ASYNC, (None,)),
    "transfer_queue.**": NoEffect("token arrays are sent by the runtime"),
    "skip.*.enable": NotYet("responses of an earlier run", (False,)),
    "skip.**": NoEffect("read only with enable, which is not supported"),
    "ray_kwargs.timeline_json_file": NotYet("Ray's timeline", (None,), blocks=False),
    "ray_kwargs.ray_init.num_gpus": NoEffect("Ray counts the GPUs of a machine itself"),
    "ray_kwargs.ray_init.address": NoEffect("RAY_ADDRESS names the cluster"),
    **_each(
        ("ray_kwargs.ray_init",),
        **dict.fromkeys(
            (
                "_temp_dir",
                "dashboard_host",
                "dashboard_port",
                "include_dashboard",
                "labels",
                "local_mode",
                "log_to_driver",
                "logging_level",
                "namespace",
                "object_store_memory",
                "resources",
            ),
            NotYet("other options of ray.init", (None,), blocks=False),
        ),
    ),
    **_each(
        ("ray_kwargs.ray_init.runtime_env",),
        **dict.fromkeys(
            (
                "conda",
                "excludes",
                "pip",
                "py_executable",
                "py_modules",
                "uv",
                "worker_process_setup_hook",
                "working_dir",
            ),
            NoEffect("workers run what is installed on their machine, in the working folder of this command"),
        ),
    ),
    **{
        f"{section}.{name}": mark
        for section in (REF, ROLLOUT, "critic", "reward_model")
        for name, mark in {
            "profiler.**": NoEffect("a process is profiled as a whole, by actor_rollout_ref.actor.profiler"),
        }.items()
    },
    f"{ACTOR}.profiler.tool": NoEffect("global_profiler.tool decides"),
    f"{ACTOR}.profiler.save_path": NoEffect("global_profiler.save_path decides"),
    f"{ACTOR}.profiler.tool_config.torch.discrete": NoEffect("a trace has one whole step"),
    f"{ACTOR}.profiler.tool_config.torch.schedule.**": NoEffect("a trace has one whole step"),
    **{
        f"{ACTOR}.profiler.tool_config.{tool}.**": NoEffect("read only by another tool than torch")
        for tool in ("npu", "nsys", "precision_debugger", "torch_memory")
    },
    "global_profiler.profile_continuous_steps": NoEffect("a trace has one whole step"),
    "global_profiler.global_tool_config.**": NoEffect("read only by another tool than torch"),
}

VERL_KEYS: dict[str, Mark] = {
    **_EVERYWHERE,
    **_MODEL,
    **_LAYOUT,
    **_TRAINING,
    **_ROLLOUT,
    **_DATA,
    **_REWARDS,
    **_ALGORITHM,
    **_TRAINER,
}
"""By the path of a key, in which `*` stands for any name and `**` for any path: why nothing reads it.

The first that matches counts.
"""


@cache
def _patterns() -> tuple[tuple[re.Pattern[str], Mark], ...]:
    def pattern(path: str) -> re.Pattern[str]:
        return re.compile(re.escape(path).replace(r"\*\*", ".+").replace(r"\*", r"[^.]+"))

    return tuple((pattern(path), mark) for path, mark in VERL_KEYS.items() if "*" in path)


def unread(path: str) -> Mark | None:
    """Return why nothing here reads a key of verl; None if verl has no such key."""
    if path in VERL_KEYS:
        return VERL_KEYS[path]
    return next((mark for pattern, mark in _patterns() if pattern.fullmatch(path)), None)


def unread_below(section: str) -> Iterator[str]:
    """Yield the paths of the table that are within a section."""
    return (path for path in VERL_KEYS if path.startswith(section + "."))
