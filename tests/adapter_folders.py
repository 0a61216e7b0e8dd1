"""Small made-up adapter folders and their cards, for tests of the store."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from ftcore.adapter_files import content_digest, content_files
from ftcore.card import BaseFacts, Card, DataFacts, MethodFacts, ProbeFacts, RecipeFacts
from ftcore.probes import Probes, Recorded

ZEROS = "0" * 64


def make_folder(folder: Path, value: float = 1.0) -> Path:
    folder.mkdir(parents=True)
    tensors = {f"base_model.model.layers.0.q_proj.lora_{part}.weight": torch.full((2, 2), value) for part in "AB"}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}))
    ids = torch.arange(4).reshape(1, 4)
    Probes(((1, 2),), {"fp32": Recorded("cpu", ids, torch.full((1, 4), value), torch.zeros(1, 4))}).save(folder)
    return folder


def make_card(folder: Path, name: str = "support", tenant: str = "acme", **changes: object) -> Card:
    files = content_files(folder)
    facts = {
        "tenant": tenant, "name": name, "digest": content_digest(files), "files": files,
        "base": BaseFacts(id="base", weights=ZEROS, dtype="fp32"),
        "tokenizer": ZEROS, "template": ZEROS, "data": DataFacts(digest=ZEROS, counts={"rows": 3}),
        "recipe": RecipeFacts(digest=ZEROS, resolved={"name": "x"}),
        "method": MethodFacts(kind="lora", rank=2, alpha=4.0, targets=("q_proj",)),
        "stage": "sft", "seed": 0, "world_size": 1, "probes": {"fp32": ProbeFacts(device="cpu", effect=1.0)}, "packages": {"torch": "2"},
        "created": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return Card(**{**facts, **changes})
