"""QLoRA: the quantised base stays what it is, the losses do not depend on how the work is cut, and what comes out is proven twice."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ftcore.adapter_commands import main as adapters_main
from ftcore.adapters import AdapterStore
from ftcore.backends.base import World
from ftcore.data_parallel import OPTIMIZER_WEIGHTS, WEIGHTS
from ftcore.errors import IntegrityError, ModelError
from ftcore.export.merge import merge_adapter
from ftcore.journal import read_lines
from ftcore.layers.quantised import dequantised, held_bytes, quantised_in_fp32, quantised_layers, quantised_tensors
from ftcore.loop import Training, train
from ftcore.models import load_base
from ftcore.probes import Probes, last_logits
from ftcore.publish import publish_final
from ftcore.recipe import Recipe
from ftcore.rundir import RunDir
from tests.conftest import make_tiny_model
from tests.memory_blocks import MemoryBlocks, packed_blocks
from tests.worlds import in_world

BLOCKS = packed_blocks(40, per_block=2, seed=3)
MANIFEST = {"digest": "1" * 64, "counts": {}, "digests": {"template": "2" * 64}}
BITS = pytest.mark.parametrize("bits", [4, 8])
SLOW_IN_4 = pytest.mark.parametrize("bits", [pytest.param(4, marks=pytest.mark.proof), 8])
SLOW_IN_8 = pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.proof)])
STEPS = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base"), hidden=64)


def recipe_for(base: Path, runs: Path, name: str, *, bits: int = 4, dtype: str = "fp32", **changes: Any) -> Recipe:
    tree: dict[str, Any] = {
        "name": name,
        "model": {"path": str(base), "dtype": dtype},
        "data": {"sources": "unused.jsonl"},
        "method": {"kind": "qlora", "bits": bits, "rank": 64, "targets": "all-linear"},
        "stage": "sft",
        "backend": {"kind": "plain", "micro_batch": 4},
        "optim": {"lr": 2e-3, "batch_size": 8, "epochs": 10, "max_steps": STEPS, "seed": 1},
        "eval": {"every_steps": 3},
        "output": {"runs": str(runs), "store": str(runs / "store"), "adapter": "acme/support", "checkpoint_every": 4},
    }
    for key, value in changes.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) else value
    return Recipe.model_validate(tree)


def losses_of(recipe: Recipe, world: World | None = None) -> list[float]:
    run = RunDir(recipe.output.runs, recipe.name)
    train(recipe, world or World(), MemoryBlocks(BLOCKS, packed_blocks(4, seed=4)), run)
    return [line["loss"] for line in read_lines(run) if "loss" in line]


def spread(one: list[float], other: list[float]) -> float:
    assert len(one) == len(other) == STEPS
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def frozen_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every number of the base: codes, scales, and what is not quantised."""
    found = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    for name, layer in quantised_layers(model):
        found |= {f"{name}.{key}": tensor.detach().clone() for key, tensor in quantised_tensors(layer).items()}
    return found


@BITS
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_quantised_base_is_bit_identical_after_training_and_evaluating(base: Path, tmp_path: Path, bits: int, dtype: str) -> None:
    recipe = recipe_for(base, tmp_path, "run", bits=bits, dtype=dtype, method={"compute_dtype": "bf16" if bits == 4 else "auto"})
    blocks = MemoryBlocks(BLOCKS, packed_blocks(4, seed=4))
    training = Training(recipe, World(), blocks, RunDir(tmp_path, "run"), None, None)
    before, codes = frozen_tensors(training.model), {layer.weight.dtype for _, layer in quantised_layers(training.model)}
    training.restore()
    training.run_steps()
    training.finish()
    after = frozen_tensors(training.model)
    assert codes == {torch.uint8 if bits == 4 else torch.int8} and len(quantised_layers(training.model)) == 14
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert {p.dtype for p in training.model.parameters() if p.requires_grad} == {torch.float32}
    training.close()


