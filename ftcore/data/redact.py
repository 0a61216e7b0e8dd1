"""Redact: finds secrets and personal data in text by their shape, and replaces them where the recipe asks for it.

In: text, or an item. Out: findings by kind, the same with each replaced by its kind in brackets. Runs in: Ray Data tasks; no torch.

Shapes only: names and postal addresses are not found. Checksums (Luhn, IBAN) and context keep the false alarms down.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ftcore.data.types import Conversation, Item, Message, Text

Check = Callable[[str], bool]


@dataclass(frozen=True)
class Kind:
    """`hint`: one of these must be in the (lower-cased) text before the pattern is tried at all. `check` decides about each match.
    The first group of the pattern, if it has one, is what is secret."""

    name: str
    pattern: re.Pattern[str]
    hint: tuple[str, ...] = ()
    check: Check = bool


@dataclass(frozen=True)
class Finding:
    kind: str
    start: int
    end: int


_DIGITS = tuple("0123456789")


def _luhn(text: str) -> bool:
    digits = [int(char) for char in text if char.isdigit()]
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[-2::-2]]
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _iban(text: str) -> bool:
    packed = text.replace(" ", "")
    return int("".join(str(int(char, 36)) for char in packed[4:] + packed[:4])) % 97 == 1


def _resident_id(text: str) -> bool:
    """GB 11643: the last sign is a checksum over the other seventeen."""
    weighed = sum(int(digit) * (2 ** (17 - i) % 11) for i, digit in enumerate(text[:17]))
    return "10X98765432"[weighed % 11] == text[17].upper()


def _public_ip(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False


def _phone(text: str) -> bool:
    return 8 <= sum(char.isdigit() for char in text) <= 15


def _secret(text: str) -> bool:
    """Not a placeholder: long enough, not one repeated sign, not <...> or ${...} or a plain word."""
    return len(set(text)) > 4 and not text.startswith(("<", "$", "{", "[", "%")) and any(not char.isalpha() for char in text)


_KEY_BLOCK = r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----.*?(?:-----END (?:[A-Z]+ )*PRIVATE KEY-----|\Z)"
_TOKEN = r"\b(?:gh[pousr]_\w{36,}|github_pat_\w{40,}|glpat-[\w-]{20,}|hf_[A-Za-z0-9]{30,}|xox[abprs]-[\w-]{10,})"
_API_KEY = r"\b(?:sk-(?:[a-z]+-)*[A-Za-z0-9_-]{20,}|AIza[\w-]{35}|[rs]k_live_[A-Za-z0-9]{16,})"
_NAMED = r"(?i)\b(?:password|passwd|pwd|secret|api[_-]?key|access[_-]?token|auth[_-]?token)\b"
_EMAIL = r"\b[\w.+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,4}[A-Za-z]{2,24}\b"
_IBAN = r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"
_SSN = r"(?<![\d-])(?!000|666|9\d\d)\d{3}-(?!00)\d\d-(?!0000)\d{4}(?![\d-])"
_ABROAD = r"\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4}"
_PHONE = rf"(?<![\w+.-])(?:{_ABROAD}|\(\d{{3}}\) ?\d{{3}}-\d{{4}}|\d{{3}}-\d{{3}}-\d{{4}})(?![\w-])"

KINDS: tuple[Kind, ...] = (
    Kind("private key", re.compile(_KEY_BLOCK, re.S), ("-----begin",)),
    Kind("password in url", re.compile(r"\b[a-z][a-z0-9+.-]{1,20}://[^\s/:@]{1,64}:([^\s/@]{1,256})@", re.I), ("://",)),
    Kind("json web token", re.compile(r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}"), ("eyj",)),
    Kind("aws key", re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), ("akia", "asia")),
    Kind("access token", re.compile(_TOKEN), ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "hf_", "xox")),
    Kind("api key", re.compile(_API_KEY), ("sk-", "aiza", "k_live_")),
    Kind("password", re.compile(_NAMED + r"[\"']?\s*[:=]\s*[\"']?([^\s\"',;]{6,})"), ("pass", "pwd", "secret", "key", "token"), _secret),
    Kind("email", re.compile(_EMAIL), ("@",)),
    Kind("iban", re.compile(_IBAN), _DIGITS, _iban),
    Kind("resident id", re.compile(r"(?<![\d.-])[1-9]\d{5}(?:19|20)\d{2}[01]\d[0-3]\d{4}[\dXx](?![\d.-])"), (), _resident_id),
    Kind("card number", re.compile(r"(?<![\d.-])\d(?:[ -]?\d){12,18}(?![\d.-])"), _DIGITS, _luhn),
    Kind("social security number", re.compile(_SSN), ("-",)),
    Kind("ip address", re.compile(r"(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?![\d.])"), _DIGITS, _public_ip),
    Kind("phone number", re.compile(r"(?<![\w.+-])1[3-9]\d{9}(?![\w.-])|(?<=[\u4e00-\u9fff])1[3-9]\d{9}(?!\d)")),
    Kind("phone number", re.compile(_PHONE), _DIGITS, _phone),
)


def scan(text: str) -> list[Finding]:
    """Secrets and personal data in the text, in order, none overlapping; of two that overlap the kind listed first counts."""
    lowered = text.lower()
    taken: list[Finding] = []
    covered = bytearray()
    for kind in KINDS:
        if kind.hint and not any(hint in lowered for hint in kind.hint):
            continue
        for found in _matches(kind, text):
            covered = covered or bytearray(len(text))
            if not any(covered[found.start : found.end]):
                covered[found.start : found.end] = b"\1" * (found.end - found.start)
                taken.append(found)
    return sorted(taken, key=lambda found: found.start)


def mask(text: str, findings: list[Finding]) -> str:
    """The text with each finding replaced by its kind: `[email]`."""
    parts, done = [], 0
    for found in findings:
        parts += [text[done : found.start], f"[{found.kind}]"]
        done = found.end
    return "".join([*parts, text[done:]])


def redact_item(item: Item, *, masked: bool) -> tuple[Item, list[str]]:
    """The kinds found anywhere in an item's texts (turns, tool calls, tools, documents), and the item, with them masked if asked for."""
    kinds: list[str] = []

    def look(text: str) -> str:
        findings = scan(text)
        kinds.extend(found.kind for found in findings)
        return mask(text, findings) if masked and findings else text

    changed = _map_texts(item, look)
    return (changed if kinds else item), kinds


def _map_texts(item: Item, change: Callable[[str], str]) -> Item:
    if isinstance(item, Text):
        return replace(item, text=change(item.text))
    if isinstance(item, Conversation):
        return replace(item, messages=_turns(item.messages, change), tools=_tree(item.tools, change))
    chosen, rejected = _turns((item.chosen, item.rejected), change)
    return replace(item, prompt=_turns(item.prompt, change), chosen=chosen, rejected=rejected)


def _turns(messages: tuple[Message, ...], change: Callable[[str], str]) -> tuple[Message, ...]:
    return tuple(replace(turn, content=change(turn.content), tool_calls=_tree(turn.tool_calls, change)) for turn in messages)


def _tree(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _tree(inner, change) for key, inner in value.items()}
    return type(value)(_tree(inner, change) for inner in value) if isinstance(value, list | tuple) else value


def _matches(kind: Kind, text: str) -> Iterator[Finding]:
    group = 1 if kind.pattern.groups else 0
    for match in kind.pattern.finditer(text):
        if kind.check(match[group]):
            yield Finding(kind.name, match.start(group), match.end(group))
