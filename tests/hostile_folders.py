"""Attacks on adapter folders: each makes something hostile of a sound version, sealed by who checks nothing; for tests of serving."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ftcore.adapter_files import CONFIG, CONTENT, WEIGHTS, FileFact, content_digest
from ftcore.adapters import AdapterRef
from ftcore.storage import file_digest

Tree = dict[str, Any]


def _nothing(_: Any) -> None:
    pass


@dataclass(frozen=True)
class Attack:
    name: str
    words: str
    """What the refusal says."""
    folder: Callable[[Path], object] = _nothing
    """On the folder, before it is sealed with true hashes."""
    card: Callable[[Tree], object] = _nothing
    """On the card, before its digest is taken."""
    sealed: Callable[[Path], object] = _nothing
    """On the version as it lies in the store."""
    is_imported: bool = False
    """Importing it would make another adapter of it, with probes of its own: there is nothing to refuse."""


def seal_unchecked(folder: Path, card: Tree, store: Path, attack: Attack) -> AdapterRef:
    """Moves a folder into a store as a version with a card that fits it, except for what the attack does."""
    with (folder / CONFIG).open("a") as file:
        file.write("".join(random.choices(" \n", k=64)))  # a version of its own
    attack.folder(folder)
    found = [path for path in sorted(folder.iterdir()) if path.name in CONTENT and path.is_file()]
    card = {**card, "files": {path.name: {"sha256": file_digest(path), "bytes": path.stat().st_size} for path in found}, "signature": None}
    attack.card(card)
    card["digest"] = content_digest({name: FileFact.model_construct(**fact) for name, fact in card["files"].items()})
    ref = AdapterRef("acme", "support", card["digest"])
    (folder / "card.json").write_text(json.dumps(card))
    (store / ref.key).parent.mkdir(parents=True, exist_ok=True)
    folder.rename(store / ref.key)
    attack.sealed(store / ref.key)
    return ref


def config(**changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def raw(name: str, content: bytes | Callable[[bytes], bytes]) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content(path.read_bytes()))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], object], name: str = WEIGHTS) -> Callable[[Path], object]:
    def changed(folder: Path) -> None:
        found = load_file(folder / name)
        change(found)
        save_file({key: tensor.contiguous() for key, tensor in found.items()}, folder / name)

    return changed


def header(change: Callable[[Tree], object]) -> Callable[[Path], object]:
    """Rewrites the header of the weights, and leaves the numbers."""

    def changed(content: bytes) -> bytes:
        length = struct.unpack("<Q", content[:8])[0]
        tree = json.loads(content[8 : 8 + length])
        tree.pop("__metadata__", None)
        made = change(tree)
        text = made if isinstance(made, bytes) else json.dumps(tree).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + length :]

    return raw(WEIGHTS, changed)


def first(**changes: Any) -> Callable[[Tree], object]:
    return lambda tree: tree[next(iter(tree))].update(changes)


def swap_for(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return change


def _every(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda found: found.update({key: change(value) for key, value in found.items() if part in key})


def _rename(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda found: found.update({key.replace(old, new): found.pop(key) for key in list(found) if old in key})


def _only(found: dict[str, torch.Tensor], part: str) -> None:
    for key in [key for key in found if part in key]:
        del found[key]


def _widen(rank: int) -> Callable[[Path], object]:
    def grown(value: torch.Tensor, dim: int) -> torch.Tensor:
        shape = list(value.shape)
        shape[dim] = rank
        return torch.full(shape, 0.01)

    def change(folder: Path) -> None:
        tensors(_every("lora_A", lambda value: grown(value, 0)))(folder)
        tensors(_every("lora_B", lambda value: grown(value, 1)))(folder)
        config(r=rank)(folder)

    return change


NESTED = b'{"peft_type": "LORA", "x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
BOMB = "([a-z._0-9]+)+!"
FAT = {"sha256": "0" * 64, "bytes": 2**50}
_WIDE = [
    ("header shape of 2^63", first(shape=[2**63, 2])),
    ("negative shape", first(shape=[-2, -32])),
    ("shape is text", first(shape="2x32")),
]

CONTENTS = (
    # tensors
    Attack("a tensor is missing", "half of a LoRA pair", tensors(lambda found: found.pop(next(key for key in found if "lora_B" in key)))),
    Attack("a whole layer is missing", "recorded logits", tensors(lambda found: _only(found, "layers.0.")), is_imported=True),
    Attack("an extra tensor", "it holds `base_model.model.extra`", tensors(lambda f: f.update({"base_model.model.extra": torch.ones(2)}))),
    Attack("renamed tensors", "it adapts", tensors(_rename("layers.0", "layers.70"))),
    Attack("tensors for the head", "it adapts `lm_head_2`", tensors(_rename("model.layers.0.self_attn.q_proj", "lm_head_2"))),
    Attack("a wrong shape", "shapes do not fit", tensors(_every("lora_A", lambda value: value[:, :-1]))),
    Attack("a scalar", "shapes do not fit", tensors(_every("lora_A", lambda value: value[0, 0]))),
    Attack("another rank in the configuration", "shapes do not fit", config(r=1)),
    Attack("NaN", "not finite", tensors(_every("lora_A", lambda value: value * float("nan")))),
    Attack("infinity", "not finite", tensors(_every("lora_B", lambda value: value / 0))),
    Attack("all B at zero", "still zero", tensors(_every("lora_B", torch.zeros_like))),
    Attack("all A at zero", "recorded logits", tensors(_every("lora_A", torch.zeros_like))),
    Attack("absurd weights", "recorded logits", tensors(_every("lora_", lambda value: torch.full_like(value, 1e30)))),
    Attack(
        "whole numbers for weights", "no trainable type", tensors(_every("lora_A", lambda value: torch.ones(value.shape).to(torch.int8)))
    ),
    Attack("a huge rank", "rank is 4096", _widen(4096), is_imported=True),
    # headers
    Attack("a header longer than the file", "ends before its header", raw(WEIGHTS, lambda old: struct.pack("<Q", len(old)) + old[8:])),
    Attack("a header of 2^63 bytes", "ends before its header", raw(WEIGHTS, lambda old: struct.pack("<Q", 2**63) + old[8:])),
    Attack("a truncated file", "cut short", raw(WEIGHTS, lambda old: old[:-4])),
    Attack("bytes nobody claims", "bytes nobody claims", raw(WEIGHTS, lambda old: old + b"#!/bin/sh\n")),
    Attack("overlapping offsets", "overlap", header(lambda tree: tree[list(tree)[1]].update(data_offsets=[0, 256]))),
    Attack(
        "holes",
        "damaged",
        header(lambda tree: [entry.update(data_offsets=[x + 4 for x in entry["data_offsets"]]) for entry in tree.values()]),
    ),
    Attack("a tensor twice", "twice", header(lambda tree: b"{" + (json.dumps(tree)[1:-1] + ", " + json.dumps(tree)[1:]).encode())),
    *(Attack(name, "damaged", header(change)) for name, change in _WIDE),
    Attack("a dtype that lies", "contradicts itself", header(first(dtype="F64"))),
    Attack("an unknown dtype", "cannot be read", header(first(dtype="PICKLE"))),
    Attack("a header too deep", "damaged", header(lambda _: b'{"a":' * 100_000)),
    Attack("a name that is no text", "cannot be read|it holds", header(lambda tree: tree.update({"\ud800": tree.pop(next(iter(tree)))}))),
    # configurations
    Attack("an unknown method", "its method is EVIL", config(peft_type="EVIL")),
    Attack("DoRA", "DoRA", config(use_dora=True)),
    Attack("whole modules", "modules_to_save", config(modules_to_save=["lm_head"])),
    Attack("biases", "biases", config(bias="all")),
    Attack("alpha NaN", "its lora_alpha is nan", config(lora_alpha=float("nan"))),
    Attack("alpha is text", "its lora_alpha is", config(lora_alpha="16")),
    Attack("alpha of 400 digits", "its lora_alpha is", config(lora_alpha=10**400)),
    Attack("another alpha", "recorded logits", config(lora_alpha=5), is_imported=True),
    Attack("a search that never ends", "could take for ever", config(target_modules=BOMB)),
    Attack("a search that never ends, in rank_pattern", "could take for ever", config(rank_pattern={BOMB: 2})),
    Attack("a slow search in alpha_pattern", "alpha_pattern", config(alpha_pattern={".*.*.*.*!": 2}), is_imported=True),
    Attack("rank_pattern promises other ranks", "shapes do not fit", config(rank_pattern={"q_proj": 3})),
    Attack("rank_pattern is a list", "rank_pattern", config(rank_pattern=["q_proj"])),
    Attack("nested too deep", "cannot be read", raw(CONFIG, NESTED)),
    Attack("a number of a million digits", "cannot be read", raw(CONFIG, b'{"peft_type": "LORA", "r": ' + b"9" * 1_000_000 + b"}")),
    Attack("a configuration of 2 MiB", "too large|cannot be read", raw(CONFIG, lambda old: old + b" " * (2 << 20))),
    Attack("a key twice", "twice", raw(CONFIG, lambda old: b'{"peft_type": "IA3", ' + old.strip()[1:])),
    Attack("not UTF-8", "cannot be read", raw(CONFIG, lambda old: old.replace(b"LORA", b"LOR\xff"))),
    Attack("UTF-16", "cannot be read", raw(CONFIG, lambda old: old.decode().encode("utf-16"))),
    Attack("not an object", "not a PEFT adapter", raw(CONFIG, b"[]")),
    Attack("remote code", "Python code", config(auto_map={"AutoModel": "evil.Model"})),
    Attack("a library to import", "Python code", config(auto_mapping={"parent_library": "os", "base_model_class": "x"})),
    Attack("megatron", "Python code", config(megatron_config={"x": 1}, megatron_core="os")),
    # files
    Attack(
        "a pickle in place of the weights",
        "does not name|lacks a file",
        lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"),
    ),
    Attack("a pickle under the weights' name", "damaged", raw(WEIGHTS, b"\x80\x04\x95" + b"c" * 200)),
    Attack("a folder in place of the weights", "does not name", swap_for(WEIGHTS, Path.mkdir)),
    Attack("a link in place of the weights", "does not name", swap_for(WEIGHTS, lambda path: path.symlink_to("/etc/passwd"))),
)
"""What the content says. Refused by `import` as well, unless it says otherwise."""

SEALED = (
    Attack(
        "altered after it was sealed", "not the one that was published", sealed=raw(WEIGHTS, lambda old: old[:-1] + bytes([old[-1] ^ 1]))
    ),
    Attack("grown after it was sealed", "another size", sealed=raw(WEIGHTS, lambda old: old * 2)),
    Attack("a file is gone", "no such file", sealed=lambda version: (version / CONFIG).unlink()),
    Attack("a pickle beside it", "does not name", sealed=raw("adapter_model.bin", b"\x80\x04.")),
    Attack("code beside it", "does not name", sealed=raw("modeling.py", b"import os")),
    Attack("a folder beside it", "does not name", sealed=lambda version: (version / "nested").mkdir()),
    Attack("a link beside it", "does not name", sealed=lambda version: (version / "tokenizer.json").symlink_to("/etc/passwd")),
    Attack("a pipe in place of the weights", "no such file", sealed=swap_for(WEIGHTS, os.mkfifo)),
    Attack("probes of nobody", "cannot be read|contradict", tensors(lambda found: found.pop("fp32.ids"), "probes.safetensors")),
    Attack(
        "probes that are not finite", "contradict", tensors(_every("fp32.tuned", lambda value: value * float("nan")), "probes.safetensors")
    ),
    Attack(
        "probes with a false effect", "bare base differs", tensors(_every("fp32.base", lambda value: value + 1e9), "probes.safetensors")
    ),
    Attack("another base", "another base", card=lambda card: card["base"].update(weights="0" * 64)),
    Attack("another tokenizer", "another tokenizer", card=lambda card: card.update(tokenizer="0" * 64)),
    Attack("another template", "another chat template", card=lambda card: card.update(template="0" * 64)),
    Attack("a card of another adapter", "belongs to another version", card=lambda card: card.update(name="sales")),
    Attack("a card of another tenant", "belongs to another version", card=lambda card: card.update(tenant="bolt")),
    Attack("a card that lies about its probes", "probes", card=lambda card: card["probes"]["fp32"].update(effect=123.0)),
    Attack("unknown fields in the card", "cannot be read", card=lambda card: card.update(run="os.system")),
    Attack(
        "a path out of the version", "cannot be read", card=lambda card: card["files"].update({"../../../../escaped": FAT | {"bytes": 1}})
    ),
    Attack("a file beyond the limit", "cannot be read", card=lambda card: card["files"].update({"tokenizer.json": FAT})),
    Attack("a size below zero", "cannot be read", card=lambda card: card["files"][WEIGHTS].update(bytes=-1)),
    Attack("a card of another digest", "digest names", sealed=raw("card.json", lambda old: old.replace(b'"sha256": "', b'"sha256": "0'))),
    Attack("a card that is no JSON", "cannot be read", sealed=raw("card.json", b"\xff{")),
    Attack("a card too deep", "cannot be read|too large", sealed=raw("card.json", NESTED)),
)
"""What only a publisher who writes into the store can do."""
ATTACKS = (*CONTENTS, *SEALED)
