"""axolotl's YAML as a recipe.

In: an Importing over axolotl's flat keys. Out: its recipe values and fates. Runs in: a person's terminal.

Key names: axolotl's configuration reference (docs.axolotl.ai, "Config Reference").
"""

from __future__ import annotations

from typing import Any

from ftcore.importers import hugging_face
from ftcore.importers.base import Importing, looked_up, source_path

MOVES = {
    "base_model": "model.path",
    "revision_of_model": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
    "sequence_len": "data.max_length",
    "sample_packing": "data.pack",
    "val_set_size": "data.validation",
    "dataset_prepared_path": "data.cache",
    "learning_rate": "optim.lr",
    "num_epochs": "optim.epochs",
    "max_steps": "optim.max_steps",
    "weight_decay": "optim.weight_decay",
    "cosine_min_lr_ratio": "optim.min_lr_ratio",
    "adam_epsilon": "optim.eps",
    "max_grad_norm": "optim.clip_norm",
    "gradient_clipping": "optim.clip_norm",
    "seed": "optim.seed",
    "output_dir": "output.runs",
    "save_total_limit": "output.keep",
    "logging_steps": "output.log_every",
    "early_stopping_patience": "eval.patience",
    "lora_model_dir": "model.adapter",
}
LORA = {
    "lora_r": "method.rank",
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    "peft_use_rslora": "method.rslora",
    "peft_use_dora": "method.dora",
    "lora_modules_to_save": "method.modules_to_save",
}
FORMATS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "completion": "text", "pretrain": "text", "openai": "messages"}
ADAM = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adamw_anyprecision")
TEMPLATES = {
    "tokenizer_default": "auto",
    "chatml": "chatml",
    "llama3": "llama3",
    "gemma": "gemma",
    "mistral_v1": "mistral",
    "phi_3": "phi3",
    "phi_35": "phi3",
    "qwen_25": "chatml",
    "qwen3": "auto",
    "gemma3": "gemma",
    "deepseek_v2": "deepseek",
    "deepseek_v3": "deepseek3",
}

UNSUPPORTED = {
    "fsdp*": "this version shards with its own backends, not with FSDP",
    "deepspeed": "choose it with backend: {kind: deepspeed, ...}",
    "special_tokens": "the tokenizer is used as it is",
    "tokens": "the tokenizer is used as it is",
    "added_tokens_overrides": "the tokenizer is used as it is",
    "loraplus*": "LoRA+ is not in this version",
    "lora_target_parameters": "expert parameters are not LoRA targets in this version",
    "lora_fan_in_fan_out": "PEFT sets it by the layer's type",
    "relora*": "ReLoRA is not in this version",
    "neftune_noise_alpha": "NEFTune is not in this version",
    "lr_groups": "one learning rate for all",
    "embedding_lr*": "one learning rate for all",
    "cosine_constant_lr_ratio": "not a schedule of this version",
    "loss_watchdog*": "a loss that is not finite stops the run here, a high one does not",
    "group_by_length": "packing makes it pointless; unpacked blocks are length-grouped",
    "unfrozen_parameters": "partial training is not in this version",
    "plugins": "axolotl's plugins do not run here",
    "test_datasets": "see the table above",
    "hub_model_id": "publish to the hub afterwards (README, Publish)",
    "rope_scaling": "the model's own config is used",
    "lisa*": "LISA is not in this version",
    "reward_model": "reward models are not in this version",
    "torch_compile": "not in this version",
    "optim_args": "only betas and eps can be set",
    "optim_target_modules": "AdamW over all that is trainable",
    "context_parallel_size": "not in this version",
    "sequence_parallel_degree": "not in this version",
    "default_system_message": "put a system turn in the rows",
    "eot_tokens": "the template's stop token is trained",
    "chat_template_jinja": "write it to a .jinja file and name it in model.chat_template",
    "processor_type": "text only in this version",
    "quantize_moe_experts": "quantised bases are the method's",
    "tensor_parallel_size": "not in this version",
    "expert_parallel_size": "not in this version",
    "activation_offloading": "not in this version",
    "qat": "quantisation-aware training is not in this version",
    "trl": "preference and RL stages are not in this version",
    "model_config*": "the model's own config is used",
}
IGNORED = {
    "liger*": "the chunked loss here never holds the logits",
    "cut_cross_entropy": "the chunked loss here never holds the logits",
    "use_kernels": "kernels are chosen by the device",
    "use_scattermoe": "kernels are chosen by the device",
    "fused_attn_kernel": "kernels are chosen by the device",
    "flex_attn*": "kernels are chosen by the device",
    "tokenizer_*": "read from the model's folder",
    "dp_*": "set resources.workers",
    "model_type": "read from the model's config",
    "tokenizer_type": "read from the model's folder",
    "is_*_derived_model": "read from the model's config",
    "is_llama*": "read from the model's config",
    "is_mistral*": "read from the model's config",
    "is_falcon*": "read from the model's config",
    "is_qwen*": "read from the model's config",
    "strict": "unknown keys are always refused",
    "tf32": "PyTorch's default is kept",
    "pad_to_sequence_len": "blocks need no padding",
    "eval_sample_packing": "validation is packed like training",
    "wandb_*": "set W&B's own environment variables",
    "mlflow_*": "set MLflow's own environment variables",
    "comet_*": "not a logger here",
    "resume_from_checkpoint": "the same `name` continues by itself",
    "auto_resume_from_checkpoints": "the same `name` continues by itself",
    "flash_attn*": "kernels are chosen by the device",
    "xformers_attention": "kernels are chosen by the device",
    "sdp_attention": "kernels are chosen by the device",
    "flash_attention": "kernels are chosen by the device; segments never see each other",
    "attn_implementation": "kernels are chosen by the device; segments never see each other",
    "dataset_processes": "preparation uses the cluster's CPUs",
    "dataset_num_proc": "preparation uses the cluster's CPUs",
    "dataloader*": "blocks are read in order, ahead of time",
    "save_safetensors": "always",
    "ddp*": "set by the backend",
    "local_rank": "set by Ray",
    "world_size": "set by resources.workers",
    "device*": "set by Ray",
    "shuffle_merged_datasets": "blocks are shuffled by (seed, epoch)",
    "data_seed": "optim.seed fixes the order",
    "gradient_checkpointing_kwargs": "chosen by the backend",
    "saves_per_epoch": "set output.checkpoint_every in steps",
    "save_strategy": "set output.checkpoint_every in steps",
    "eval_strategy": "set eval.every_steps",
    "evals_per_epoch": "validation runs at the end of each epoch, or set eval.every_steps",
    "eval_table_size": "not made here",
    "eval_max_new_tokens": "not made here",
    "eval_batch_size": "as backend.micro_batch",
    "lora_on_cpu": "merging is `ftcore merge`",
    "lora_*_kernel": "kernels are chosen by the device",
    "lora_mlp_kernel": "kernels are chosen by the device",
    "lora_qkv_kernel": "kernels are chosen by the device",
    "lora_o_kernel": "kernels are chosen by the device",
    "unsloth*": "kernels are chosen by the device",
    "low_cpu_mem_usage": "always",
    "debug": "use `ftcore preview`",
    "use_ray": "always",
    "ray_run_name": "the recipe's name",
    "resources_per_worker": "set resources.*",
    "skip_prepare_dataset": "preparation is cached by content",
    "sample_packing_*": "packing is best-fit over windows",
    "save_only_model": "checkpoints can always be continued",
    "hub_strategy": "no upload during training",
    "hf_use_auth_token": "log in with the hub's own command",
    "save_first_step": "set output.checkpoint_every",
    "use_tensorboard": "add tensorboard to output.loggers",
    "bnb_config_kwargs": "chosen by the method",
    "max_memory": "memory is planned by the backend",
    "gpu_memory_limit": "memory is planned by the backend",
    "include_tokens_per_second": "always in metrics.jsonl",
    "load_best_model_at_end": "the best checkpoint is always kept",
}


