"""What other programs call our keys: axolotl, LLaMA-Factory, torchtune, Hugging Face TrainingArguments, PEFT's LoraConfig.

In: a key as a person knows it. Out: the recipe's path for it, or a sentence where it has none. Runs in: everywhere a recipe is read.

Used for "did you mean" only: these are never second names in a recipe (`ftcore import-config` translates whole files).
"""

from __future__ import annotations

_BATCH = "optim.batch_size is the whole optimizer step over all workers; backend.micro_batch what a worker runs at once"
_PRECISION = "model.dtype: bf16 | fp32 | fp16"
_QUANTISED = "quantised bases are chosen by the method: method: {kind: qlora, bits: 4}"
_RESUME = "a run continues by itself: start the same `name` again"

_SPELLINGS: dict[str, str] = {
    "model.path": "base_model model_name_or_path model_name pretrained_model_name_or_path checkpoint_dir model_id",
    "model.revision": "revision_of_model model_revision",
    "model.adapter": "adapter_name_or_path lora_model_dir adapter_path",
    "model.attention": "flash_attention flash_attn attn_implementation sdp_attention use_flash_attention_2",
    "model.chat_template": "chat_template template chat_template_jinja prompt_template",
    "model.dtype": "torch_dtype",
    "data.sources": "datasets dataset dataset_path train_file data_path data_files",
    "data.sources.0.format": "ds_type dataset_format",
    "data.train_on": "train_on_inputs train_on_input train_on_prompt mask_history assistant_only_loss completion_only_loss",
    "data.max_length": "cutoff_len sequence_len max_seq_len max_seq_length max_len model_max_length",
    "data.pack": "packing packed sample_packing neat_packing",
    "data.validation": "val_size val_set_size validation_split eval_size",
    "data.near_duplicates": "dedup deduplicate exact_deduplication dataset_exact_deduplication",
    "data.cache": "dataset_prepared_path tokenized_path cache_dir",
    "data.overlong": "excess_length_strategy truncation truncation_mode",
    "method.kind": "finetuning_type finetune_type peft_type peft_method tuner",
    "method.rank": "lora_r lora_rank r",
    "method.alpha": "lora_alpha",
    "method.dropout": "lora_dropout",
    "method.targets": "lora_target lora_target_modules target_modules lora_attn_modules lora_modules",
    "method.modules_to_save": "additional_target lora_modules_to_save",
    "stage.kind": "train_stage rl training_stage",
    "backend.gradient_checkpointing": "enable_activation_checkpointing gradient_checkpoint activation_checkpointing",
    "backend.micro_batch": "micro_batch_size per_device_train_batch_size per_gpu_train_batch_size",
    "optim.lr": "learning_rate lr_max max_lr",
    "optim.epochs": "num_epochs num_train_epochs n_epochs",
    "optim.max_steps": "max_steps_per_epoch train_steps total_steps num_steps",
    "optim.schedule": "lr_scheduler lr_scheduler_type scheduler",
    "optim.warmup": "warmup_ratio warmup_steps num_warmup_steps",
    "optim.min_lr_ratio": "cosine_min_lr_ratio",
    "optim.weight_decay": "adam_weight_decay wd",
    "optim.betas": "adam_beta1 adam_beta2",
    "optim.eps": "adam_epsilon",
    "optim.clip_norm": "max_grad_norm gradient_clipping clip_grad_norm grad_clip",
    "optim.seed": "random_seed data_seed",
    "resources.workers": "num_workers world_size nproc_per_node num_processes num_gpus",
    "eval.every_steps": "eval_steps run_val_every_n_steps evaluation_steps",
    "eval.patience": "early_stopping_patience",
    "output.runs": "output_dir output_path save_dir",
    "output.checkpoint_every": "save_steps save_every checkpoint_interval",
    "output.keep": "save_total_limit keep_last_n_checkpoints",
    "output.log_every": "logging_steps log_every_n_steps",
    "output.loggers": "report_to wandb_project use_wandb metric_logger",
    "name": "run_name experiment_name",
}

RECIPE_PATHS: dict[str, str] = {spelling: path for path, spellings in _SPELLINGS.items() for spelling in spellings.split()}
RECIPE_PATHS |= {
    "batch_size": "optim.batch_size",
    "gradient_accumulation_steps": _BATCH,
    "accumulation": _BATCH,
    "bf16": _PRECISION,
    "fp16": _PRECISION,
    "tf32": _PRECISION,
    "load_in_4bit": _QUANTISED,
    "load_in_8bit": _QUANTISED,
    "quantization_bit": _QUANTISED,
    "resume_from_checkpoint": _RESUME,
    "auto_resume_from_checkpoints": _RESUME,
    "do_train": "leave it out: `ftcore sft` trains",
    "do_eval": "leave it out: data.validation > 0 validates",
    "trust_remote_code": "model.trust_remote_code",
    "use_rslora": "method.rslora",
    "lora_use_rslora": "method.rslora",
    "peft_use_rslora": "method.rslora",
    "use_dora": "method.dora",
    "peft_use_dora": "method.dora",
    "deepspeed": "the backend runs DeepSpeed: backend: {kind: deepspeed, zero: 3}",
    "fsdp": "sharding is the backend's: backend: {kind: deepspeed, zero: 3}",
    "adapter": "method.kind",
}
