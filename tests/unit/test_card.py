"""Cards: strict, frozen, and unable to steer the terminal or the Markdown they are shown in."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from ftcore.adapter_files import FileFact, content_digest
from ftcore.card import BaseFacts, Card, DataFacts, MethodFacts, ProbeFacts, QuantisationFacts, package_versions, printable, recipe_facts
from ftcore.errors import IntegrityError
from ftcore.export.modelcard import escaped, render_card, render_merged

ZEROS = "0" * 64
HOSTILE = "\x1b[2J\x1b]0;owned\x07 <script>alert(1)</script> [click](http://evil.example) | `x` \u202etxt.exe\n# heading"


def make_card(**changes: Any) -> Card:
    files = {"adapter_config.json": FileFact(sha256="1" * 64, bytes=2)}
    facts: dict[str, Any] = {
        "tenant": "acme", "name": "support", "digest": content_digest(files), "files": files,
        "base": BaseFacts(id="Qwen/Qwen2.5-0.5B", weights=ZEROS, dtype="bf16"), "tokenizer": ZEROS, "template": ZEROS,
        "data": DataFacts(digest=ZEROS, counts={"rows.train": 1200}), "recipe": recipe_facts({"name": "x"}),
        "method": MethodFacts(kind="lora", rank=8, alpha=16, targets=("q_proj", "v_proj"), num_trainable=1000), "stage": "sft", "seed": 7,
        "world_size": 2, "metrics": {"validation_loss": 1.25}, "probes": {"fp32": ProbeFacts(device="cpu", effect=3.5)},
        "packages": {"torch": "2.13.0"}, "created": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return Card(**{**facts, **changes})


def test_a_card_reads_back_as_it_was_written() -> None:
    card = make_card(parent="acme/support@" + "2" * 64)
    assert Card.from_json(card.to_json()) == card


def test_a_card_cannot_be_changed_in_memory() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        make_card().seed = 8


@pytest.mark.parametrize(
    "change",
    [{"extra": 1}, {"digest": "0" * 63}, {"digest": ZEROS + "\n"}, {"tenant": "../x"}, {"name": "a/b"}, {"world_size": 0},
     {"base": {"id": "x"}},
     {"seed": "seven"}, {"files": []}, {"created": "x" * 5000}, {"digest": "3" * 64}],
)  # fmt: skip
def test_a_card_with_a_wrong_field_is_refused(change: dict[str, Any]) -> None:
    tree = json.loads(make_card().to_json()) | change
    with pytest.raises(IntegrityError):
        Card.from_json(json.dumps(tree).encode())


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 200_000, b" " * (5 * 1024**2)], ids=["empty", "list", "cut", "bytes", "deep", "huge"]
)
def test_what_is_no_card_is_refused(raw: bytes) -> None:
    with pytest.raises(IntegrityError):
        Card.from_json(raw)


def test_the_model_card_has_the_hub_s_front_matter() -> None:
    _, head, body = render_card(make_card()).split("---\n", 2)
    facts = yaml.safe_load(head)
    assert facts["base_model"] == "Qwen/Qwen2.5-0.5B" and facts["library_name"] == "peft"
    assert facts["tags"] == ["lora", "sft", "ftcore"]
    assert body.startswith("\n# acme/support\n") and "1,200" in body


def test_a_card_without_quantisation_facts_still_reads_and_one_with_them_says_what_it_did() -> None:
    old = json.loads(make_card().to_json())
    del old["quantisation"]
    assert Card.from_json(json.dumps(old).encode()).quantisation is None
    facts = QuantisationFacts(how="nf4, computed in bf16", difference_bare=0.5, difference_tuned=0.75, effect=3.0, share=0.25)
    card = make_card(quantisation=facts)
    assert Card.from_json(card.to_json()) == card
    assert "0.75 with the adapter on: 25% of the adapter" in render_card(card)


def test_what_users_wrote_cannot_steer_the_model_card() -> None:
    card = make_card(base=BaseFacts(id=HOSTILE, weights=ZEROS, dtype=HOSTILE), metrics={HOSTILE: HOSTILE}, parent=HOSTILE, stage=HOSTILE)
    _, head, body = render_card(card).split("---\n", 2)
    assert "\x1b" not in head + body and "\u202e" not in head + body
    assert "<script" not in body and "[click](" not in body and "http://evil" not in body
    assert not any(line.startswith("# heading") for line in body.splitlines())
    table = [line for line in body.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in table} == {3}
    assert yaml.safe_load(head)["library_name"] == "peft"


def test_front_matter_cannot_be_ended_by_a_name() -> None:
    text = render_card(make_card(base=BaseFacts(id="x\n---\nlicense: mit", weights=ZEROS, dtype="fp32")))
    assert yaml.safe_load(text.split("---\n")[1])["base_model"].startswith("x\\n")


def test_a_merged_model_s_card_names_adapter_and_difference() -> None:
    text = render_merged(make_card(), "bf16", 0.0123, 0.35)
    assert "0.0123" in text and make_card().digest in text and "library_name: transformers" in text


def test_printable_text_shows_control_characters_instead_of_obeying_them() -> None:
    shown = printable("\x1b[31m a\u202eb\u200bc\r\n\x9b\ud800é日")
    assert shown.isprintable() and "\\x1b" in shown and "é日" in shown


def test_escaped_text_stays_on_one_line_of_a_table() -> None:
    assert "\n" not in escaped("a\nb") and "|" not in escaped("a|b").replace("\\|", "")


def test_versions_of_what_decides_numbers_are_known() -> None:
    assert {"torch", "peft", "transformers"} <= set(package_versions())
