"""What an adapter folder may hold, checked before anything reads it: plain PEFT in safetensors, probes, tokenizer files; no more.

In: a folder. Out: its content files with size and SHA-256, and the digest that names a version. Runs in: publish, fetch, serving; no torch.

The digest of a version is SHA-256 over the canonical JSON (no spaces, UTF-8) of `[[file name, sha256], ...]`, sorted by name, of every
content file. `README.md` and `card.json` are not content: the card names the digest, and the README is drawn from the card.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ftcore.errors import IntegrityError
from ftcore.safetensors_header import TensorFact, check_safetensors, without_duplicates
from ftcore.section import Section
from ftcore.storage import digest_of, file_digest

WEIGHTS, CONFIG, CARD, README = "adapter_model.safetensors", "adapter_config.json", "card.json", "README.md"
PROBES = ("probes.safetensors", "probes.json")
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip
CONTENT = (WEIGHTS, CONFIG, *PROBES, *TOKENIZER)
REQUIRED = (WEIGHTS, CONFIG, *PROBES)
NOT_CONTENT = (CARD, README, "manifest.json")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib")
CODE = (".py", ".so", ".pyc", ".sh", ".dll")
MAX_BYTES = {WEIGHTS: 64 * 1024**3, CONFIG: 1024**2, "probes.safetensors": 64 * 1024**2, "probes.json": 1024**2}
MAX_TOKENIZER_BYTES = 256 * 1024**2
FLOATS = ("F64", "F32", "BF16", "F16")
PATTERNS = ("target_modules", "exclude_modules", "target_parameters", "layers_pattern", "rank_pattern", "alpha_pattern")
"""Keys of a configuration that PEFT reads as regular expressions."""
MAX_PATTERN, MAX_REPEATS, MAX_WAYS = 4096, 6, 10_000
CODE_KEYS = ("megatron_config", "auto_map")
LORA_KEY = re.compile(r"\.lora_(embedding_)?[ABab](\.|$)|\.lora_magnitude_vector(\.|$)")


class FileFact(Section):
    """Size and hash of one content file."""

    sha256: str
    bytes: int


def content_files(folder: Path) -> dict[str, FileFact]:
    """Every content file with its facts. Raises IntegrityError for what is missing, unexpected, a link, a pickle, code or too large."""
    if not folder.is_dir() or folder.is_symlink():
        raise IntegrityError("an adapter is a folder", where=folder, remedy="give the folder that holds adapter_model.safetensors")
    facts = {}
    for path in sorted(folder.iterdir()):
        if path.name.endswith(".tmp"):
            continue
        _require_expected(path)
        if path.name in CONTENT:
            facts[path.name] = FileFact(sha256=file_digest(path), bytes=path.stat().st_size)
    missing = [name for name in REQUIRED if name not in facts]
    if missing:
        remedy = (
            "record probes: ftcore adapters import FOLDER tenant/name --base PATH" if missing[0] in PROBES else "train or copy it again"
        )
        raise IntegrityError("an adapter folder lacks a file", where=folder / missing[0], remedy=remedy)
    return facts


def content_digest(files: dict[str, FileFact]) -> str:
    """The version's name: see the top of this file."""
    return digest_of(sorted([name, fact.sha256] for name, fact in files.items() if name not in NOT_CONTENT))


def max_bytes(name: str) -> int:
    """The largest file of this name."""
    return MAX_BYTES.get(name, MAX_TOKENIZER_BYTES)


