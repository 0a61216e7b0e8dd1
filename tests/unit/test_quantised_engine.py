"""The torch engine over bases in 4 and 8 bits, against plain PEFT over bitsandbytes' own; what it holds, and what it takes as proven.

In fp32 the engine multiplies by the very weights that bitsandbytes' codes and scales stand for, so the limit is that of a full-precision
base, 1e-4.
"""

from __future__ import annotations

import asyncio
import gc
import io
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ftcore import chat_command, lean_imports
from ftcore.adapter_commands import main as adapters_main
from ftcore.adapters import AdapterRef, AdapterStore
from ftcore.backends.base import World
from ftcore.engines.base import LiveEngine, Request, Token
from ftcore.engines.torch import Torch
from ftcore.errors import ConfigError, IntegrityError, ModelError
from ftcore.loop import train
from ftcore.probes import ProbeReport
from ftcore.publish import publish_final
from ftcore.recipe import Recipe
from ftcore.rundir import RunDir
from ftcore.served_base import ServedBase
from tests.conftest import make_tiny_model
from tests.live_engines import adapters as adapters
from tests.live_engines import mixed, opened, require_own, run, spoiled
from tests.memory_blocks import MemoryBlocks, packed_blocks
from tests.oracles import BITSANDBYTES, Truth, make_adapter
from tests.served import Store, served


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_every_row_of_a_mixed_batch_is_its_own_adapters(form: str, tiny_model_dir: Path, adapters: dict[str, Path]) -> None:
    """Eight adapters of six ranks and bare rows at once, their prompts in chunks."""

    async def go() -> list[tuple[Request, list[Token]]]:
        async with opened(tiny_model_dir, max_batch=36, quantise=form) as engine:
            assert engine.precision == f"{form} in fp32"
            await asyncio.gather(*(engine.load_adapter(digest, folder) for digest, folder in adapters.items()))
            done = await mixed(engine, random.Random(0))
            assert engine.stats().num_steps < 120  # 360 tokens, and as many chunks as prompts have: together
            return done

    truth = Truth(tiny_model_dir, adapters, form)
    for request, tokens in run(go()):
        require_own(truth, request, tokens)


def alive() -> int:
    """Bytes of all tensors in this process, each storage once."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # modules that warn when they are looked at
        storages = [each.untyped_storage() for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_what_the_engine_holds_shrinks_by_what_the_form_saves(tmp_path: Path) -> None:
    """4 bits and 0.127 of scales quantised twice, or 8 bits and one fp32 scale a row, for 32; nothing is held beside them."""
    base = make_tiny_model(tmp_path / "base", hidden=256)
    model = AutoModelForCausalLM.from_pretrained(base)
    linears = [each for each in model.modules() if isinstance(each, torch.nn.Linear) and each is not model.get_output_embeddings()]
    weights, rows = sum(each.weight.numel() for each in linears), sum(each.out_features for each in linears)

    async def held(**keys: Any) -> int:
        before = alive()
        async with opened(base, **keys):
            return alive() - before

    whole, nf4, int8 = (run(held(quantise=form)) for form in ("none", "nf4", "int8"))
    assert whole - nf4 == pytest.approx(weights * (4 - 4.127 / 8), rel=0.01)
    assert whole - int8 == pytest.approx(weights * (4 - 1) - rows * 4, rel=0.01)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"quantise": "int8", "double_quant": True}, "double_quant quantises the scales of 4-bit blocks"),
        ({"double_quant": True}, "double_quant quantises the scales of 4-bit blocks"),
        ({"quantise": "int4"}, "quantise"),
    ],
)
def test_a_form_that_does_not_exist_is_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Torch(**keys)


def test_settings_that_were_written_out_are_read_back() -> None:
    for keys in ({}, {"quantise": "nf4"}, {"quantise": "fp4", "double_quant": False}, {"quantise": "int8"}):
        section = Torch(**keys)
        assert Torch.model_validate(section.model_dump()) == section
        assert section.double_quant == (section.quantise in ("nf4", "fp4") and "double_quant" not in keys)


def test_without_bitsandbytes_the_engine_says_what_to_install(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean_imports, "bnb", None)
    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        run(opened(tiny_model_dir, quantise="nf4").__aenter__())


@pytest.mark.parametrize("form", ["none", "int8"])
def test_a_base_whose_files_are_quantised_already_is_refused(tiny_model_dir: Path, tmp_path: Path, form: str) -> None:
    """It would be held as they say, and no adapter's card names them."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=BITSANDBYTES["nf4"])
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match="files are quantised already"):
        run(opened(tmp_path / "base", quantise=form).__aenter__())


