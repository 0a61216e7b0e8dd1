"""`ftcore chat` and `ftcore generate`: the engine without a server, over an adapter from the store."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ftcore import chat_command
from ftcore.adapters import AdapterRef, AdapterStore
from ftcore.errors import ConfigError
from ftcore.publish import import_adapter
from ftcore.recipe import Model
from pipelines import generate
from tests.oracles import Truth, make_adapter


@pytest.fixture(scope="module")
def spoken(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AdapterRef, Truth]:
    """(the store, an adapter in it, plain PEFT with it)."""
    root = tmp_path_factory.mktemp("spoken")
    folder = make_adapter(tiny_model_dir, root / "made", 1)
    store = AdapterStore(root / "store")
    ref = import_adapter(folder, "acme/support", model=Model(path=str(tiny_model_dir)), store=store, log=lambda _: None)
    store.promote(ref)
    return root / "store", ref, Truth(tiny_model_dir, {ref.digest: folder})


def greedy(truth: Truth, digest: str, base: Path, words: str, count: int) -> str:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    text = tokenizer.apply_chat_template([{"role": "user", "content": words}], tokenize=False, add_generation_prompt=True)
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    start = len(ids)
    while len(ids) < start + count:
        ids.append(int(truth.logps(digest, ids)[-1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            ids.pop()
            break
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True))


def test_a_conversation_is_the_adapters_own(
    spoken: tuple[Path, AdapterRef, Truth], tiny_model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, ref, truth = spoken
    monkeypatch.setattr("sys.stdin", io.StringIO("hello there\n/reset\n\nhello there\n/quit\nnever read\n"))
    options = ["--store", str(store), "--base", str(tiny_model_dir), "--temperature", "0", "--max-tokens", "12", "--context", "128"]
    assert chat_command.main(["acme/support", *options]) == 0
    told = capsys.readouterr()
    own = greedy(truth, ref.digest, tiny_model_dir, "hello there", 12)
    assert own != greedy(truth, "", tiny_model_dir, "hello there", 12)
    assert told.out == f"{own}\n{own}\n" and ref.full in told.err


def test_a_conversation_that_outgrows_the_context_says_so_and_goes_on(
    tiny_model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("many words " * 40 + "\nhello\n"))
    assert chat_command.main(["--base", str(tiny_model_dir), "--context", "64", "--max-tokens", "4", "--seed", "1"]) == 0
    told = capsys.readouterr()
    assert "does not fit the context" in told.err and "/reset" in told.err and len(told.out.splitlines()) >= 1


def test_nothing_to_talk_to(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to talk to"):
        chat_command.main(["--store", str(tmp_path)])


def test_rows_are_answered_and_a_stopped_job_goes_on(
    spoken: tuple[Path, AdapterRef, Truth], tiny_model_dir: Path, tmp_path: Path, local_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    store, ref, truth = spoken
    rows: list[Any] = [{"prompt": f"question {n}"} for n in range(300)]
    rows[7] = {"messages": [{"role": "user", "content": "question 7"}, {"role": "assistant", "content": "left out"}]}
    rows[9] = {"prompt": "far too long " * 500}
    rows[11] = ["no object"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    command = ["acme/support", str(tmp_path / "rows.jsonl"), "--out", str(out), "--store", str(store), "--base", str(tiny_model_dir)]
    command += ["--max-tokens", "3", "--context", "128"]
    assert generate.main(command) == 0
    told = pq.read_table(out / "rows").sort_by("row").to_pylist()
    answers = {record["row"].rpartition(" ")[2]: record for record in told}
    assert len(told) == 300 and {record["adapter"] for record in told} == {ref.full}
    assert [number for number, record in answers.items() if record["error"]] == sorted(["10", "12"], key=list(answers).index)
    for line in ("1", "8", "300"):
        assert answers[line]["answer"] == greedy(truth, ref.digest, tiny_model_dir, f"question {int(line) - 1}", 3)
    files = sorted((out / "rows").glob("*.parquet"))
    assert len(files) == 2
    before = files[0].stat().st_mtime_ns
    files[1].unlink()
    (out / "manifest.json").unlink()
    assert generate.main(command) == 0
    assert files[0].stat().st_mtime_ns == before and "256 were there" in capsys.readouterr().out
    assert pq.read_table(out / "rows").num_rows == 300
    assert generate.main(command) == 0 and "made before" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="another job"):
        generate.main([*command, "--temperature", "1"])
    with pytest.raises(ConfigError, match="other quantise"):
        generate.main([*command, "--quantise", "nf4"])