@SLOW_IN_4
def test_accumulation_and_checkpointing_do_not_change_the_losses(base: Path, tmp_path: Path, bits: int) -> None:
    whole = losses_of(recipe_for(base, tmp_path, "whole", bits=bits, backend={"micro_batch": 8}))
    parts = losses_of(recipe_for(base, tmp_path, "parts", bits=bits, backend={"micro_batch": 2, "gradient_checkpointing": True}))
    assert abs(whole[-1] - whole[0]) > 0.01
    assert spread(whole, parts) <= 1e-5


@SLOW_IN_8
def test_packed_and_padded_rows_give_the_same_losses(base: Path, tmp_path: Path, bits: int) -> None:
    packed = losses_of(recipe_for(base, tmp_path, "packed", bits=bits))
    padded = losses_of(recipe_for(base, tmp_path, "padded", bits=bits, model={"attention": "sdpa"}, data={"pack": False}))
    assert spread(packed, padded) <= 1e-5


def digest_on_rank(rank: int, size: int, tree: dict[str, Any]) -> float:
    recipe = Recipe.model_validate(tree)
    run = RunDir(recipe.output.runs, recipe.name)
    training = Training(recipe, World(rank=rank, size=size), MemoryBlocks(BLOCKS), run, None, None)
    training.restore()
    training.run_steps()
    total = sum(float(p.detach().double().abs().sum()) for p in training.model.parameters() if p.requires_grad)
    training.finish()
    training.close()
    return total


@pytest.mark.parametrize(("bits", "kind"), [pytest.param(4, "adamw", marks=pytest.mark.proof), (8, "adamw_8bit")])
def test_two_workers_stay_in_step_and_give_one_worker_s_losses(base: Path, tmp_path: Path, bits: int, kind: str) -> None:
    alone = losses_of(recipe_for(base, tmp_path, "alone", bits=bits, optim={"kind": kind}))
    together = recipe_for(base, tmp_path, "together", bits=bits, optim={"kind": kind})
    one, other = in_world(2, digest_on_rank, together.model_dump(mode="json"))
    assert one == other
    lines = [line["loss"] for line in read_lines(RunDir(tmp_path, "together")) if "loss" in line]
    assert spread(alone, lines) <= (1e-5 if kind == "adamw" else 1e-3)  # 8-bit moments round a last digit up to a code


@pytest.mark.parametrize(("bits", "kind"), [(4, "adamw_8bit"), pytest.param(8, "adamw", marks=pytest.mark.proof)])
def test_a_resumed_run_is_bit_identical_and_its_checkpoint_holds_adapter_and_optimizer_only(
    base: Path, tmp_path: Path, bits: int, kind: str
) -> None:
    changes: dict[str, Any] = {"bits": bits, "dtype": "bf16", "method": {"dropout": 0.1}, "optim": {"kind": kind}}
    whole = losses_of(recipe_for(base, tmp_path, "whole", **changes))
    recipe = recipe_for(base, tmp_path, "stopped", **changes)
    training = Training(recipe, World(), MemoryBlocks(BLOCKS, packed_blocks(4, seed=4)), RunDir(tmp_path, "stopped"), None, None)
    training.restore()
    for _ in range(3):
        training._step()
    training.writer.save(training.at, recipe.method, training.stepper, is_main=True)
    training.writer.wait()
    training._step()  # lost with the kill
    training.close()
    [folder] = (tmp_path / "stopped" / "checkpoints").iterdir()
    assert all("lora_" in name for name in load_file(folder / WEIGHTS / "adapter_model.safetensors"))
    assert all("lora_" in name or name in ("qmap1", "qmap2") for name in load_file(folder / OPTIMIZER_WEIGHTS))
    assert losses_of(recipe) == whole