@pytest.fixture(scope="module")
def proven(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Adapters of one base: trained over it in nf4 (in fp32 and in bf16) and in nf4 with plain scales; imported, with probes over it in nf4
    and without."""
    home = tmp_path_factory.mktemp("proven")
    base = make_tiny_model(home / "base", hidden=64)
    store = AdapterStore(home / "adapters")
    refs = {
        name: trained(base, home, store, name, dtype, double)
        for name, dtype, double in (("tuned", "fp32", True), ("narrow", "bf16", True), ("single", "fp32", False))
    }
    folder = make_adapter(base, home / "made", 1)
    for name, options in (("foreign", []), ("foreign-nf4", ["--quantise", "nf4"])):
        command = ["import", str(folder), f"acme/{name}", "--base", str(base), "--store", str(home / "adapters"), *options]
        assert adapters_main(command) == 0
        refs[name] = next(ref for ref in store.list("acme") if ref.name == name)
    for ref in refs.values():
        store.promote(ref)
    return Store(home / "adapters", base, refs, {name: store.fetch(ref, home / "fetched") for name, ref in refs.items()})


def trained(base: Path, home: Path, store: AdapterStore, name: str, dtype: str, double: bool) -> AdapterRef:
    recipe = Recipe.model_validate(
        {
            "name": name, "model": {"path": str(base), "dtype": dtype}, "data": {"sources": "unused.jsonl"},
            "method": {"kind": "qlora", "rank": 16, "targets": "all-linear", "double_quant": double},
            "stage": "sft", "backend": {"kind": "plain", "micro_batch": 4},
            "optim": {"lr": 1e-2, "batch_size": 8, "epochs": 10, "max_steps": 6, "seed": 1},
            "output": {"runs": str(home / "runs"), "store": str(home / "adapters"), "adapter": f"acme/{name}"},
        }
    )  # fmt: skip
    run_dir = RunDir(recipe.output.runs, name)
    train(recipe, World(), MemoryBlocks(packed_blocks(40, per_block=2, seed=3), packed_blocks(4, seed=4)), run_dir)
    manifest = {"digest": "1" * 64, "counts": {}}
    final = Path(recipe.output.runs) / name / "final"
    return publish_final(recipe, final, manifest, metrics={}, world_size=1, store=store, log=lambda _: None)


TIGHT, WIDE, REFUSED = "to 1e-4", "to a tenth of its effect", "refused"


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({}, {"tuned": TIGHT, "narrow": TIGHT, "single": TIGHT, "foreign": TIGHT, "foreign-nf4": TIGHT}),
        ({"quantise": "nf4"}, {"tuned": TIGHT, "narrow": REFUSED, "single": WIDE, "foreign": REFUSED, "foreign-nf4": TIGHT}),
        ({"quantise": "nf4", "double_quant": False}, {"tuned": WIDE, "single": TIGHT, "foreign-nf4": WIDE}),
        ({"quantise": "nf4", "dtype": "bf16"}, {"tuned": REFUSED, "narrow": WIDE}),
        ({"quantise": "int8"}, {"tuned": REFUSED, "foreign": WIDE}),
    ],
)  # fmt: skip
def test_an_adapter_is_proven_on_a_base_held_as_its_own_was(proven: Store, keys: dict[str, Any], wanted: dict[str, str]) -> None:
    """The base lies in fp32 on disk, so that quantised from bf16 it has other codes; int8 is near enough to fp32 for a strong adapter."""

    async def judged(engine: LiveEngine, base: ServedBase, name: str) -> str:
        digest, folder = proven.refs[name].digest, proven.folders[name]
        base.require_card(AdapterStore(proven.path).card(proven.refs[name]))
        await engine.load_adapter(digest, folder)
        try:
            report: ProbeReport = await base.prove(engine, digest, folder, engine.precision)
        except IntegrityError as error:
            assert "own noise on the bare base" in error.got and "hold the base as the adapter was trained" in error.remedy
            return REFUSED
        return TIGHT if report.limit <= 1e-4 else WIDE

    async def go() -> dict[str, str]:
        async with opened(proven.base, **keys) as engine:
            base = ServedBase(str(proven.base))
            return {name: await judged(engine, base, name) for name in wanted}

    assert run(go()) == wanted


@pytest.mark.parametrize("double_quant", [True, False])
def test_other_weights_are_told_from_the_cards_over_a_quantised_base(proven: Store, tmp_path: Path, double_quant: bool) -> None:
    """Also where the base is held in another form than recorded, and the limit is a tenth of the effect."""

    def strengthened(_: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "lora_B" in name:
                tensor.mul_(1.3)

    async def go() -> None:
        async with opened(proven.base, quantise="nf4", double_quant=double_quant) as engine:
            digest, folder = proven.refs["tuned"].digest, proven.folders["tuned"]
            await engine.load_adapter(digest, spoiled(folder, tmp_path / "spoiled", strengthened))
            with pytest.raises(IntegrityError, match="another adapter, or one bound in part"):
                await ServedBase(str(proven.base)).prove(engine, digest, folder, engine.precision)

    run(go())


def test_a_replica_serves_what_was_trained_over_nf4_and_refuses_what_nothing_proves_there(proven: Store, tmp_path: Path) -> None:
    truth = Truth(proven.base, {proven.refs["tuned"].digest: proven.folders["tuned"]}, "nf4")
    prompt = [5, 9, 30, 200, 7]
    engine = {"max_batch": 4, "max_context": 128, "num_threads": 1, "quantise": "nf4"}

    async def go() -> None:
        async with served(proven, tmp_path, engine=engine) as server:
            for name, digest in (("tuned", proven.refs["tuned"].digest), ("base", "")):
                reply = await server.complete("acme", model=name, prompt=prompt, max_tokens=1, temperature=0, logprobs=0)
                assert reply.status_code == 200, reply.text
                assert reply.headers["x-ftcore-adapter"] == (proven.refs[name].full if digest else "")
                want = float(truth.logps(digest, prompt)[-1].max())
                assert reply.json()["choices"][0]["logprobs"]["token_logprobs"][0] == pytest.approx(want, abs=1e-4)
            reply = await server.complete("acme", model="foreign", prompt=prompt, max_tokens=1)
            assert (reply.status_code, reply.json()["error"]["code"]) == (409, "adapter_refused")
            assert "own noise on the bare base" in server.replica.state()["refused"][proven.refs["foreign"].full]

    run(go())


def test_a_conversation_over_a_quantised_base(proven: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In full precision it would be proven too; that `int8` is refused shows that the option reaches the engine."""
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    words = ["acme/tuned", "--store", str(proven.path), "--base", str(proven.base), "--context", "128", "--max-tokens", "4", "--seed", "1"]
    assert chat_command.main([*words, "--quantise", "nf4"]) == 0 and capsys.readouterr().out.strip()
    with pytest.raises(IntegrityError, match="int8 in fp32's own noise"):
        chat_command.main([*words, "--quantise", "int8"])
