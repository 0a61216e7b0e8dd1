"""`ftcore adapters ...` and `ftcore merge`, through the functions behind them, on a real store with real adapters."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from ftcore.adapter_commands import main, merge_main
from ftcore.adapters import AdapterRef, AdapterStore
from ftcore.errors import ConfigError, IntegrityError, ModelError


def made_by_peft(base: Path, folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def filled(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[AdapterRef]]:
    """A store with two imported, signed versions of acme/support."""
    home = tmp_path_factory.mktemp("commands")
    assert main(["keygen", str(home / "key.pem")]) == 0
    for seed in (1, 2):
        folder = made_by_peft(tiny_model_dir, home / f"peft-{seed}", seed)
        words = [
            "import",
            str(folder),
            "acme/support",
            "--base",
            str(tiny_model_dir),
            "--store",
            str(home / "store"),
            "--sign-key",
            str(home / "key.pem"),
        ]
        assert main(words) == 0
    return home, AdapterStore(home / "store").list()


@pytest.fixture
def store(filled: tuple[Path, list[AdapterRef]], tmp_path: Path) -> Iterator[str]:
    """A copy that a test may change."""
    import shutil

    yield str(shutil.copytree(filled[0] / "store", tmp_path / "store"))


def test_list_says_which_version_is_current_and_which_revoked(
    store: str, filled: tuple[Path, list[AdapterRef]], capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = filled[1]
    AdapterStore(store).promote(one)
    AdapterStore(store).revoke(two, "why")
    assert main(["list", "--store", store]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert str(one) in lines[0] and "current" in lines[0]
    assert str(two) in lines[1] and "revoked" in lines[1]
    assert lines[2].startswith("2 sealed versions")


def test_show_prints_the_card_and_obeys_no_escape_in_it(
    store: str, filled: tuple[Path, list[AdapterRef]], capsys: pytest.CaptureFixture[str]
) -> None:
    ref = filled[1][0]
    key = f"{ref.key}/card.json"
    tree = json.loads(AdapterStore(store).folder.read(key))
    tree["created"] = "\x1b[2Jnow"
    AdapterStore(store).folder.write(key, json.dumps(tree).encode())
    assert main(["show", f"acme/support@{ref.digest[:8]}", "--store", store]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\\x1b[2Jnow" in shown and ref.full in shown
    assert main(["show", ref.full, "--store", store, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["digest"] == ref.digest


def test_verify_checks_hashes_signature_and_probes(
    store: str, filled: tuple[Path, list[AdapterRef]], capsys: pytest.CaptureFixture[str]
) -> None:
    home, refs = filled
    assert main(["verify", refs[0].full, "--store", store, "--key", str(home / "key.pub.pem"), "--probes"]) == 0
    out = capsys.readouterr().out
    assert "are the ones that were published" in out and "signed by" in out and "every tensor binds" in out


def test_verify_on_another_base_is_refused(store: str, filled: tuple[Path, list[AdapterRef]], tiny_model_dir: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="not the base"):
        main(["verify", filled[1][0].full, "--store", store, "--base", str(tmp_path / "other")])


def test_promote_rollback_and_tag_move_the_name(
    store: str, filled: tuple[Path, list[AdapterRef]], capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = filled[1]
    for ref in (one, two):
        assert main(["promote", f"acme/support@{ref.digest[:10]}", "--store", store]) == 0
    assert main(["tag", "acme/support", "stable", "--store", store]) == 0
    assert main(["rollback", "acme/support", "--store", store]) == 0
    assert AdapterStore(store).resolve("acme/support") == one
    assert AdapterStore(store).resolve("acme/support@stable") == two
    assert f"acme/support now means {one}" in capsys.readouterr().out


def test_revoke_says_that_the_name_still_points_there(
    store: str, filled: tuple[Path, list[AdapterRef]], capsys: pytest.CaptureFixture[str]
) -> None:
    ref = filled[1][0]
    AdapterStore(store).promote(ref)
    assert main(["revoke", "acme/support", "--reason", "leaks", "--store", store]) == 0
    assert "still points at it" in capsys.readouterr().out
    with pytest.raises(IntegrityError, match="leaks"):
        AdapterStore(store).fetch(ref, Path(store).parent / "cache")


def test_gc_removes_only_with_yes(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gc", "--keep-last", "1", "--store", store]) == 0
    assert "would remove" in capsys.readouterr().out and len(AdapterStore(store).list()) == 2
    assert main(["gc", "--keep-last", "1", "--yes", "--store", store]) == 0
    assert len(AdapterStore(store).list()) == 1


def test_merge_prints_the_difference(
    store: str, filled: tuple[Path, list[AdapterRef]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge_main([filled[1][0].full, "--out", str(tmp_path / "merged"), "--store", store]) == 0
    assert "logits differ by" in capsys.readouterr().out
    assert (tmp_path / "merged" / "config.json").is_file()


@pytest.mark.parametrize("text", ["acme/absent", "../../etc", "acme/support@ffffffffffff", "acme"])
def test_a_name_that_is_not_there_is_refused(store: str, text: str) -> None:
    for words in (["show", text], ["verify", text], ["promote", text], ["revoke", text, "--reason", "x"]):
        with pytest.raises(ConfigError):
            main([*words, "--store", store])


def test_listing_a_store_needs_no_torch(store: str) -> None:
    code = f"import sys; from ftcore.adapter_commands import main; main(['list', '--store', {store!r}]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=400)
