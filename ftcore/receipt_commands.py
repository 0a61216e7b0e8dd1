"""`ftcore verify-receipt`: whether an answer, as it was saved, is the one its receipt was signed for, and by which weights.

In: an answer's JSON, the server's public keys, perhaps the store. Out: one line, an exit code. Runs in: a person's terminal; no torch.
"""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ftcore.adapters import AdapterRef, AdapterStore, split_ref
from ftcore.errors import ConfigError, IntegrityError
from ftcore.receipts import Receipt, Said, said, said_vector, verify_receipt


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="ftcore verify-receipt", description="check which weights gave an answer")
    parser.add_argument("answer", type=Path, metavar="ANSWER.json", help="the body of an answer, as the server sent it")
    parser.add_argument("--keys", type=Path, required=True, metavar="KEYS.json", help="the body of GET /v1/receipt-keys")
    parser.add_argument("--store", metavar="URL", help="the adapter store: the version has to be sealed there, and not revoked")
    parsed = parser.parse_args(list(arguments))
    body, keys = _json(parsed.answer), _json(parsed.keys)
    try:
        receipt = Receipt.model_validate(body["ftcore_receipt"])
        if body["object"] == "list":
            texts = [_vector(place, row) for place, row in enumerate(body["data"])]
        else:
            texts = [_text(place, choice, body["object"]) for place, choice in enumerate(body["choices"])]
        pems = {row["id"]: row["pem"] for row in keys["data"]}
    except (KeyError, TypeError, ValidationError) as error:
        raise ConfigError("this is not an answer with a receipt, or not a list of keys", got=str(error)[:200]) from error
    verify_receipt(receipt, texts, pems)
    if parsed.store and receipt.adapter:
        ref = AdapterRef(*split_ref(receipt.adapter))
        store = AdapterStore(parsed.store)
        store.card(ref)
        if (reason := store.revocation(ref)) is not None:
            raise IntegrityError("the version that answered was revoked since", where=ref, got=reason)
    print(f"sound: {receipt.adapter or 'the bare base'} on base {receipt.base[:12]} answered request {receipt.request} at {receipt.time}")
    return 0


def _vector(place: int, row: dict[str, Any]) -> Said:
    """An embedding, as numbers or as base64: either holds all bits of fp32."""
    if row["object"] != "embedding" or row["index"] != place:
        raise ConfigError("this answer is not as it was sent", where=f"data[{place}]", wanted="an embedding")
    values = row["embedding"]
    return values if isinstance(values, str) else said_vector(struct.pack(f"<{len(values)}f", *values))


def _text(place: int, choice: dict[str, Any], kind: str) -> Said:
    """A choice's text and calls, in the one form that its kind of answer has: another would be read by somebody and signed by nobody."""
    is_chat = kind == "chat.completion"
    if ("text" in choice) == is_chat or ("message" in choice) != is_chat or choice["index"] != place:
        raise ConfigError("this answer is not as it was sent", where=f"choices[{place}]", wanted=f"the form of a {kind}")
    if not is_chat:
        return str(choice["text"])
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in choice["message"].get("tool_calls") or ()]
    return said(choice["message"]["content"] or "", calls)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError("this file cannot be read", where=path, got=str(error)[:200], wanted="JSON") from error
