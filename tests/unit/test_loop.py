"""How a run behaves: checkpoints, resume, best step, early stopping, and what it does when something goes wrong."""

from __future__ import annotations

import errno
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, GPTNeoXConfig, Qwen3MoeConfig

from ftcore.backends.base import World
from ftcore.data.collate import collate
from ftcore.errors import IntegrityError, Interrupted, ModelError, StorageError, TrainingError
from ftcore.journal import Journal, read_lines
from ftcore.loop import Trained, Training, train
from ftcore.models import CausalModel, load_base
from ftcore.recipe import Model, Recipe
from ftcore.rundir import RunDir, checkpoint_key
from tests.memory_blocks import MemoryBlocks, packed_blocks
from tests.worlds import in_world

BLOCKS = MemoryBlocks(packed_blocks(24, seed=3), packed_blocks(5, seed=4))


def recipe_for(base: Path, runs: Path, **changes: Any) -> Recipe:
    tree: dict[str, Any] = {
        "name": "run",
        "model": {"path": str(base), "dtype": "fp32"},
        "data": {"sources": "unused.jsonl"},
        "method": {"kind": "lora", "rank": 4},
        "stage": "sft",
        "backend": {"kind": "plain", "micro_batch": 4},
        "optim": {"lr": 5e-3, "batch_size": 8, "epochs": 10, "max_steps": 10},
        "output": {"runs": str(runs), "checkpoint_every": 4, "keep": 2},
        "eval": {"every_steps": 5},
    }
    for key, value in changes.items():
        tree[key] = tree[key] | value if isinstance(tree.get(key), dict) and isinstance(value, dict) and "kind" not in value else value
    return Recipe.model_validate(tree)


def run(recipe: Recipe, blocks: MemoryBlocks = BLOCKS, **options: Any) -> Trained:
    return train(recipe, World(), blocks, RunDir(recipe.output.runs, recipe.name), **options)


def test_a_run_leaves_a_sealed_result_that_plain_peft_reads(tiny_model_dir: Path, tmp_path: Path) -> None:
    trained = run(recipe_for(tiny_model_dir, tmp_path))
    assert trained.steps == 10 and trained.metrics["validation_loss"] < 7
    final = tmp_path / "run" / "final"
    assert {"adapter_model.safetensors", "adapter_config.json", "probes.safetensors", "manifest.json"} <= {p.name for p in final.iterdir()}
    assert any(bool(tensor.any()) for name, tensor in load_file(final / "adapter_model.safetensors").items() if "lora_B" in name)


def test_full_fine_tuning_leaves_a_plain_transformers_folder(tiny_model_dir: Path, tmp_path: Path) -> None:
    run(recipe_for(tiny_model_dir, tmp_path, method={"kind": "full"}, model={"path": str(tiny_model_dir), "dtype": "bf16"}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True))


def test_the_journal_has_every_step_once_and_the_validations(tiny_model_dir: Path, tmp_path: Path) -> None:
    run(recipe_for(tiny_model_dir, tmp_path))
    lines = read_lines(RunDir(tmp_path, "run"))
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 11))
    assert [line["step"] for line in lines if "validation_loss" in line] == [5, 10]


def test_old_checkpoints_go_but_the_newest_and_the_best_stay(tiny_model_dir: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tiny_model_dir, tmp_path, output={"runs": str(tmp_path), "checkpoint_every": 2, "keep": 2}, eval={"every_steps": 3})
    run(recipe)
    steps = RunDir(tmp_path, "run").checkpoint_steps()
    best = min(
        (line for line in read_lines(RunDir(tmp_path, "run")) if "validation_loss" in line), key=lambda line: line["validation_loss"]
    )["step"]
    assert best in steps and steps[-1] == 10 and len(steps) <= 3


def test_a_finished_run_is_not_trained_again(tiny_model_dir: Path, tmp_path: Path) -> None:
    first = run(recipe_for(tiny_model_dir, tmp_path))
    again = run(recipe_for(tiny_model_dir, tmp_path))
    assert again.already_finished and again.metrics == first.metrics


def test_training_stops_early_when_validation_gets_no_better_and_the_best_step_is_chosen(tiny_model_dir: Path, tmp_path: Path) -> None:
    optim = {"lr": 0.5, "batch_size": 8, "epochs": 10, "max_steps": 40, "warmup": 0}
    trained = run(recipe_for(tiny_model_dir, tmp_path, optim=optim, eval={"every_steps": 1, "patience": 2}))
    losses = [line["validation_loss"] for line in read_lines(RunDir(tmp_path, "run")) if "validation_loss" in line]
    assert trained.steps < 40
    assert trained.chosen_step == int(np.argmin(losses)) + 1 == trained.steps - 2


