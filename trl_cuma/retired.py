# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Keys of older recipes that today's TRL and transformers no longer read, and what to write instead.

By the class that had the key: what stands under `TrainingArguments` holds for every trainer. Names in backticks are
fields of today's.
"""

RETIRED: dict[str, dict[str, str]] = {
    "TrainingArguments": {
        # the model
        "torch_dtype": "`dtype`",
        "use_flash_attention_2": "`attn_implementation`: flash_attention_2",
        "use_liger": "`use_liger_kernel`",
        "gradient_checkpointing_use_reentrant": "`gradient_checkpointing_kwargs`: {use_reentrant: true or false}",
        "use_unsloth": "gone: remove it",
        # the data
        "dataset_mixture": "`datasets`, at the top level, with `test_split_size` and `streaming` beside it; in "
        "each entry 'id' is now 'path', 'config' is 'name' and 'weight' is 'fraction'",
        "dataset_mixer": "`datasets`, a list of {path: ..., split: ..., fraction: ...}",
        "dataset_splits": "`dataset_train_split` and `dataset_test_split`, or 'split' in each entry of `datasets`",
        "dataset_configs": "`dataset_config`, or 'name' in each entry of `datasets`",
        # the schedule
        "warmup_ratio": "`warmup_steps`, where a number below 1 is a share of all steps",
        "evaluation_strategy": "`eval_strategy`",
        "evaluate_during_training": "`eval_strategy`: steps",
        "per_gpu_train_batch_size": "`per_device_train_batch_size`",
        "per_gpu_eval_batch_size": "`per_device_eval_batch_size`",
        "group_by_length": "`train_sampling_strategy`: group_by_length",
        "adafactor": "`optim`: adafactor",
        "split_batches": "`accelerator_config`: {split_batches: true}",
        "dispatch_batches": "`accelerator_config`: {dispatch_batches: true}",
        # the device
        "no_cuda": "`use_cpu`",
        "use_mps_device": "gone: Apple's GPU is used where there is one; remove it",
        "use_ipex": "gone: remove it",
        "jit_mode_eval": "gone: remove it",
        "fp16_backend": "gone: there is one backend; remove it",
        "half_precision_backend": "gone: there is one backend; remove it",
        "fp16_opt_level": "gone: it was apex's; remove it",
        "sharded_ddp": "`fsdp`, or start with trl-cuma ... --accelerate_config fsdp2",
        "fsdp_min_num_params": "`fsdp_config`: {min_num_params: ...}",
        "fsdp_transformer_layer_cls_to_wrap": "`fsdp_config`: {transformer_layer_cls_to_wrap: [...]}",
        "torchdynamo": "`torch_compile_backend`",
        "ray_scope": "gone: the scripts search no hyperparameters; remove it",
        "past_index": "gone: remove it",
        "mp_parameters": "gone: it was SageMaker's; remove it",
        "tpu_num_cores": "accelerate's: start with trl-cuma ... --num_processes N",
        "tpu_metrics_debug": "`debug`: tpu_metrics_debug",
        # checkpoints, logs and the Hub
        "overwrite_output_dir": "gone: nothing asks any more. `resume_from_checkpoint`: true goes on from the last "
        "checkpoint in `output_dir`; without it the run begins anew",
        "save_safetensors": "gone: weights are always saved as safetensors; remove it",
        "logging_dir": "gone: set the environment variable TENSORBOARD_LOGGING_DIR, in a recipe under 'env'",
        "include_inputs_for_metrics": "`include_for_metrics`: [inputs]",
        "include_tokens_per_second": "`include_num_input_tokens_seen`: all, which also logs tokens per second",
        "push_to_hub_model_id": "`hub_model_id`",
        "push_to_hub_organization": "`hub_model_id`: organization/name",
        "push_to_hub_token": "`hub_token`",
        "hub_model_revision": "`hub_revision`",
        "wandb_project": "gone: set the environment variable WANDB_PROJECT, in a recipe under 'env'",
        "wandb_entity": "gone: set the environment variable WANDB_ENTITY, in a recipe under 'env'",
        "wandb_run_group": "gone: set the environment variable WANDB_RUN_GROUP, in a recipe under 'env'",
    },
    "SFTConfig": {
        "max_seq_length": "`max_length`",
        "chat_template": "`chat_template_path`: a .jinja file, or a model whose template is taken",
        "preprocessing_num_workers": "`dataset_num_proc`",
        "dataset_batch_size": "gone: remove it",
        "num_of_sequences": "gone: packing fills rows of `max_length` tokens; remove it",
        "chars_per_token": "gone: packing counts tokens; remove it",
        "use_liger_loss": "`use_liger_kernel`",
        "max_prompt_length": "gone: prompt and completion together are cut to `max_length`",
    },
    "DPOConfig": {
        "max_prompt_length": "gone: prompt and completion together are cut to `max_length`; filter out prompts that "
        "leave no room for an answer",
        "max_completion_length": "gone: prompt and completion together are cut to `max_length`",
        "max_target_length": "gone: prompt and completion together are cut to `max_length`",
        "chat_template": "gone for DPO: set the template in the tokenizer's folder",
        "preprocessing_num_workers": "`dataset_num_proc`",
        "rpo_alpha": "`loss_type`: [sigmoid, sft] with `loss_weights`: [1.0, the value of rpo_alpha]",
        "use_liger_loss": "`use_liger_kernel`",
        "model_adapter_name": "gone: `cuma_adapter_path` is the adapter to go on training",
        "ref_adapter_name": "gone: the reference is a frozen copy of the adapter in `cuma_adapter_path`, else the "
        "base model",
        "force_use_ref_model": "gone: remove it",
        "ref_model_init_kwargs": "gone: the reference is the adapter's frozen copy or the base model; remove it",
        "base_model_attribute_name": "gone: remove it",
        "reference_free": "gone: remove it",
        "label_pad_token_id": "gone: remove it",
        "padding_value": "`pad_token`",
        "is_encoder_decoder": "gone: remove it",
        "generate_during_eval": "gone: generate from the saved adapter",
        "tools": "gone: give the data set a column 'tools'",
        "use_logits_to_keep": "gone: remove it",
        "use_num_logits_to_keep": "gone: remove it",
        "dataset_batch_size": "gone: remove it",
    },
    "KTOConfig": {
        "max_prompt_length": "gone: prompt and completion together are cut to `max_length`; filter out prompts that "
        "leave no room for an answer",
        "max_completion_length": "gone: prompt and completion together are cut to `max_length`",
        "chat_template": "gone for KTO: set the template in the tokenizer's folder",
        "preprocessing_num_workers": "`dataset_num_proc`",
        "use_liger_loss": "`use_liger_kernel`",
        "model_adapter_name": "gone: `cuma_adapter_path` is the adapter to go on training",
        "ref_adapter_name": "gone: the reference is a frozen copy of the adapter in `cuma_adapter_path`, else the "
        "base model",
        "force_use_ref_model": "gone: remove it",
        "ref_model_init_kwargs": "gone: the reference is the adapter's frozen copy or the base model; remove it",
        "base_model_attribute_name": "gone: remove it",
        "label_pad_token_id": "gone: remove it",
        "padding_value": "gone: the tokenizer's padding token is used; remove it",
        "truncation_mode": "gone: `max_length` cuts the end",
        "is_encoder_decoder": "gone: remove it",
        "generate_during_eval": "gone: generate from the saved adapter",
    },
    "RewardConfig": {
        "max_seq_length": "`max_length`",
        "chat_template": "`chat_template_path`: a .jinja file, or a model whose template is taken",
        "preprocessing_num_workers": "`dataset_num_proc`",
        "reward_model_name_or_path": "`model_name_or_path`: it is the model that this script trains",
    },
    "GRPOConfig": {
        "max_prompt_length": "gone: prompts are not cut; filter out long ones, and leave room for "
        "`max_completion_length`",
        "max_length": "`max_completion_length`; prompts are not cut",
        "chat_template": "gone for GRPO: set the template in the tokenizer's folder, its arguments with "
        "`chat_template_kwargs`",
        "use_liger_loss": "`use_liger_kernel`",
        "wandb_log_unique_prompts": "`log_unique_prompts`",
        "reward_model_path": "`reward_model_name_or_path`",
        "vllm_max_model_len": "`vllm_max_model_length`",
        "vllm_guided_decoding_regex": "`vllm_structured_outputs_regex`",
        "vllm_device": "gone, and vLLM serves no routed mixture: leave `use_vllm` out",
        "vllm_dtype": "gone, and vLLM serves no routed mixture: leave `use_vllm` out",
        "vllm_enable_prefix_caching": "gone, and vLLM serves no routed mixture: leave `use_vllm` out",
    },
    # entries of `datasets`
    "DatasetConfig": {"id": "`path`", "config": "`name`", "weight": "`fraction`"},
}


def advice(config_class: type, key: str) -> str | None:
    """
    What `key` is called today, or why it is gone; `None` for a key that never was.

    Args:
        config_class (`type`): the class whose parser doesn't know the key; its bases are looked at too.
        key (`str`): the key, with underscores.
    """
    for base in config_class.__mro__:
        if key in RETIRED.get(base.__name__, {}):
            return RETIRED[base.__name__][key]
    return None
