"""torchtune's YAML as a recipe. Its config names Python components; what they mean is read from their names.

In: an Importing over dotted keys (`model.lora_rank`). Out: recipe values and fates. Runs in: a person's terminal.
Key names: torchtune's recipes/configs.
"""

from __future__ import annotations

import re
from typing import Any

from ftcore.importers import hugging_face
from ftcore.importers.base import Importing, number, source_path

MOVES = {
    "checkpointer.checkpoint_dir": "model.path",
    "tokenizer.max_seq_len": "data.max_length",
    "dataset.packed": "data.pack",
    "optimizer.lr": "optim.lr",
    "optimizer.weight_decay": "optim.weight_decay",
    "optimizer.eps": "optim.eps",
    "optimizer.betas": "optim.betas",
    "lr_scheduler.num_warmup_steps": "optim.warmup",
    "epochs": "optim.epochs",
    "clip_grad_norm": "optim.clip_norm",
    "seed": "optim.seed",
    "output_dir": "output.runs",
    "log_every_n_steps": "output.log_every",
    "run_val_every_n_steps": "eval.every_steps",
    "enable_activation_checkpointing": "backend.gradient_checkpointing",
    "dtype": "model.dtype",
}
LORA = {
    "model.lora_rank": "method.rank",
    "model.lora_alpha": "method.alpha",
    "model.lora_dropout": "method.dropout",
    "model.use_dora": "method.dora",
}
MODULES = {"output_proj": "o_proj"}
MLP = ["gate_proj", "up_proj", "down_proj"]
# What each data set component reads when the config does not say (torchtune.datasets).
DATASETS: dict[str, dict[str, str]] = {
    "alpaca_dataset": {"path": "tatsu-lab/alpaca", "format": "alpaca"},
    "alpaca_cleaned_dataset": {"path": "yahma/alpaca-cleaned", "format": "alpaca"},
    "slimorca_dataset": {"path": "Open-Orca/SlimOrca-Dedup", "format": "sharegpt"},
    "instruct_dataset": {"format": "auto"},
    "chat_dataset": {"format": "auto"},
    "text_completion_dataset": {"format": "text"},
    "wikitext_dataset": {"path": "EleutherAI/wikitext_document_level", "format": "text"},
    "cnn_dailymail_articles_dataset": {"path": "ccdv/cnn_dailymail", "format": "text"},
}

UNSUPPORTED = {
    "model.apply_lora_to_output": "add lm_head to method.modules_to_save to train the head",
    "model.lora_attn_modules": "no adapter is trained",
    "compile": "not in this version",
    "optimizer_in_bwd": "not in this version",
    "enable_activation_offloading": "not in this version",
    "quantizer.*": "not in this version",
    "teacher_*": "distillation is not in this version",
    "kd_*": "distillation is not in this version",
    "dataset.new_system_prompt": "put a system turn in the rows",
    "dataset.column_map.*": "a format is one file: CONTRIBUTING.md",
    "dataset.max_samples": "cut the file, or use data.sources.0.weight",
    "optimizer.*": "only lr, weight_decay, betas and eps can be set",
    "lr_scheduler.*": "only the warm-up can be set",
    "tensor_parallel_*": "not in this version",
    "tokenizer.prompt_template*": "the tokenizer's template, or model.chat_template, decides",
    "dataset.prompt_template*": "the tokenizer's template, or model.chat_template, decides",
    "collate_fn": "chosen by the stage",
    "fsdp_cpu_offload": "chosen by the backend",
}
IGNORED = {
    "tokenizer.*": "read from the model's folder",
    "checkpointer.*": "the whole folder is read; checkpoints land in the run folder",
    "resume_from_checkpoint": "the same `name` continues by itself",
    "save_adapter_weights_only": "an adapter is always saved alone",
    "shuffle": "blocks are shuffled by (seed, epoch)",
    "profiler.*": "not a training key",
    "device": "set resources.gpus_per_worker",
    "loss.*": "the stage's loss, chunked",
    "log_peak_memory_stats": "not made here",
    "log_level": "not a training key",
    "metric_logger.*": "metrics.jsonl is always written",
    "optimizer.fused": "where it can",
    "batch_size_val": "as backend.micro_batch",
    "dataset.source": "told by the path",
    "dataset.split": "used for the path",
    "dataset.data_files": "used for the path",
    "dataset.conversation_style": "used for the format",
    "dataset_val.*": "see data.sources",
    "custom_sharded_layers": "chosen by the backend",
    "low_cpu_ram": "always",
    "data_parallel_*": "set resources.workers",
}
REFERENCE = re.compile(r"\$\{([\w.]+)\}")


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return result


def read(importing: Importing) -> None:
    _resolve(importing)
    importing.name(importing.get("output_dir"))
    importing.values |= {"data": {"pack": False, "validation": 0.0}, "optim": {"warmup": 0.0, "weight_decay": 0.01}}
    hugging_face.moved(importing, MOVES)
    if importing.get("clip_grad_norm") is None:
        importing.put("optim.clip_norm", 0.0)  # no clipping there; ours clips at 1
        if "clip_grad_norm" in importing.config:
            importing.tell("clip_grad_norm", "translated", "optim.clip_norm: 0 (no clipping)")
    importing.put("backend.kind", "plain")
    hugging_face.batch(importing, "batch_size", "gradient_accumulation_steps")
    _method(importing)
    _data(importing)
    _optimizer(importing)
    importing.rest(UNSUPPORTED, IGNORED)