def test_a_run_asked_to_stop_makes_a_checkpoint_and_goes_on_from_it(tiny_model_dir: Path, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    with pytest.raises(Interrupted, match="stopped at step 3 of 10"):
        run(recipe_for(tiny_model_dir, tmp_path), on_progress=seen.append, should_stop=lambda: len(seen) >= 2)
    assert RunDir(tmp_path, "run").checkpoint_steps() == [3]
    assert run(recipe_for(tiny_model_dir, tmp_path)).steps == 10


def test_a_damaged_checkpoint_is_passed_over_for_an_older_sound_one(tiny_model_dir: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tiny_model_dir, tmp_path)
    run(recipe)
    folder = RunDir(tmp_path, "run")
    shutil.rmtree(tmp_path / "run" / "final")
    weights = tmp_path / "run" / checkpoint_key(10) / "weights" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    warnings: list[str] = []
    assert folder.newest_checkpoint(warnings.append) == 8
    assert len(warnings) == 1 and "adapter_model.safetensors" in warnings[0]


def test_an_unsealed_checkpoint_does_not_count(tiny_model_dir: Path, tmp_path: Path) -> None:
    run(recipe_for(tiny_model_dir, tmp_path))
    (tmp_path / "run" / checkpoint_key(10) / "manifest.json").unlink()
    assert RunDir(tmp_path, "run").newest_checkpoint() == 8


def test_data_that_changed_under_a_run_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tiny_model_dir, tmp_path)
    run(recipe)
    shutil.rmtree(tmp_path / "run" / "final")
    with pytest.raises(TrainingError, match="the data changed"):
        run(recipe, MemoryBlocks(BLOCKS.splits["train"], digest="1" * 64))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"the loss of step \d+ is not finite"):
        run(
            recipe_for(
                tiny_model_dir,
                tmp_path,
                method={"kind": "full"},
                optim={"lr": 1e30, "batch_size": 8, "max_steps": 10, "epochs": 10, "clip_norm": 0},
            )
        )


def test_a_full_disk_while_a_checkpoint_is_written_says_so_and_spoils_nothing(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(tiny_model_dir, tmp_path)
    original = Path.write_text

    def full(path: Path, *arguments: Any, **options: Any) -> int:
        if path.name == "state.json" and "step-000008" in str(path.parent):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(StorageError, match="No space left on device"):
        run(recipe)
    assert RunDir(tmp_path, "run").checkpoint_steps() == [4, 5]
    assert not [p for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.endswith(".tmp")]
    monkeypatch.undo()
    assert run(recipe).steps == 10


def test_the_journal_drops_what_a_killed_run_wrote_after_its_last_checkpoint(tmp_path: Path) -> None:
    folder = RunDir(tmp_path, "run")
    folder.folder.write("metrics.jsonl", b"".join(json.dumps({"step": s}).encode() + b"\n" for s in (1, 2, 3)) + b'{"step": 4, "lo')
    journal = Journal(folder, 2)
    journal.write({"step": 3, "again": True})
    journal.close()
    assert read_lines(folder) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_an_adapter_of_another_shape_does_not_bind(tiny_model_dir: Path, tmp_path: Path) -> None:
    run(recipe_for(tiny_model_dir, tmp_path))
    other = recipe_for(tiny_model_dir, tmp_path, method={"kind": "lora", "rank": 8})
    model = other.method.apply(load_base(other.model))
    with pytest.raises(IntegrityError, match="does not bind"):
        other.method.load(model, tmp_path / "run" / "final")


@pytest.mark.parametrize("targets", [["q_proj", "nothing_such"], "nothing.*"])
def test_targets_that_match_nothing_are_refused_with_the_names_there_are(tiny_model_dir: Path, targets: Any) -> None:
    recipe = recipe_for(tiny_model_dir, Path("unused"), method={"kind": "lora", "targets": targets})
    with pytest.raises(ModelError, match="nothing") as error:
        recipe.method.apply(load_base(recipe.model))
    assert "q_proj" in error.value.wanted and "down_proj" in error.value.wanted


def test_a_missing_base_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="no such model folder"):
        load_base(Model(path="./no/such/folder"))


def test_fp16_on_a_cpu_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fp16"):
        run(recipe_for(tiny_model_dir, tmp_path, model={"path": str(tiny_model_dir), "dtype": "fp16"}))


