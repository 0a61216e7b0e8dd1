"""Documents: whole texts weighed by `ftcore evaluate --task documents`, and the test split of a recipe that learns from texts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from ftcore.errors import ConfigError
from ftcore.evals.records import Records
from pipelines import evaluate

LONG = "The quick brown fox jumps over the lazy dog. " * 12
CONTEXT = 64


def results_of(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "results.json").read_text()))


def test_a_document_is_weighed_whole_and_a_longer_one_window_by_window(tiny_model_dir: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts, out = ["Open the report.", LONG, "0123456789 alpha"], tmp_path / "out"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, " "]))
    command = ["--rows", str(tmp_path / "rows.jsonl"), "--base", str(tiny_model_dir), "--systems", "base", "--here"]
    assert evaluate.main([*command, "--task", "documents", "--context", str(CONTEXT), "--out", str(out)]) == 0
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)

    def nll(ids: list[int]) -> float:
        whole = torch.tensor([[tokenizer.eos_token_id, *ids]])
        with torch.no_grad():
            logps = model(whole).logits[0, :-1].log_softmax(-1)
        return -float(logps[range(len(ids)), ids].sum())

    ids = [tokenizer(text)["input_ids"] for text in texts]
    assert len(ids[1]) > 2 * CONTEXT
    expected = [sum(nll(own[at : at + CONTEXT - 1]) for at in range(0, len(own), CONTEXT - 1)) for own in ids]
    results = results_of(out)
    given = Records(str(out)).answers(results["lines"][0]["key"])
    assert [row.nll for row in given] == pytest.approx(expected, abs=1e-3)
    assert [row.num_tokens for row in given] == list(map(len, ids))
    assert [row.num_bytes for row in given] == [len(text.encode()) for text in texts]
    value = results["lines"][0]["measured"]["perplexity"]["interval"]["value"]
    assert value == pytest.approx(math.exp(sum(expected) / sum(map(len, ids))), rel=1e-4)
    assert results["about"]["left_out"] == {"this row is no document": 1}


def test_the_test_rows_of_a_recipe_that_learns_from_texts_are_documents(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"Report {n} went to archive {n * n}."}) + "\n" for n in range(60)))
    data = {"sources": str(tmp_path / "rows.jsonl"), "cache": str(tmp_path / "cache"), "max_length": 64, "validation": 0, "test": 0.3,
            "engine": "process", "near_duplicates": "keep"}  # fmt: skip
    recipe = {"name": "texts", "model": {"path": str(tiny_model_dir), "dtype": "fp32"}, "method": "full", "stage": "pretrain", "data": data}
    (tmp_path / "texts.yaml").write_text(json.dumps(recipe))
    command = [str(tmp_path / "texts.yaml"), "--systems", "base", "--here", "--out", str(tmp_path / "out")]
    assert evaluate.main(command) == 0
    about = results_of(tmp_path / "out")["about"]
    assert about["task"] == "documents" and 10 <= about["num_rows"] < 30 and about["metrics"] == ["perplexity", "perplexity_byte"]
    assert evaluate.main([*command, "--task", "documents"]) == 0
    for task in ("answers", "likelihood"):
        with pytest.raises(ConfigError, match="documents ask nothing"):
            evaluate.main([*command, "--task", task])
    with pytest.raises(ConfigError, match="has rows of its own"):
        evaluate.main([*command, "--task", "stereotypes"])
