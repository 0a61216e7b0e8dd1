"""Publishing: what was written is proven on a fresh base before it counts; what is not what was trained never reaches the store."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ftcore.adapters import AdapterStore
from ftcore.backends.base import World
from ftcore.bind import bind_adapter
from ftcore.card import Card
from ftcore.data.tokenizer import load_tokenizer
from ftcore.errors import ConfigError, IntegrityError, ModelError
from ftcore.loop import train
from ftcore.models import load_base
from ftcore.probes import EXACT, IN_FP32, Probes, check, last_logits, record
from ftcore.publish import import_adapter, publish_final, publish_run
from ftcore.recipe import Model, Recipe
from ftcore.rundir import RunDir
from ftcore.signing import keygen, verify_card
from tests.memory_blocks import MemoryBlocks, packed_blocks

MANIFEST = {"digest": "1" * 64, "counts": {"rows": {"train": 7}, "tokens": 90}, "digests": {"template": "2" * 64}}


def make_recipe(base: Path, home: Path, *, dtype: str = "fp32", **changes: Any) -> Recipe:
    tree: dict[str, Any] = {
        "name": "run", "model": {"path": str(base), "dtype": dtype}, "data": {"sources": ["rows.jsonl"]}, "stage": "sft",
        "method": {"kind": "lora", "rank": 4, "targets": ["q_proj", "v_proj", "down_proj"]},
        "output": {"runs": str(home / "runs"), "store": str(home / "store"), "adapter": "acme/support"},
    }  # fmt: skip
    for key, value in changes.items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    return Recipe.model_validate(tree)


def train_something(recipe: Recipe, folder: Path, *, scale: float = 0.3, seed: int = 0) -> torch.nn.Module:
    """An applied model whose trained values are made up, saved with its probes as the loop saves `final/`."""
    model = recipe.method.apply(load_base(recipe.model, recipe.method))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("lora_B" in name or "lora_" not in name):
                kept_in = torch.promote_types(parameter.dtype, torch.float32)
                parameter.data = parameter.data.to(kept_in) + torch.randn(parameter.shape, dtype=kept_in) * scale
    weights = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    recipe.method.save(model, weights, folder)
    tokenizer = load_tokenizer(recipe.model)
    probes = record(model, tokenizer, lambda: recipe.method.without(model), recipe.method.held(recipe.model.dtype))
    if recipe.model.dtype not in EXACT:
        with recipe.method.in_fp32(model):
            probes = probes.merged(record(model, tokenizer, lambda: recipe.method.without(model), recipe.model.dtype + IN_FP32))
    probes.save(folder)
    return model


def publish(recipe: Recipe, final: Path, **facts: Any) -> Any:
    lines: list[str] = []
    store = AdapterStore(recipe.output.store)
    ref = publish_final(
        recipe, final, MANIFEST, metrics={"steps": 3, "bad": float("nan")}, world_size=2, store=store, log=lines.append, **facts
    )
    return ref, store, lines


def spoil(final: Path, change: Any) -> None:
    tensors = load_file(final / "adapter_model.safetensors")
    save_file(change(tensors), final / "adapter_model.safetensors", metadata={"format": "pt"})


def assert_nothing_published(recipe: Recipe) -> None:
    assert AdapterStore(recipe.output.store).list() == []


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_what_was_trained_is_published_with_its_facts(tiny_model_dir: Path, tmp_path: Path, dtype: str) -> None:
    recipe = make_recipe(tiny_model_dir, tmp_path, dtype=dtype)
    train_something(recipe, tmp_path / "final")
    ref, store, lines = publish(recipe, tmp_path / "final", parent="acme/support@" + "0" * 64)
    card = store.verify(ref)
    assert (card.method.kind, card.method.rank, card.world_size, card.stage) == ("lora", 4, 2, "sft")
    assert card.metrics == {"steps": 3, "bad": None} and card.data is not None and card.data.counts == {"rows.train": 7, "tokens": 90}
    assert card.recipe is not None and card.recipe.resolved["name"] == "run"
    assert {"fp64" if dtype == "fp64" else "fp32", dtype, *(["bf16 in fp32"] if dtype == "bf16" else [])} == set(card.probes)
    assert any("proof in" in line for line in lines)


def test_plain_peft_gives_the_trained_logits(tiny_model_dir: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tiny_model_dir, tmp_path)
    trained = train_something(recipe, tmp_path / "final")
    ref, store, _ = publish(recipe, tmp_path / "final")
    folder = store.fetch(ref, tmp_path / "cache")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32), folder).eval()
    prompt = [[1, 5, 9, 30, 200]]
    assert torch.allclose(last_logits(plain, prompt), last_logits(trained, prompt), atol=1e-5)


@pytest.mark.parametrize(("dtype", "modules"), [("fp32", []), ("bf16", []), ("bf16", ["norm"])])
def test_what_the_loop_leaves_is_published(tiny_model_dir: Path, tmp_path: Path, dtype: str, modules: list[str]) -> None:
    method = {"kind": "lora", "rank": 4, "modules_to_save": modules}
    optim = {"lr": 1e-2, "batch_size": 8, "max_steps": 4, "epochs": 10}
    recipe = make_recipe(tiny_model_dir, tmp_path, dtype=dtype, method=method, optim=optim, backend={"kind": "plain", "micro_batch": 4})
    train(recipe, World(), MemoryBlocks(packed_blocks(12, seed=3), packed_blocks(2, seed=4)), RunDir(tmp_path / "runs", "run"))
    ref, store, lines = publish(recipe, tmp_path / "runs" / "run" / "final")
    probes = store.card(ref).probes
    assert (
        set(probes) == {"fp32", dtype, *(["bf16 in fp32"] if dtype == "bf16" else [])}
        and min(fact.effect or 0 for fact in probes.values()) > 0.01
    ), lines


def test_modules_to_save_and_dora_survive_publishing(tiny_model_dir: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tiny_model_dir, tmp_path, method={"kind": "lora", "dora": True, "rslora": True, "modules_to_save": ["norm"]})
    train_something(recipe, tmp_path / "final")
    ref, store, _ = publish(recipe, tmp_path / "final")
    assert store.verify(ref).method.num_trainable > 0


def test_an_adapter_altered_after_training_is_not_published(tiny_model_dir: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tiny_model_dir, tmp_path)
    train_something(recipe, tmp_path / "final")
    spoil(tmp_path / "final", lambda tensors: {name: tensor * 1.1 for name, tensor in tensors.items()})
    with pytest.raises(IntegrityError, match="recorded logits"):
        publish(recipe, tmp_path / "final")
    assert_nothing_published(recipe)


def test_an_adapter_that_lacks_a_layer_is_not_published(tiny_model_dir: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tiny_model_dir, tmp_path)
    train_something(recipe, tmp_path / "final")
    spoil(tmp_path / "final", lambda tensors: {name: tensor for name, tensor in tensors.items() if "layers.1." not in name})
    with pytest.raises(IntegrityError, match="lacks tensors"):
        publish(recipe, tmp_path / "final")
    assert_nothing_published(recipe)


def test_a_tensor_that_binds_to_nothing_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tiny_model_dir, tmp_path)
    train_something(recipe, tmp_path / "final")
    spoil(tmp_path / "final", lambda t: {**t, "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(4, 32)})
    with pytest.raises(IntegrityError, match="bind to nothing"):
        publish(recipe, tmp_path / "final")
    assert_nothing_published(recipe)


def test_a_layer_left_at_zero_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tiny_model_dir, tmp_path)
    train_something(recipe, tmp_path / "final")
    zero = "layers.0.self_attn.q_proj.lora_B"
    spoil(tmp_path / "final", lambda t: {name: torch.zeros_like(tensor) if zero in name else tensor for name, tensor in t.items()})
    with pytest.raises(IntegrityError, match="still zero"):
        publish(recipe, tmp_path / "final")
    assert_nothing_published(recipe)


def test_a_tensor_of_another_shape_does_not_fit(tiny_model_dir: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tiny_model_dir, tmp_path)
    train_something(recipe, tmp_path / "final")
    spoil(tmp_path / "final", lambda t: {name: tensor[..., :-1].contiguous() if "lora_A" in name else tensor for name, tensor in t.items()})
    with pytest.raises(ModelError, match="does not fit"):
        publish(recipe, tmp_path / "final")
    assert_nothing_published(recipe)


def test_the_empty_adapter_of_a_sharded_save_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tiny_model_dir, tmp_path)
    train_something(recipe, tmp_path / "final")
    spoil(tmp_path / "final", lambda t: {name: torch.zeros(0) for name in t})
    with pytest.raises(IntegrityError, match="is empty"):
        publish(recipe, tmp_path / "final")
    assert_nothing_published(recipe)


def test_a_whole_model_is_no_adapter_to_publish(tiny_model_dir: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tiny_model_dir, tmp_path)
    recipe = recipe.model_copy(update={"method": SimpleNamespace(kind="full", is_adapter=False)})
    with pytest.raises(ConfigError, match="no adapter to publish"):
        publish(recipe, tmp_path)


def test_a_run_is_published_promoted_and_signed(tiny_model_dir: Path, tmp_path: Path) -> None:
    keygen(tmp_path / "key.pem")
    recipe = make_recipe(tiny_model_dir, tmp_path, output={"sign_key": str(tmp_path / "key.pem")})
    run = RunDir(tmp_path / "runs", "run")
    with run.sealing("parent", {"ref": "acme/support@" + "0" * 64}) as folder:
        (folder / "x").write_text("x")
    with run.sealing("final", {"step": 3}) as folder:
        train_something(recipe, folder)
        (folder / "result.json").write_text(json.dumps({"metrics": {"validation_loss": 1.5}, "world_size": 3}))
    ref = publish_run(run, recipe, SimpleNamespace(manifest=MANIFEST), log=lambda line: None)
    store = AdapterStore(recipe.output.store)
    assert store.resolve("acme/support") == ref
    card = store.card(ref)
    assert card.parent == "acme/support@" + "0" * 64 and card.metrics["validation_loss"] == 1.5
    verify_card(card, [tmp_path / "key.pub.pem"])
    assert publish_run(run, recipe, SimpleNamespace(manifest=MANIFEST), log=lambda line: None) == ref


def test_a_plain_peft_adapter_is_imported_with_probes_recorded_now(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model_dir), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "foreign")
    store = AdapterStore(tmp_path / "store")
    ref = import_adapter(tmp_path / "foreign", "acme/foreign", Model(path=str(tiny_model_dir)), store, log=lambda line: None)
    folder = store.fetch(ref, tmp_path / "cache")
    tuned = bind_adapter(load_base(Model(path=str(tiny_model_dir)), dtype="fp32"), folder)
    assert check(tuned, None, Probes.load(folder), without=tuned.disable_adapter).passed
    assert Card.read(folder / "card.json").recipe is None


def test_a_pickled_adapter_is_not_imported(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(IntegrityError, match="pickle"):
        import_adapter(tmp_path, "acme/foreign", Model(path=str(tiny_model_dir)), AdapterStore(tmp_path / "store"))