def test_early_stopping_is_remembered_by_a_run_killed_before_its_result(tiny_model_dir: Path, tmp_path: Path) -> None:
    optim = {"lr": 0.5, "batch_size": 8, "epochs": 10, "max_steps": 40, "warmup": 0}
    recipe = recipe_for(tiny_model_dir, tmp_path, optim=optim, eval={"every_steps": 1, "patience": 2})
    first = run(recipe)
    shutil.rmtree(tmp_path / "run" / "final")
    assert run(recipe) == first


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_touches_the_weights(tiny_model_dir: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tiny_model_dir, tmp_path, output={"runs": str(tmp_path), "checkpoint_every": 1})
    training = Training(recipe, World(), BLOCKS, RunDir(tmp_path, "run"), None, None)
    training.restore()
    training._step()
    before = training.stepper.whole()
    next(p for p in training.model.parameters() if p.requires_grad).register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingError, match="the gradient of step 2 is not finite"):
        training._step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in training.stepper.whole().items())
    training.close()


def test_a_base_that_lacks_a_tensor_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lack weights") as error:
        load_base(Model(path=str(tmp_path / "base"), dtype="fp32"))
    assert "q_proj" in error.value.got


def test_a_soft_capped_head_is_not_taken_for_a_plain_one(tmp_path: Path) -> None:
    config = Gemma2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=5.0,
        attn_logit_softcapping=None,
    )
    model = Gemma2ForCausalLM(config)
    model.get_output_embeddings().weight.data.mul_(50)
    causal, batch = CausalModel(model, "padded"), collate([BLOCKS.block("train", 0)], padded=True)
    plain = torch.nn.functional.cross_entropy(causal.logits(batch).flatten(0, 1), batch.targets.flatten(), reduction="sum")
    torch.testing.assert_close(causal.cross_entropy(batch), plain)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_neox"])
def test_full_fine_tuning_resumes_models_whose_files_name_their_tensors_otherwise(
    tiny_model_dir: Path, tmp_path: Path, architecture: str
) -> None:
    """transformers splits fused experts and renames layers when it saves; checkpoints must bind all the same, and the result must load."""
    shutil.copytree(tiny_model_dir, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    common = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    if architecture == "qwen3_moe":
        config: Any = Qwen3MoeConfig(
            **common, num_key_value_heads=2, head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2
        )
    else:
        config = GPTNeoXConfig(**common)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    recipe = recipe_for(tmp_path / "base", tmp_path, method={"kind": "full"}, model={"path": str(tmp_path / "base"), "dtype": "fp32"})
    whole = run(recipe)
    shutil.rmtree(tmp_path / "run" / "final")
    assert run(recipe) == whole
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final").config.model_type == config.model_type


def test_a_damaged_best_checkpoint_is_told_at_the_restore_and_has_a_remedy_at_the_end(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = recipe_for(tiny_model_dir, tmp_path, optim={"lr": 0.5, "batch_size": 8, "max_steps": 6, "warmup": 0}, eval={"every_steps": 1})
    best = run(recipe).chosen_step
    assert best < 6
    shutil.rmtree(tmp_path / "run" / "final")
    (tmp_path / "run" / checkpoint_key(best) / "state.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"eval\.choose=last"):
        run(recipe)
    assert f"the best step's checkpoint, {best}, is damaged" in caplog.text
    last = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"choose": "last"})})
    assert run(last).chosen_step == 6


def chooses_a_step_that_is_not_the_last(rank: int, size: int, recipe: Recipe) -> int:
    """Rank 0 seals slowly; every other rank still has to find the best step sealed."""
    run = RunDir(recipe.output.runs, recipe.name)
    put = run.put_in_place

    def slowly(*arguments: Any) -> None:
        time.sleep(1.0)
        put(*arguments)

    if rank == 0:
        run.put_in_place = slowly
    training = Training(recipe, World(rank=rank, size=size, local_rank=rank), BLOCKS, run, None, None)
    training.restore()
    training._step()
    training.at = replace(training.at, best_step=1, best_loss=1.0)
    training.writer.save(training.at, recipe.method, training.stepper, is_main=rank == 0)
    training.at = replace(training.at, step=recipe.optim.max_steps or 0)
    training.run_steps()  # nothing is left to do
    chosen = training.finish().chosen_step
    training.close()
    return chosen


def test_no_rank_opens_the_best_checkpoint_before_it_is_sealed(tiny_model_dir: Path, tmp_path: Path) -> None:
    assert in_world(2, chooses_a_step_that_is_not_the_last, recipe_for(tiny_model_dir, tmp_path)) == [1, 1]
