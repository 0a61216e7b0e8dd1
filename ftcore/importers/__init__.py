"""Importers: configs of axolotl, LLaMA-Factory and torchtune as recipes, with an account of every key.

In: their YAML. Out: an Imported recipe. Runs in: a person's terminal.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ftcore.errors import ConfigError
from ftcore.importers import axolotl, llama_factory, torchtune
from ftcore.importers.base import Imported, Importing, Reader
from ftcore.recipe_file import read_tree

READERS: dict[str, Reader] = {"axolotl": axolotl.read, "llama-factory": llama_factory.read, "torchtune": torchtune.read}
MARKS: dict[str, tuple[str, ...]] = {
    "axolotl": ("base_model", "sequence_len", "micro_batch_size", "lora_r", "num_epochs"),
    "llama-factory": ("model_name_or_path", "finetuning_type", "cutoff_len", "template", "lora_rank", "per_device_train_batch_size"),
    "torchtune": ("checkpointer", "tokenizer", "optimizer", "model", "max_steps_per_epoch"),
}


def import_file(file: Path, program: str = "auto") -> Imported:
    """Reads another program's config. Raises ConfigError when it cannot be told whose it is."""
    tree = read_tree(file)
    program = recognised(tree.values, file) if program == "auto" else program
    config = torchtune.flat(tree.values) if program == "torchtune" else tree.values
    importing = Importing(program, config, file)
    READERS[program](importing)
    fates = tuple(
        importing.fates[key] for key in [*(k for k in config if k in importing.fates), *(k for k in importing.fates if k not in config)]
    )
    return Imported(program, file, importing.values, fates)


def recognised(values: dict[str, Any], file: Path) -> str:
    scores = {program: sum(key in values for key in keys) for program, keys in MARKS.items()}
    if isinstance(values.get("model"), dict) and "_component_" in values["model"]:
        scores["torchtune"] += 10
    best = max(scores, key=lambda program: scores[program])
    if scores[best] < 2 or sorted(scores.values())[-2] == scores[best]:
        raise ConfigError(
            "cannot tell which program this config is for", where=file, got=f"keys {', '.join(list(values)[:8])}",
            wanted="a training config of axolotl, LLaMA-Factory or torchtune", remedy="name it with --from",
        )  # fmt: skip
    return best