def _resolve(importing: Importing) -> None:
    """`${output_dir}/logs`: references to other keys, as OmegaConf reads them."""
    for key, value in importing.config.items():
        if isinstance(value, str):
            whole = REFERENCE.fullmatch(value)
            importing.config[key] = importing.get(whole[1]) if whole else REFERENCE.sub(lambda found: str(importing.get(found[1])), value)


def _method(importing: Importing) -> None:
    component = str(importing.get("model._component_") or "")
    builder = component.rsplit(".", 1)[-1]
    has_lora = "lora" in builder
    importing.put("method.kind", "lora" if has_lora else "full")
    if component:
        importing.tell(
            "model._component_",
            "translated",
            f"method.kind: {'lora' if has_lora else 'full'}; the model itself is checkpointer.checkpoint_dir",
        )
    if builder.startswith("qlora"):
        hugging_face.quantised(importing, 4, ("model._component_",))
    if not has_lora:
        return
    hugging_face.moved(importing, LORA)
    targets = [MODULES.get(name, name) for name in importing.get("model.lora_attn_modules") or []]
    if importing.get("model.apply_lora_to_mlp"):
        targets += MLP
    if targets:
        importing.put("method.targets", list(dict.fromkeys(targets)))
        for key in ("model.lora_attn_modules", "model.apply_lora_to_mlp"):
            if importing.get(key):
                importing.tell(key, "translated", f"method.targets: {', '.join(importing.values['method']['targets'])}")


def _data(importing: Importing) -> None:
    sources: list[dict[str, Any]] = []
    entries = sorted({key.split(".")[0] for key in importing.config if key.startswith("dataset")}) or ["dataset"]
    for key in entries:
        if f"{key}._component_" in importing.config:
            sources.append(_source(importing, key) | ({"split": "validation"} if key == "dataset_val" else {}))
    if isinstance(importing.get("dataset"), list):
        importing.tell("dataset", "not supported", "a list of data sets: write them as data.sources")
    importing.put("data.sources", sources)
    texts = bool(sources) and all(source.get("format") == "text" for source in sources)
    importing.put("stage.kind", "pretrain" if texts else "sft")
    for key in ("dataset.train_on_input", "tokenizer.train_on_input"):
        if importing.get(key):
            importing.move(key, "data.train_on", "all")


def _source(importing: Importing, key: str) -> dict[str, Any]:
    component = str(importing.get(f"{key}._component_")).rsplit(".", 1)[-1]
    known = DATASETS.get(component)
    files = importing.get(f"{key}.data_files")
    path = files if isinstance(files, str) else importing.get(f"{key}.source") or (known or {}).get("path") or component
    source = {"path": source_path(str(path), importing.file, re.split(r"\[", str(importing.get(f"{key}.split") or "train"))[0])}
    style = importing.get(f"{key}.conversation_style")
    source["format"] = {"sharegpt": "sharegpt", "openai": "messages"}.get(str(style), (known or {}).get("format", "auto"))
    at = f"{key}._component_"
    if known is None:
        importing.tell(
            at, "not supported", "not a data set component that is translated; put its rows in a file and name it in data.sources"
        )
    else:
        importing.tell(at, "translated", f"data.sources: {source['path']} as {source['format']}")
    if "[" in str(importing.get(f"{key}.split") or ""):
        importing.tell(f"{key}.split", "not supported", "slices of a split are not read; use data.validation, or cut the file")
    return source


def _optimizer(importing: Importing) -> None:
    component = str(importing.get("optimizer._component_") or "")
    if component.endswith(".AdamW"):
        importing.tell("optimizer._component_", "translated", "AdamW, fused where it can")
    elif component:
        importing.tell(
            "optimizer._component_", "not supported", "AdamW is used (8-bit and paged ones save memory there; learning rates carry over)"
        )
    scheduler = str(importing.get("lr_scheduler._component_") or "")
    kind = next((name for name in ("cosine", "linear", "constant") if name in scheduler), None)
    importing.put("optim.schedule", kind or ("cosine" if scheduler else "constant"))
    if scheduler:
        importing.tell("lr_scheduler._component_", "translated" if kind else "not supported", f"optim.schedule: {kind or 'cosine'}")
    steps, epochs = importing.get("max_steps_per_epoch"), importing.get("epochs") or 1
    if steps:
        importing.move("max_steps_per_epoch", "optim.max_steps", int(steps) * int(number(epochs)), f"{steps} a pass x {epochs}")
    logger = str(importing.get("metric_logger._component_") or "").rsplit(".", 1)[-1]
    names = {"TensorBoardLogger": "tensorboard", "WandBLogger": "wandb", "MLFlowLogger": "mlflow"}
    if logger in names:
        importing.move("metric_logger._component_", "output.loggers", [names[logger]])