def read(importing: Importing) -> None:
    importing.name(importing.get("wandb_name"), importing.get("output_dir"))
    if importing.get("sample_packing") is None:
        importing.put("data.pack", False)
    if (importing.get("val_set_size") or 0) >= 1:
        importing.tell("val_set_size", "not supported", "a number of rows; data.validation is a share, 0.05 is kept")
        importing.put("data.validation", 0.05)
    hugging_face.moved(importing, {key: path for key, path in MOVES.items() if key not in importing.fates})
    importing.values.setdefault("data", {}).setdefault("validation", 0.0)
    importing.put("backend.kind", "plain")
    hugging_face.batch(importing, "micro_batch_size", "gradient_accumulation_steps")
    if importing.get("batch_size"):
        importing.move("batch_size", "optim.batch_size", int(importing.get("batch_size")))
    hugging_face.schedule(importing, "lr_scheduler")
    hugging_face.warmup(importing)
    hugging_face.precision(importing)
    _method(importing)
    _stage_and_data(importing)
    _optimizer(importing)
    _steps(importing)
    importing.rest(UNSUPPORTED, IGNORED)


def _method(importing: Importing) -> None:
    adapter = importing.get("adapter")
    importing.put("method.kind", "lora" if adapter else "full")
    if adapter in ("lora", "qlora", None):
        importing.tell("adapter", "translated", f"method.kind: {'lora' if adapter else 'full'}") if "adapter" in importing.config else None
    else:
        importing.tell("adapter", "not supported", "only lora and qlora are translated; the recipe trains lora")
    if not adapter:
        for key in [*LORA, "lora_target_modules", "lora_target_linear"]:
            if key in importing.config:
                importing.tell(key, "ignored", "no adapter is trained")
        return
    hugging_face.moved(importing, LORA)
    if importing.get("lora_target_linear"):
        importing.move("lora_target_linear", "method.targets", "all-linear")
        if importing.get("lora_target_modules"):
            importing.tell("lora_target_modules", "ignored", "lora_target_linear takes all of them")
    elif importing.get("lora_target_modules"):
        targets = importing.get("lora_target_modules")
        importing.move("lora_target_modules", "method.targets", targets if isinstance(targets, str) else list(dict.fromkeys(targets)))
    hugging_face.quantised(importing, 4, ("load_in_4bit",))
    hugging_face.quantised(importing, 8, ("load_in_8bit",))