def check_adapter(folder: Path) -> dict[str, TensorFact]:
    """Reads headers and configuration without loading weights; returns the adapter's tensors.

    Raises IntegrityError for damaged files, weights that are no numbers or zero-sized, and configurations that would make PEFT import code.
    """
    config = read_config(folder)
    facts = check_safetensors(folder / WEIGHTS)
    if not facts:
        raise IntegrityError(
            "this adapter holds no tensors", where=folder / WEIGHTS, remedy="it was saved before weights were gathered; save it again"
        )
    empty = [name for name, fact in facts.items() if 0 in fact.shape]
    if empty:
        raise IntegrityError(
            "a tensor of this adapter is empty",
            where=folder / WEIGHTS,
            got=_shown(empty[0]),
            remedy="it was saved before weights were gathered",
        )
    if config["peft_type"] == "LORA" and not any(LORA_KEY.search(name) for name in facts):
        raise IntegrityError(
            "this LoRA adapter holds no LoRA tensor", where=folder / WEIGHTS, got=_shown(next(iter(facts))), remedy="save it again"
        )
    if config["peft_type"] == "LORA" and (odd := [name for name, fact in facts.items() if fact.dtype not in FLOATS]):
        got = f"{_shown(odd[0])}: {facts[odd[0]].dtype}"
        raise IntegrityError(
            "a LoRA tensor is of no trainable type", where=folder / WEIGHTS, got=got, wanted=", ".join(FLOATS), remedy="save it again"
        )
    return facts


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json as a dict. Raises IntegrityError when it is not plain PEFT data."""
    path = folder / CONFIG
    try:
        if path.stat().st_size > MAX_BYTES[CONFIG]:
            raise ValueError(f"larger than {MAX_BYTES[CONFIG]} bytes")
        config = json.loads(path.read_bytes().decode(), object_pairs_hook=without_duplicates)
    except (OSError, ValueError, RecursionError) as error:
        raise IntegrityError(
            "this adapter configuration cannot be read", where=path, got=str(error)[:200], remedy="save the adapter again"
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise IntegrityError(
            "this is not a PEFT adapter configuration", where=path, wanted="an object with `peft_type`", remedy="save it with PEFT"
        )
    library = (
        (config.get("auto_mapping") or {}).get("parent_library", "transformers")
        if isinstance(config.get("auto_mapping") or {}, dict)
        else ""
    )
    if any(config.get(key) for key in CODE_KEYS) or str(library).split(".")[0] != "transformers":
        raise IntegrityError(
            "this adapter configuration names Python code to import",
            where=path,
            got=_shown(str(config.get("megatron_core") or config.get("auto_map") or library)),
            wanted="plain PEFT data",
            remedy="remove megatron_config, auto_map and auto_mapping if you trust where it comes from",
        )
    for key in PATTERNS:
        value = config.get(key) or ()
        for pattern in value if isinstance(value, list | dict | tuple) else (value,):
            if not isinstance(pattern, str) or not _ends_soon(pattern):
                raise IntegrityError(
                    "a pattern of this adapter configuration could take for ever", where=path, got=_shown(f"{key}: {pattern}"),
                    wanted=f"at most {MAX_REPEATS} repetitions, none of a group", remedy="name the modules",
                )  # fmt: skip
    return config


def read_probe_facts(folder: Path) -> dict[str, Any]:
    """What probes.json says of each precision: device and effect."""
    path = folder / PROBES[1]
    try:
        facts = json.loads(path.read_bytes().decode(), object_pairs_hook=without_duplicates)["precisions"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError("these probes cannot be read", where=path, got=str(error)[:200], remedy="record them again") from error
    return dict(facts) if isinstance(facts, dict) else {}


def _ends_soon(pattern: str) -> bool:
    """Whether a regular expression has too little in it for its search to grow exponentially."""
    bare = re.sub(r"\\.|\[\^?\]?(\\.|[^\]\\])*\]", "x", pattern, flags=re.DOTALL)  # escapes and classes stand for one character
    num_repeats, num_ways, open_groups = 0, 1, [1]
    for before, char in zip("(" + bare, bare, strict=False):
        if char in "*+?{" and before not in "(*+?}":  # after `(` it opens a group of some kind, after another it makes that one lazy
            num_repeats += 1
            if before == ")":
                return False
        elif char == "(":
            open_groups.append(1)
        elif char == "|":
            open_groups[-1] += 1
        elif char == ")" and len(open_groups) > 1:
            num_ways *= open_groups.pop()
    return len(pattern) <= MAX_PATTERN and num_repeats <= MAX_REPEATS and num_ways <= MAX_WAYS


def _require_expected(path: Path) -> None:
    suffix = path.suffix.lower()
    reason = ""
    if path.is_symlink():
        reason = "a symbolic link in an adapter folder"
    elif not path.is_file():
        reason = "something that is no file in an adapter folder"
    elif suffix in PICKLES:
        reason = "a pickle in an adapter folder: loading one can run code"
    elif suffix in CODE:
        reason = "code in an adapter folder"
    elif path.name not in CONTENT and path.name not in NOT_CONTENT:
        reason = "an unexpected file in an adapter folder"
    if reason:
        raise IntegrityError(reason, where=_shown(str(path)), wanted=", ".join(CONTENT[:4]) + " and tokenizer files", remedy="remove it")
    limit = max_bytes(path.name)
    if path.stat().st_size > limit:
        raise IntegrityError(
            "a file of this adapter is too large", where=path, got=f"{path.stat().st_size} bytes", wanted=f"at most {limit}"
        )


def _shown(text: str) -> str:
    return text[:300].encode("unicode_escape").decode()