@BITS
def test_training_and_evaluation_compute_the_same_without_a_word_from_bitsandbytes(
    base: Path, bits: int, caplog: pytest.LogCaptureFixture
) -> None:
    """On a CPU bitsandbytes quantises an 8-bit layer's input in evaluation only, and says so at every call."""
    recipe = recipe_for(base, Path("unused"), "x", bits=bits, dtype="bf16")
    model = load_base(recipe.model, recipe.method)
    ids = torch.arange(3, 20)[None]
    with caplog.at_level(logging.DEBUG, logger="bitsandbytes"), torch.no_grad():
        trained, evaluated = (model.train(mode)(input_ids=ids).logits for mode in (True, False))
    assert torch.equal(trained, evaluated)
    assert not [line for line in caplog.records if line.name.startswith("bitsandbytes")]


@BITS
def test_in_fp32_a_quantised_model_is_the_model_of_its_dequantised_weights(base: Path, bits: int) -> None:
    recipe = recipe_for(base, Path("unused"), "x", bits=bits)
    quantised, plain = load_base(recipe.model, recipe.method), load_base(recipe.model)
    for name, layer in quantised_layers(quantised):
        plain.get_submodule(name).weight.data = dequantised(layer)
    prompts = [[1, 5, 9, 30, 200]]
    with quantised_in_fp32(quantised):
        exact = last_logits(quantised, prompts)
    torch.testing.assert_close(exact, last_logits(plain, prompts), rtol=0, atol=1e-5)


def test_double_quantising_takes_the_bytes_it_should(tmp_path: Path) -> None:
    """4 bits, and a scale for each 64 weights: 8 bits with an fp32 scale and offset for each 256, or 32 bits."""
    large = make_tiny_model(tmp_path / "large", hidden=256)
    bits = {}
    for double in (True, False):
        recipe = recipe_for(large, tmp_path, "x", method={"double_quant": double})
        model = load_base(recipe.model, recipe.method)
        layers = quantised_layers(model)
        num_weights = sum(layer.in_features * layer.out_features for _, layer in layers)
        biases = sum(layer.bias.nbytes for _, layer in layers if layer.bias is not None)
        tables = sum(16 * 4 + (256 * 4 + 4) * double for _ in layers)
        bits[double] = 8 * (held_bytes(model)[0] - biases - tables) / num_weights
    assert bits[False] == pytest.approx(4.5, abs=0.01) and bits[True] == pytest.approx(4.127, abs=0.03)


