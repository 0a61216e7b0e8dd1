"""`ftcore evaluate` on Ray: the answers of one process, a failing worker's error as it was, and nothing asked twice after a stop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ftcore.adapters import AdapterStore
from ftcore.errors import ConfigError
from ftcore.evals.records import Records
from ftcore.publish import import_adapter
from ftcore.recipe import Model
from pipelines import evaluate
from tests.answering import answering
from tests.oracles import make_adapter

pytestmark = pytest.mark.ray


def test_workers_answer_as_one_process_does_and_go_on_where_they_were(tiny_model_dir: Path, tmp_path: Path, local_ray: None) -> None:
    store = AdapterStore(tmp_path / "store")
    folder = make_adapter(tiny_model_dir, tmp_path / "made", 1)
    store.promote(import_adapter(folder, "acme/support", model=Model(path=str(tiny_model_dir)), store=store, log=lambda _: None))
    rows = [{"instruction": f"What is {n} plus {n}?", "output": f"It is {2 * n}."} for n in range(130)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["--rows", str(tmp_path / "rows.jsonl"), "--base", str(tiny_model_dir), "--store", str(store), "--max-tokens", "3"]
    command += ["--context", "128", "--systems", "base", "acme/support", "--metrics", "exact_match"]
    far, near = Records(str(tmp_path / "far")), Records(str(tmp_path / "near"))
    assert evaluate.main([*command, "--out", str(tmp_path / "far")]) == 0
    assert evaluate.main([*command, "--out", str(tmp_path / "near"), "--here"]) == 0
    keys = [line["key"] for line in far.results()["lines"]]
    for key in keys:
        assert [row.text for row in far.answers(key)] == [row.text for row in near.answers(key)]
    kept, gone = (tmp_path / "far" / "answers" / keys[1] / f"part-0000{number}.parquet" for number in (0, 1))
    before = kept.stat().st_mtime_ns
    gone.unlink()
    assert evaluate.main([*command, "--out", str(tmp_path / "far")]) == 0
    assert gone.exists() and kept.stat().st_mtime_ns == before
    with answering() as server:
        server.stranger_after = 2
        with pytest.raises(ConfigError, match="no such model"):
            evaluate.main([*command, "--out", str(tmp_path / "far"), "--systems", f"{server.url}#good"])
