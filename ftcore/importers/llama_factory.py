"""LLaMA-Factory's YAML as a recipe; data sets are looked up in its dataset_info.json where that is at hand.

In: an Importing over LLaMA-Factory's flat keys (its own and Hugging Face TrainingArguments'). Out: recipe values and fates.
Runs in: a person's terminal. Key names: LLaMA-Factory's hparams and data/README.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ftcore.errors import ConfigError
from ftcore.importers import hugging_face
from ftcore.importers.base import Importing, source_path

MOVES = {
    "model_name_or_path": "model.path",
    "model_revision": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
    "adapter_name_or_path": "model.adapter",
    "cutoff_len": "data.max_length",
    "tokenized_path": "data.cache",
    "learning_rate": "optim.lr",
    "num_train_epochs": "optim.epochs",
    "weight_decay": "optim.weight_decay",
    "max_grad_norm": "optim.clip_norm",
    "adam_epsilon": "optim.eps",
    "seed": "optim.seed",
    "output_dir": "output.runs",
    "save_total_limit": "output.keep",
    "logging_steps": "output.log_every",
    "save_steps": "output.checkpoint_every",
    "eval_steps": "eval.every_steps",
    "early_stopping_steps": "eval.patience",
}
LORA = {"lora_rank": "method.rank", "lora_dropout": "method.dropout", "use_rslora": "method.rslora", "use_dora": "method.dora"}
STAGES = {"sft": "sft", "pt": "pretrain", "rm": "reward", "dpo": "dpo", "ppo": "ppo", "kto": "kto"}
FORMATS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "openai": "messages"}
TEMPLATES = {
    "qwen": "chatml",
    "qwen2_5": "chatml",
    "qwen3": "auto",
    "qwen3_nothink": "auto",
    "llama3": "llama3",
    "llama2": "llama2",
    "mistral": "mistral",
    "gemma": "gemma",
    "phi": "phi3",
    "chatglm3": "chatglm3",
    "default": "auto",
}
DEFAULT_DROPOUT, DEFAULT_RANK = 0.0, 8

UNSUPPORTED = {
    "deepspeed": "choose it with backend: {kind: deepspeed, ...}",
    "fsdp*": "this version shards with its own backends, not with FSDP",
    "loraplus*": "LoRA+ is not in this version",
    "pissa*": "PiSSA initialisation is not in this version",
    "use_galore": "GaLore is not in this version",
    "galore*": "GaLore is not in this version",
    "use_badam": "BAdam is not in this version",
    "badam*": "BAdam is not in this version",
    "use_apollo": "APOLLO is not in this version",
    "apollo*": "APOLLO is not in this version",
    "use_muon": "Muon is not in this version",
    "use_adam_mini": "Adam-mini is not in this version",
    "use_llama_pro": "block expansion is not in this version",
    "freeze_*": "method freeze is not in this version",
    "oft_*": "OFT is not in this version",
    "neftune_noise_alpha": "NEFTune is not in this version",
    "pref_*": "preference stages are not in this version",
    "ppo_*": "PPO is not in this version",
    "reward_model*": "reward models are not in this version",
    "ref_model*": "reference models are not in this version",
    "simpo_gamma": "preference stages are not in this version",
    "kto_*": "preference stages are not in this version",
    "rope_scaling": "the model's own config is used",
    "add_tokens": "the tokenizer is used as it is",
    "add_special_tokens": "the tokenizer is used as it is",
    "resize_vocab": "the tokenizer is used as it is",
    "new_special_tokens_config": "the tokenizer is used as it is",
    "shift_attn": "not in this version",
    "mixture_of_depths": "not in this version",
    "train_from_scratch": "not in this version",
    "default_system": "put a system turn in the rows",
    "tool_format": "the tokenizer's template decides",
    "max_samples": "cut the file, or use data.sources.N.weight",
    "streaming": "preparation always streams",
    "mix_strategy": "use data.sources.N.weight",
    "interleave_probs": "use data.sources.N.weight",
    "use_dft_loss": "not in this version",
    "use_eaft_loss": "not in this version",
    "eaft_*": "not in this version",
    "asft_*": "not in this version",
    "use_asft_loss": "not in this version",
    "optim": "AdamW is used",
    "upcast_layernorm": "not in this version",
    "media_dir": "text only in this version",
    "image_*": "text only in this version",
    "video_*": "text only in this version",
    "audio_*": "text only in this version",
    "export_*": "use `ftcore merge`",
    "push_to_hub": "publish afterwards (README, Publish)",
    "use_unsloth": "not in this version",
    "use_kt": "not in this version",
    "kt_*": "not in this version",
    "use_mca": "not in this version",
    "fp8*": "not in this version",
    "enable_thinking": "the tokenizer's template decides",
    "lr_scheduler_kwargs": "only optim.min_lr_ratio can be set",
    "disable_shuffling": "blocks are always shuffled by (seed, epoch)",
    "create_new_adapter": "model.adapter continues the adapter; merge it first for a new one",
    "moe_aux_loss_coef": "not in this version",
}
IGNORED = {
    "do_train": "`ftcore sft` trains",
    "do_eval": "data.validation above 0 validates",
    "do_predict": "not a training key",
    "plot_loss": "always in the run's report",
    "overwrite_output_dir": "the same `name` continues; another name starts anew",
    "overwrite_cache": "the cache is by content",
    "preprocessing_*": "preparation uses the cluster's CPUs",
    "dataloader_*": "blocks are read in order, ahead of time",
    "ddp_*": "set by the backend",
    "resume_from_checkpoint": "the same `name` continues by itself",
    "save_only_model": "checkpoints can always be continued",
    "flash_attn": "kernels are chosen by the device; segments never see each other",
    "enable_liger_kernel": "the chunked loss here never holds the logits",
    "gradient_checkpointing": "see backend.gradient_checkpointing",
    "gradient_checkpointing_kwargs": "chosen by the backend",
    "use_reentrant_gc": "non-reentrant",
    "disable_gradient_checkpointing": "see backend.gradient_checkpointing",
    "eval_strategy": "set eval.every_steps",
    "evaluation_strategy": "set eval.every_steps",
    "save_strategy": "set output.checkpoint_every",
    "per_device_eval_batch_size": "as backend.micro_batch",
    "dataset_dir": "used to find the data sets",
    "use_fast_tokenizer": "always",
    "cache_dir": "set HF_HOME",
    "hf_hub_token": "log in with the hub's own command",
    "ms_hub_token": "not used",
    "om_hub_token": "not used",
    "group_by_length": "unpacked blocks are length-grouped",
    "logging_strategy": "set output.log_every",
    "logging_dir": "in the run folder",
    "include_num_input_tokens_seen": "always in metrics.jsonl",
    "include_tokens_per_second": "always in metrics.jsonl",
    "include_effective_tokens_per_second": "always in metrics.jsonl",
    "ignore_pad_token_for_loss": "padding is never trained",
    "data_shared_file_system": "set data.cache",
    "low_cpu_mem_usage": "always",
    "print_param_status": "in the log",
    "infer_*": "not a training key",
    "vllm_*": "not a training key",
    "sglang_*": "not a training key",
    "use_kv_cache": "not a training key",
    "quantization_type": "nf4",
    "double_quantization": "on",
    "quantization_method": "bitsandbytes",
    "quantization_device_map": "set by Ray",
    "ray_*": "set resources.* and output.runs",
    "swanlab_*": "not a logger here",
    "use_swanlab": "not a logger here",
    "eval_on_each_dataset": "one validation loss",
    "compute_accuracy": "see `ftcore` evaluation",
    "run_name": "the recipe's name",
    "predict_with_generate": "not a training key",
    "profiler_*": "not a training key",
    "load_best_model_at_end": "the best checkpoint is always kept",
    "warmup_ratio": "warmup_steps wins",
    "buffer_size": "preparation always streams",
    "master_addr": "set by Ray",
    "master_port": "set by Ray",
    "report_to": "no outside logger; metrics.jsonl is always written",
}


def read(importing: Importing) -> None:
    importing.name(importing.get("run_name"), importing.get("output_dir"))
    hugging_face.moved(importing, MOVES)
    importing.put("backend.kind", "plain")
    hugging_face.batch(importing, "per_device_train_batch_size", "gradient_accumulation_steps")
    hugging_face.schedule(importing, "lr_scheduler_type")
    hugging_face.warmup(importing)
    importing.values["optim"].setdefault("warmup", 0.0)
    importing.values["optim"].setdefault("epochs", 3.0)  # TrainingArguments' default; ours is 1
    hugging_face.precision(importing)
    if (importing.get("max_steps") or -1) > 0:
        importing.move("max_steps", "optim.max_steps")
    _method(importing)
    _stage(importing)
    _sources(importing)
    _rest(importing)
    importing.rest(UNSUPPORTED, IGNORED)


def _method(importing: Importing) -> None:
    kind = importing.get("finetuning_type") or "lora"
    importing.put("method.kind", "full" if kind == "full" else "lora")
    if kind in ("lora", "full"):
        if "finetuning_type" in importing.config:
            importing.tell("finetuning_type", "translated", f"method.kind: {kind}")
    else:
        importing.tell("finetuning_type", "not supported", "only lora and full are translated; the recipe trains lora")
    if kind == "full":
        return
    hugging_face.moved(importing, LORA)
    rank = int(importing.get("lora_rank") or DEFAULT_RANK)
    importing.put("method.rank", rank)
    alpha = importing.get("lora_alpha") or 2 * rank  # their default
    if importing.get("lora_alpha"):
        importing.move("lora_alpha", "method.alpha", alpha)
    else:
        importing.put("method.alpha", alpha)
        if "lora_alpha" in importing.config:
            importing.tell("lora_alpha", "translated", f"method.alpha: {alpha} (their default, 2 x rank)")
    target = importing.get("lora_target") or "all"
    targets: Any = "all-linear" if target == "all" else [name.strip() for name in str(target).split(",")]
    importing.move("lora_target", "method.targets", targets) if "lora_target" in importing.config else importing.put(
        "method.targets", targets
    )
    if importing.get("additional_target"):
        importing.move(
            "additional_target", "method.modules_to_save", [name.strip() for name in str(importing.get("additional_target")).split(",")]
        )
    bits = importing.get("quantization_bit")
    hugging_face.quantised(importing, int(bits or 4), ("quantization_bit",))


def _stage(importing: Importing) -> None:
    stage = str(importing.get("stage") or "sft")
    hugging_face.stage(importing, "stage", STAGES.get(stage, stage))
    if importing.get("train_on_prompt"):
        importing.move("train_on_prompt", "data.train_on", "all")
    if importing.get("mask_history"):
        importing.move("mask_history", "data.train_on", "last")
    hugging_face.template(importing, "template", TEMPLATES)
    packs = bool(importing.get("packing") or importing.get("neat_packing") or stage == "pt")
    importing.put("data.pack", packs)
    for key in ("packing", "neat_packing"):
        if importing.get(key) is not None:
            importing.move(key, "data.pack", packs, "segments never see each other, as with neat_packing" if packs else "")


def _sources(importing: Importing) -> None:
    directory = Path(str(importing.get("dataset_dir") or "data"))
    known, where = _dataset_info(importing, directory)
    sources: list[dict[str, Any]] = []
    for key, split in (("dataset", "auto"), ("eval_dataset", "validation")):
        names = importing.get(key)
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names or [])
        for name in names:
            source = _source(name, known.get(name), where or directory, importing)
            sources.append(source | ({"split": split} if split != "auto" else {}))
        if names:
            found = (
                ""
                if all(name in known for name in names)
                else "; dataset_info.json was not found beside the config, so check paths and formats"
            )
            importing.tell(key, "translated", f"data.sources: {', '.join(source['path'] for source in sources[-len(names) :])}{found}")
    importing.put("data.sources", sources)
    size = importing.get("val_size") or 0
    if size < 1:
        importing.put("data.validation", size)
        if "val_size" in importing.config:
            importing.move("val_size", "data.validation", size)
    else:
        importing.tell("val_size", "not supported", "a number of rows; data.validation is a share, 0.05 is kept")


def _dataset_info(importing: Importing, directory: Path) -> tuple[dict[str, Any], Path | None]:
    for folder in (directory, importing.file.parent / directory, importing.file.parent):
        file = folder / "dataset_info.json"
        if file.is_file():
            try:
                return dict(json.loads(file.read_text(encoding="utf-8"))), folder
            except ValueError as error:
                raise ConfigError("this dataset_info.json is not JSON", where=file, got=str(error)) from error
    return {}, None


def _source(name: str, info: dict[str, Any] | None, folder: Path, importing: Importing) -> dict[str, Any]:
    if info is None:
        return {"path": source_path(str(folder / f"{name}.json"), importing.file)}
    path = str(folder / info["file_name"]) if "file_name" in info else f"hf:{info.get('hf_hub_url', name)}"
    source: dict[str, Any] = {"path": path}
    if not info.get("ranking"):
        columns = info.get("columns", {})
        source["format"] = "messages" if columns.get("messages") == "messages" else FORMATS.get(info.get("formatting", "alpaca"), "auto")
    if "columns" in info and info.get("formatting", "alpaca") == "alpaca":
        source["format"] = "text" if set(columns) == {"prompt"} else "auto"
    return source


def _rest(importing: Importing) -> None:
    importing.put("backend.gradient_checkpointing", not importing.get("disable_gradient_checkpointing"))  # on by default there
    betas = importing.get("adam_beta1"), importing.get("adam_beta2")
    if any(betas):
        importing.put("optim.betas", [betas[0] or 0.9, betas[1] or 0.999])
        for key in ("adam_beta1", "adam_beta2"):
            if importing.get(key):
                importing.tell(key, "translated", f"optim.betas: {importing.values['optim']['betas']}")
    if importing.get("optim") in ("adamw_torch", "adamw_torch_fused"):
        importing.tell("optim", "translated", "AdamW, fused where it can")
    if "report_to" in importing.config:
        hugging_face.loggers(importing, "report_to", importing.get("report_to"))
