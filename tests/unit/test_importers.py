"""Configs of axolotl, LLaMA-Factory and torchtune as recipes: what is carried over, and an account of every key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ftcore import cli
from ftcore.data.families import template_names
from ftcore.errors import ConfigError
from ftcore.importers import READERS, axolotl, import_file, llama_factory
from ftcore.importers.base import Imported
from ftcore.recipe import Recipe, parse_recipe

AXOLOTL: dict[str, Any] = {
    "base_model": "NousResearch/Llama-3.2-1B",
    "model_type": "AutoModelForCausalLM",
    "datasets": [
        {"path": "teknium/GPT4-LLM-Cleaned", "type": "alpaca"},
        {"path": "rows.jsonl", "type": "chat_template", "field_messages": "conversations", "ds_type": "json"},
        {"path": "json", "data_files": "more.json", "type": "alpaca"},
    ],
    "val_set_size": 0.1,
    "output_dir": "./outputs/lora-out",
    "adapter": "lora",
    "sequence_len": 2048,
    "sample_packing": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "lora_target_linear": True,
    "peft_use_rslora": True,
    "gradient_accumulation_steps": 4,
    "micro_batch_size": 2,
    "num_epochs": 3,
    "optimizer": "adamw_bnb_8bit",
    "lr_scheduler": "cosine",
    "learning_rate": "2e-4",
    "bf16": "auto",
    "tf32": False,
    "gradient_checkpointing": True,
    "warmup_ratio": 0.1,
    "weight_decay": 0.0,
    "wandb_project": None,
    "train_on_inputs": False,
    "loraplus_lr_ratio": 16,
    "brand_new_key": 1,
}

LLAMA_FACTORY: dict[str, Any] = {
    "model_name_or_path": "Qwen/Qwen3-4B-Instruct-2507",
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 16,
    "lora_target": "q_proj,v_proj",
    "dataset": "identity,glaive_toolcall_en_demo",
    "template": "qwen3_nothink",
    "cutoff_len": 1024,
    "max_samples": 1000,
    "output_dir": "saves/qwen3-4b/lora/sft",
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "learning_rate": 1.0e-4,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "bf16": True,
    "val_size": 0.1,
    "neat_packing": True,
    "report_to": "none",
    "preprocessing_num_workers": 16,
}

TORCHTUNE: dict[str, Any] = {
    "output_dir": "/tmp/torchtune/llama3_1_8B/lora_single_device",
    "model": {
        "_component_": "torchtune.models.llama3_1.lora_llama3_1_8b",
        "lora_attn_modules": ["q_proj", "v_proj", "output_proj"],
        "apply_lora_to_mlp": True,
        "lora_rank": 8,
        "lora_alpha": 16,
    },
    "tokenizer": {"_component_": "torchtune.models.llama3.llama3_tokenizer", "path": "/tmp/tokenizer.model", "max_seq_len": 4096},
    "checkpointer": {
        "_component_": "torchtune.training.FullModelHFCheckpointer",
        "checkpoint_dir": "/tmp/Llama",
        "output_dir": "${output_dir}",
    },
    "dataset": {"_component_": "torchtune.datasets.alpaca_cleaned_dataset", "packed": True},
    "seed": None,
    "shuffle": True,
    "batch_size": 2,
    "optimizer": {"_component_": "torch.optim.AdamW", "fused": True, "weight_decay": 0.01, "lr": 3e-4},
    "lr_scheduler": {"_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup", "num_warmup_steps": 100},
    "epochs": 2,
    "max_steps_per_epoch": 50,
    "gradient_accumulation_steps": 8,
    "clip_grad_norm": None,
    "compile": True,
    "dtype": "bf16",
    "enable_activation_checkpointing": True,
    "metric_logger": {"_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": "${output_dir}/logs"},
}

CONFIGS = {"axolotl": AXOLOTL, "llama-factory": LLAMA_FACTORY, "torchtune": TORCHTUNE}


def imported(tmp_path: Path, config: dict[str, Any], **changes: Any) -> tuple[Imported, Recipe]:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({**config, **changes}))
    result = import_file(file)
    return result, parse_recipe(result.text())


def fates(result: Imported) -> dict[str, tuple[str, str]]:
    return {fate.key: (fate.became, fate.text) for fate in result.fates}


def flat_keys(config: dict[str, Any], prefix: str = "") -> set[str]:
    return {
        name
        for key, value in config.items()
        for name in (flat_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}"})
    }


@pytest.mark.parametrize("program", list(READERS))
def test_whose_config_it_is_is_seen(program: str, tmp_path: Path) -> None:
    assert imported(tmp_path, CONFIGS[program])[0].program == program


@pytest.mark.parametrize("program", list(READERS))
def test_every_key_is_accounted_for(program: str, tmp_path: Path) -> None:
    assert flat_keys(CONFIGS[program]) <= set(fates(imported(tmp_path, CONFIGS[program])[0]))


def test_an_axolotl_config_becomes_its_recipe(tmp_path: Path) -> None:
    recipe = imported(tmp_path, AXOLOTL)[1]
    method = recipe.method.model_dump()
    assert recipe.name == "lora-out" and recipe.model.path == "NousResearch/Llama-3.2-1B" and recipe.model.dtype == "bf16"
    assert [(source.path, source.format) for source in recipe.data.sources] == [
        ("hf:teknium/GPT4-LLM-Cleaned", "alpaca"), ("rows.jsonl", "sharegpt"), ("more.json", "alpaca"),
    ]  # fmt: skip
    assert (method["rank"], method["alpha"], method["dropout"], method["targets"], method["rslora"]) == (16, 32, 0.05, "all-linear", True)
    assert (recipe.optim.batch_size, recipe.backend.micro_batch, recipe.optim.lr, recipe.optim.warmup) == (8, 2, 2e-4, 0.1)
    assert (recipe.data.max_length, recipe.data.pack, recipe.data.validation, recipe.optim.epochs) == (2048, True, 0.1, 3)


def test_a_llama_factory_config_becomes_its_recipe(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    info = {
        "identity": {"file_name": "identity.json"},
        "glaive_toolcall_en_demo": {"file_name": "glaive.json", "formatting": "sharegpt", "columns": {"messages": "conversations"}},
    }
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    recipe = imported(tmp_path, LLAMA_FACTORY)[1]
    method = recipe.method.model_dump()
    assert [(Path(source.path).name, source.format) for source in recipe.data.sources] == [
        ("identity.json", "alpaca"),
        ("glaive.json", "sharegpt"),
    ]
    assert (method["rank"], method["alpha"], method["targets"]) == (16, 32, ("q_proj", "v_proj"))  # their alpha is 2 x rank when unset
    assert (recipe.optim.batch_size, recipe.optim.lr, recipe.data.max_length, recipe.data.pack) == (8, 1e-4, 1024, True)
    assert recipe.backend.gradient_checkpointing  # on by default there


def test_a_torchtune_config_becomes_its_recipe(tmp_path: Path) -> None:
    recipe = imported(tmp_path, TORCHTUNE)[1]
    method = recipe.method.model_dump()
    assert method["targets"] == ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert (recipe.model.path, recipe.data.sources[0].path, recipe.data.max_length) == ("/tmp/Llama", "hf:yahma/alpaca-cleaned", 4096)
    assert (recipe.optim.max_steps, recipe.optim.batch_size, recipe.optim.warmup, recipe.optim.clip_norm) == (100, 16, 100, 0)


def test_what_is_not_supported_says_why_and_stands_in_the_recipe(tmp_path: Path) -> None:
    result = imported(tmp_path, AXOLOTL)[0]
    assert fates(result)["loraplus_lr_ratio"] == ("not supported", "LoRA+ is not in this version")
    assert fates(result)["brand_new_key"][0] == "not supported" and "not a key of axolotl" in fates(result)["brand_new_key"][1]
    assert "loraplus_lr_ratio" in result.text().splitlines()[0]


def test_every_template_an_importer_chooses_exists() -> None:
    chosen = {*axolotl.TEMPLATES.values(), *llama_factory.TEMPLATES.values()}
    assert chosen <= {"auto", *template_names()}


def test_a_template_that_has_the_same_name_here_is_taken(tmp_path: Path) -> None:
    assert imported(tmp_path, LLAMA_FACTORY, template="zephyr")[1].model.chat_template == "zephyr"


def test_a_key_that_is_off_is_kept_as_the_default(tmp_path: Path) -> None:
    assert fates(imported(tmp_path, AXOLOTL, neftune_noise_alpha=None)[0])["neftune_noise_alpha"][0] == "default"


def test_text_alone_is_pre_training(tmp_path: Path) -> None:
    recipe = imported(tmp_path, AXOLOTL, datasets=[{"path": "texts.txt", "type": "completion"}])[1]
    assert (recipe.stage.kind, recipe.data.sources[0].format) == ("pretrain", "text")


def test_full_fine_tuning_is_told_by_the_missing_adapter(tmp_path: Path) -> None:
    result, recipe = imported(tmp_path, AXOLOTL, adapter=None)
    assert (recipe.method.kind, fates(result)["lora_r"]) == ("full", ("ignored", "no adapter is trained"))


def test_an_unknown_stage_leaves_a_recipe_that_says_so(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({**AXOLOTL, "rl": "a_stage_of_the_future"}))
    result = import_file(file)
    assert "the recipe will not validate" in fates(result)["rl"][1]
    with pytest.raises(ConfigError, match="unknown stage"):
        parse_recipe(result.text())


def test_a_file_of_no_known_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("services: {web: {image: nginx}}\n")
    with pytest.raises(ConfigError, match="cannot tell which program"):
        import_file(tmp_path / "c.yaml")


def test_the_command_writes_a_recipe_that_validates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(AXOLOTL))
    assert cli.main(["import-config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "r.yaml")]) == 0
    assert "translated" in capsys.readouterr().out
    assert cli.main(["validate", str(tmp_path / "r.yaml")]) == 0


def test_the_command_never_overwrites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(AXOLOTL))
    (tmp_path / "r.yaml").write_text("mine")
    assert cli.main(["import-config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "r.yaml")]) == 2
    assert (tmp_path / "r.yaml").read_text() == "mine"
