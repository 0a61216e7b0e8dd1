"""Tokenizer: opened from a folder or the hub, and named by its content.

In: the recipe's model section. Out: a transformers tokenizer, its digest. Runs in: Ray Data tasks, the driver, train workers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ftcore.errors import ModelError
from ftcore.mirror import at_hand
from ftcore.storage import digest_of

if TYPE_CHECKING:
    from ftcore.recipe import Model

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """Opens `model.path` (a folder, or a hub name at `model.revision`). Code that comes with the model runs only if the recipe asks for it.

    Raises ModelError when the folder is missing, holds no tokenizer, or the hub cannot be reached.
    """
    model = at_hand(model, weights=False)
    folder = Path(model.path).expanduser()
    if folder.is_dir():
        if not any((folder / name).exists() for name in _FILES):
            raise ModelError(
                "this folder holds no tokenizer",
                where=folder,
                wanted="tokenizer.json (or tokenizer.model, vocab.json)",
                remedy="save it there with tokenizer.save_pretrained",
            )
        where, revision = str(folder), None
    elif looks_local(model.path):
        raise ModelError(
            "there is no such model folder",
            where=model.path,
            wanted="a folder with config.json, or a hub name `owner/name`",
            remedy="check model.path for a typing error",
        )
    else:
        where, revision = model.path, model.revision
    try:
        return AutoTokenizer.from_pretrained(where, revision=revision or "main", trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = str(error).strip().split("\n")[0][:300]
        local = "the tokenizer's files are damaged or of an unknown kind; save them again"
        remote = "check the name and your network (HF_ENDPOINT, HF_HUB_OFFLINE), or give a local folder"
        raise ModelError("cannot open the tokenizer", where=model.path, got=f"{type(error).__name__}: {first}",
                         remedy=local if folder.is_dir() else remote) from error  # fmt: skip


def looks_local(path: str) -> bool:
    """True for what cannot be a hub name: absolute, dotted, home, deeper than owner/name, or with a back slash."""
    return path.startswith(("/", ".", "~")) or path.count("/") > 1 or "\\" in path


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over what decides the ids: vocabulary, merges, normaliser, added and special tokens. Not over paths, padding, truncation
    (set per call) or the chat template (it has a digest of its own)."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state.pop("truncation", None)
        state.pop("padding", None)
    else:
        added = {str(index): str(token) for index, token in tokenizer.added_tokens_decoder.items()}
        state = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab(), "added": added}
    return digest_of({"state": state, "special": special})


def longest_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Most characters, of a text in NFC, that one token stands for; 0 where that is not certain: only byte-level BPE loses none of them."""
    backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
    if backend is None or any(token.lstrip or token.rstrip for token in tokenizer.added_tokens_decoder.values()):
        return 0
    state = json.loads(backend.to_str())
    is_whole = state["model"]["type"] == "BPE" and '"ByteLevel"' in json.dumps(state["pre_tokenizer"])
    if not is_whole or (state["normalizer"] or {"type": "NFC"})["type"] != "NFC":
        return 0
    return max(map(len, tokenizer.get_vocab()))  # each of its characters stands for a byte
