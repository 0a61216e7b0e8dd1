"""What an adapter folder may hold: everything hostile or damaged is refused before a library reads it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ftcore.adapters import AdapterStore
from ftcore.errors import IntegrityError
from tests.adapter_folders import make_card, make_folder


def _pickle(folder: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(b"x")


def _link(folder: Path) -> None:
    (folder / "tokenizer.json").symlink_to("/etc/hostname")


def _linked_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder.parent / "elsewhere")
    (folder / "adapter_model.safetensors").symlink_to(folder.parent / "elsewhere")


def _code(folder: Path) -> None:
    (folder / "modeling.py").write_text("x = 1")


def _folder(folder: Path) -> None:
    (folder / "tokenizer.json").mkdir()


def _stranger(folder: Path) -> None:
    (folder / "notes.txt").write_text("x")


def _no_probes(folder: Path) -> None:
    (folder / "probes.safetensors").unlink()


def _fifo(folder: Path) -> None:
    os.mkfifo(folder / "vocab.json")


def _truncated(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def _huge_header(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}")


def _not_safetensors(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"\x80\x04" + b"p" * 100)


def _no_tensors(folder: Path) -> None:
    save_file({}, folder / "adapter_model.safetensors")


def _empty_tensor(folder: Path) -> None:
    save_file({"base_model.lora_A.weight": torch.zeros(0, 4)}, folder / "adapter_model.safetensors")


def _no_lora(folder: Path) -> None:
    save_file({"weight": torch.ones(2)}, folder / "adapter_model.safetensors")


def _imports_code(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "megatron_config": {"x": 1}, "megatron_core": "os"}))


def _auto_mapping(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "auto_mapping": {"parent_library": "evil"}}))


def _broken_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("[" * 100_000)


def _list_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("[]")


HOSTILE = [
    _pickle, _link, _linked_weights, _code, _folder, _stranger, _no_probes, _fifo, _truncated, _huge_header, _not_safetensors, _no_tensors,
    _empty_tensor, _no_lora, _imports_code, _auto_mapping, _broken_config, _list_config,
]  # fmt: skip


@pytest.mark.parametrize("spoil", HOSTILE, ids=lambda spoil: spoil.__name__)
def test_a_hostile_folder_is_refused(tmp_path: Path, spoil) -> None:
    folder = make_folder(tmp_path / "a")
    card = make_card(folder)
    spoil(folder)
    store = AdapterStore(tmp_path / "store")
    with pytest.raises(IntegrityError):
        try:
            card = make_card(folder)
        finally:
            store.publish(folder, card)
    assert store.list() == []