def _stage_and_data(importing: Importing) -> None:
    sources: list[dict[str, Any]] = []
    for key in ("datasets", "pretraining_dataset", "test_datasets"):
        entries = importing.get(key)
        if not entries:
            continue
        for index, entry in enumerate(entries if isinstance(entries, list) else [entries]):
            source = _source(importing, f"{key}.{index}", {"path": entry} if isinstance(entry, str) else entry, key)
            sources.append(source | ({"split": "validation"} if key == "test_datasets" else {}))
        importing.tell(
            key, "translated", "data.sources, entry by entry below", f"{len(entries)} entries" if isinstance(entries, list) else entries
        )
    importing.put("data.sources", sources)
    texts = bool(sources) and all(source.get("format") == "text" for source in sources)
    if importing.get("rl"):
        hugging_face.stage(importing, "rl", str(importing.get("rl")))
    else:
        importing.put(
            "stage.kind",
            "pretrain" if importing.get("pretraining_dataset") or texts else "sft",
        )
    if "train_on_inputs" in importing.config:
        importing.move("train_on_inputs", "data.train_on", "all" if importing.get("train_on_inputs") else "answers")
    hugging_face.template(importing, "chat_template", TEMPLATES)


def _source(importing: Importing, at: str, entry: dict[str, Any], key: str) -> dict[str, Any]:
    """One entry of `datasets`; its own keys are told of as datasets.0.path and so on."""
    files = entry.get("data_files")
    files = files[0] if isinstance(files, list) and len(files) == 1 else files
    path = str(files) if isinstance(files, str) else str(entry.get("path"))
    source: dict[str, Any] = {"path": source_path(path, importing.file, entry.get("split"))}
    importing.tell(f"{at}.path", "translated", f"data.sources: path {source['path']}", entry.get("path"))
    kind, messages = entry.get("type"), entry.get("field_messages")
    name = kind.split(".")[0].split(":")[0] if isinstance(kind, str) else None
    if key == "pretraining_dataset":
        source["format"] = "text"
    elif name == "chat_template":
        source["format"] = "sharegpt" if messages == "conversations" or entry.get("message_field_role") == "from" else "messages"
    elif name in FORMATS:
        source["format"] = FORMATS[name]
    if "type" in entry:
        known = "format" in source
        text = (
            f"data.sources: format {source['format']}"
            if known
            else "not one of our formats; `auto` will look at the rows (a format is one file: CONTRIBUTING.md)"
        )
        importing.tell(f"{at}.type", "translated" if known else "not supported", text, kind)
    for field in entry.keys() - {"path", "type"}:
        value, used = (
            entry[field],
            field in ("data_files", "split", "field_messages", "message_field_role") and not isinstance(entry[field], list),
        )
        reason = looked_up(
            field,
            {
                "ds_type": "told by the file's name",
                "message_field_*": "read from the rows",
                "field_*": "read from the rows",
                "roles*": "see data.train_on",
            },
        )
        became = "translated" if used else "ignored" if reason else "default" if value in (None, False) else "not supported"
        importing.tell(f"{at}.{field}", became, "used for the path and format" if used else reason or "has no counterpart", value)  # type: ignore[arg-type]
    return source


def _optimizer(importing: Importing) -> None:
    kind = importing.get("optimizer")
    if kind in ADAM:
        importing.tell("optimizer", "translated", "AdamW, fused where it can")
    elif kind:
        importing.tell("optimizer", "not supported", "AdamW is used (8-bit and paged ones save memory there; learning rates carry over)")
    betas = importing.get("adam_beta1"), importing.get("adam_beta2")
    if any(betas):
        importing.put("optim.betas", [betas[0] or 0.9, betas[1] or 0.999])
        for key in ("adam_beta1", "adam_beta2"):
            if importing.get(key):
                importing.tell(key, "translated", f"optim.betas: {importing.values['optim']['betas']}")
    if importing.get("gradient_checkpointing"):
        importing.move("gradient_checkpointing", "backend.gradient_checkpointing", True)
    if importing.get("dataset_exact_deduplication") is not None:
        importing.move("dataset_exact_deduplication", "data.duplicates", "drop" if importing.get("dataset_exact_deduplication") else "keep")
    if importing.get("use_wandb") or importing.get("wandb_project"):
        hugging_face.loggers(importing, "use_wandb" if importing.get("use_wandb") else "wandb_project", "wandb")


def _steps(importing: Importing) -> None:
    """Their steps may be a share of the run; ours are whole numbers."""
    for key, path in (("eval_steps", "eval.every_steps"), ("save_steps", "output.checkpoint_every")):
        value = importing.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            importing.move(key, path)
        elif value:
            importing.tell(key, "not supported", f"a share of the run; {path} is a number of steps")