@pytest.mark.parametrize(
    ("method", "model", "sentence"),
    [
        ({"bits": 8, "double_quant": True}, {}, "double_quant quantises the scales of 4-bit blocks"),
        ({"bits": 8, "quant_type": "nf4"}, {}, "8 bits cannot be held as nf4"),
        ({"quant_type": "int8"}, {}, "4 bits cannot be held as int8"),
        ({"bits": 8, "compute_dtype": "bf16"}, {}, "8-bit layers compute in model.dtype"),
        ({"bits": 3}, {}, "bits"),
    ],
)
def test_a_form_that_does_not_exist_is_refused(base: Path, method: dict[str, Any], model: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        recipe_for(base, Path("x"), "x", method=method, model=model)


def test_eight_bits_need_no_other_key(base: Path) -> None:
    method = recipe_for(base, Path("x"), "x", bits=8).method
    assert method.quantisation("bf16") == "int8, computed in bf16" and method.held("bf16") == "int8"


@pytest.mark.parametrize("name", ["down_proj", "mlp", "layers"])
def test_a_quantised_layer_cannot_be_trained_whole(base: Path, name: str) -> None:
    recipe = recipe_for(base, Path("x"), "x", method={"modules_to_save": [name]})
    with pytest.raises(ModelError, match="a quantised layer cannot be trained whole"):
        recipe.method.apply(load_base(recipe.model, recipe.method))


@BITS
def test_the_adapter_is_not_merged_into_the_quantised_base(base: Path, bits: int) -> None:
    recipe = recipe_for(base, Path("x"), "x", bits=bits)
    model = recipe.method.apply(load_base(recipe.model, recipe.method))
    with pytest.raises(ModelError, match="would be quantised with it"):
        recipe.method.merge(model)


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    recipe = recipe_for(base, tmp_path_factory.mktemp("finished"), "run", dtype="bf16", optim={"lr": 1e-2})
    losses_of(recipe)
    return recipe


def publish(recipe: Recipe, final: Path) -> tuple[Any, list[str]]:
    lines: list[str] = []
    store = AdapterStore(recipe.output.store)
    return publish_final(recipe, final, MANIFEST, metrics={}, world_size=1, store=store, log=lines.append), lines


def final_of(recipe: Recipe) -> Path:
    return Path(recipe.output.runs) / recipe.name / "final"


def test_the_card_says_how_the_base_was_quantised_and_what_that_did(
    finished: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ref, lines = publish(finished, final_of(finished))
    card = AdapterStore(finished.output.store).card(ref)
    assert card.base.quantisation == "nf4, double quantised, computed in bf16" and card.quantisation is not None
    assert set(card.probes) == {"nf4", "nf4 in fp32", "fp32"}
    assert card.quantisation.share == pytest.approx(card.quantisation.difference_tuned / card.quantisation.effect)
    assert 0 < card.quantisation.difference_bare < 20 and any(line.startswith("quantised base against full precision") for line in lines)
    assert adapters_main(["show", str(ref), "--store", finished.output.store]) == 0
    assert "quantisation.difference_tuned" in capsys.readouterr().out
    merged = merge_adapter(ref, AdapterStore(finished.output.store).fetch(ref, tmp_path / "cache"), tmp_path / "merged", dtype="fp32")
    assert merged.difference <= merged.limit


def copied(final: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in final.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_an_adapter_altered_by_a_hundredth_is_not_published(finished: Recipe, tmp_path: Path) -> None:
    """Quantisation's own difference is far larger: the proof must be on a base held as the trained one was."""
    final = copied(final_of(finished), tmp_path / "final")
    tensors = {name: tensor * 1.01 for name, tensor in load_file(final / "adapter_model.safetensors").items()}
    save_file(tensors, final / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match="recorded logits"):
        publish(finished, final)


@pytest.mark.parametrize("altered", [False, True])
def test_a_faint_adapter_trained_on_another_device_is_told_from_a_wrong_one(
    base: Path, tmp_path: Path, altered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's bf16 differs from a CPU's by more than a faint adapter's effect; computed in fp32 they agree."""
    recipe = recipe_for(base, tmp_path, "faint", dtype="bf16", method="lora", optim={"lr": 2e-4, "max_steps": 2, "warmup": 0})
    losses_of(recipe)
    final = final_of(recipe)
    probes = Probes.load(final)
    there = probes.by_precision["bf16"]
    noise = 0.05 * torch.randn(there.tuned.shape, generator=torch.Generator().manual_seed(0))
    for record, error in ((there, noise), (probes.by_precision["bf16 in fp32"], 1e-6)):
        object.__setattr__(record, "device", "cuda")
        object.__setattr__(record, "tuned", record.tuned + error)
        object.__setattr__(record, "base", record.base + error)
    probes.save(final)
    if altered:
        tensors = {name: tensor * 1.5 for name, tensor in load_file(final / "adapter_model.safetensors").items()}
        save_file(tensors, final / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(IntegrityError, match="recorded logits"):
            publish(recipe, final)
    else:
        _, lines = publish(recipe, final)
        assert "exceeds the budget: verify in fp32" in lines[0] and lines[1].startswith("proof in bf16 in fp32: error")


def test_a_run_continues_from_a_published_adapter(finished: Recipe, base: Path, tmp_path: Path) -> None:
    recipe = recipe_for(base, tmp_path, "next", dtype="bf16", model={"adapter": str(final_of(finished))}, optim={"lr": 1e-2})
    run = RunDir(tmp_path, "next")
    with run.sealing("parent", {"ref": None}) as folder:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / name).write_bytes((final_of(finished) / name).read_bytes())
    training = Training(recipe, World(), MemoryBlocks(BLOCKS), run, None, None)
    training.restore()
    first = training.stepper.whole()
    saved = load_file(final_of(finished) / "adapter_model.safetensors")
    assert all(torch.equal(first[name.replace(".weight", ".default.weight")], tensor) for name, tensor in saved.items())
    training.close()
