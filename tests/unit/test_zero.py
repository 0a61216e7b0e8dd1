"""ZeRO trains what plain trains, in every stage, and its runs stop, resume and end as plain's do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ftcore.backends.base import World
from ftcore.recipe import Recipe
from ftcore.rundir import RunDir
from ftcore.zero_export import export_model
from tests.worlds import in_world
from tests.zero_runs import BLOCKS, STEPS, Job, apart, clipped, job, losses, train_all, validations

LORA: dict[str, Any] = {"kind": "lora", "rank": 4, "targets": ("q_proj", "v_proj", "down_proj")}
FULL: dict[str, Any] = {"kind": "full"}
PLAIN = {"kind": "plain"}
STAGES = [(3, 3), (2, 2), (3, 1)]


def zero(stage: int, **keys: Any) -> dict[str, Any]:
    return {"kind": "deepspeed", "zero": stage, **keys}


BACKENDS = {
    "plain": PLAIN, "zero1": zero(1), "zero2": zero(2), "zero3": zero(3, gradient_checkpointing=True),
    "offload": zero(3, offload_params="cpu", offload_optimizer="cpu"), "offload2": zero(2, offload_optimizer="cpu"),
}  # fmt: skip
LONG = [("full", "zero1"), ("full", "zero2"), ("full", "offload")]
"""Trained under `make proof` only."""


@pytest.fixture(scope="module")
def two_workers(request: pytest.FixtureRequest, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs folder of one world of two that trained every combination; the long ones where a proof asks for them."""
    runs = tmp_path_factory.mktemp("two")
    is_proof = any(item.get_closest_marker("proof") and item.path == request.path for item in request.session.items)
    pairs = [(m, n) for m in (LORA, FULL) for n in BACKENDS if is_proof or (m["kind"], n) not in LONG]
    jobs = [job(tiny_model_dir, runs, f"{m['kind']}-{n}", BACKENDS[n], m) for m, n in pairs]
    for method in (LORA, FULL) if is_proof else (FULL,):
        for name in ("plain", "zero3"):
            jobs.append(job(tiny_model_dir, runs, f"{method['kind']}-{name}-bf16", BACKENDS[name], method, dtype="bf16"))
    assert in_world(2, train_all, jobs) == [[f"finished at {STEPS}"] * len(jobs)] * 2
    return runs


@pytest.mark.parametrize(
    ("method", "backend"),
    [
        pytest.param(method, name, marks=[pytest.mark.proof] if (method, name) in LONG else [])
        for method in ("lora", "full")
        for name in BACKENDS
        if name != "plain"
    ],
)
def test_the_losses_are_those_of_plain(two_workers: Path, method: str, backend: str) -> None:
    name = f"{method}-{backend}"
    assert clipped(two_workers, name)
    assert losses(two_workers, name)[-1] < losses(two_workers, name)[0] - 0.05
    assert apart(losses(two_workers, name), losses(two_workers, f"{method}-plain")) <= 1e-5
    assert apart(validations(two_workers, name), validations(two_workers, f"{method}-plain")) <= 1e-5


@pytest.mark.parametrize("method", [pytest.param("lora", marks=pytest.mark.proof), "full"])
def test_in_bf16_the_losses_are_near_those_of_plain(two_workers: Path, method: str) -> None:
    name = f"{method}-zero3-bf16"
    assert losses(two_workers, name)[-1] < losses(two_workers, name)[0] - 0.05
    assert apart(losses(two_workers, name), losses(two_workers, f"{method}-plain-bf16")) <= 0.02


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 20)[None]).logits.float()


def test_an_adapter_trained_in_shards_is_plain_peft_and_the_one_plain_trains(two_workers: Path, tiny_model_dir: Path) -> None:
    def tuned(name: str) -> torch.Tensor:
        base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
        return logits(PeftModel.from_pretrained(base, two_workers / name / "final").eval())

    bare = logits(AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32))
    assert float((tuned("lora-zero3") - bare).abs().max()) > 0.05
    torch.testing.assert_close(tuned("lora-zero3"), tuned("lora-plain"), rtol=0, atol=1e-4)
    tensors = load_file(two_workers / "lora-zero3" / "final" / "adapter_model.safetensors")
    assert all(tensor.numel() and bool(tensor.any()) for tensor in tensors.values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_model_trained_in_shards_is_a_plain_transformers_folder(two_workers: Path, tiny_model_dir: Path, dtype: str) -> None:
    suffix = "" if dtype == "fp32" else "-bf16"
    ours = AutoModelForCausalLM.from_pretrained(two_workers / f"full-zero3{suffix}" / "final")
    theirs = AutoModelForCausalLM.from_pretrained(two_workers / f"full-plain{suffix}" / "final")
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=ours.dtype)
    assert ours.dtype == theirs.dtype and ours.config.use_cache
    error, effect = (float((logits(ours) - logits(other)).abs().max()) for other in (theirs, base))
    assert effect > 0.1 and error <= (1e-4 if dtype == "fp32" else 0.2 * effect)
    assert "fine-tuned" in (two_workers / f"full-zero3{suffix}" / "final" / "README.md").read_text()


@pytest.mark.parametrize(
    ("method", "first", "second", "stages"),
    [
        pytest.param(LORA, 2, 3, [(3, 3)], id="lora-2-3"),
        pytest.param(LORA, 2, 3, STAGES, id="lora-2-3-stages", marks=pytest.mark.proof),
        pytest.param(LORA, 3, 2, STAGES, id="lora-3-2-stages", marks=pytest.mark.proof),
        pytest.param(FULL, 2, 3, STAGES, id="full-2-3-stages", marks=pytest.mark.proof),
        pytest.param(FULL, 3, 2, STAGES, id="full-3-2-stages", marks=pytest.mark.proof),
    ],
)
def test_a_stopped_run_goes_on_at_the_same_and_at_another_number_of_workers(
    tiny_model_dir: Path, tmp_path: Path, method: dict[str, Any], first: int, second: int, stages: list[tuple[int, int]]
) -> None:
    """`stages`: of the stopped run, and of the one that goes on from it at another number of workers."""

    def run(name: str, backend: dict[str, Any], stop: int | None = None) -> Job:
        return job(tiny_model_dir, tmp_path, name, backend, method, stop_after=stop)

    changes = {f"{before}-{after}": (before, after) for before, after in stages}
    starts = [run("same", zero(3), 3), *(run(name, zero(before), 3) for name, (before, _) in changes.items())]
    told = in_world(first, train_all, [run("whole", zero(3)), *starts, run("same", zero(3))])
    stopped, finished = f"stopped at step 3 of {STEPS}", f"finished at {STEPS}"
    assert told == [[finished, *[stopped] * len(starts), finished]] * first
    goes_on = [run(name, zero(after)) for name, (_, after) in changes.items()]
    assert in_world(second, train_all, goes_on) == [[finished] * len(goes_on)] * second
    whole = losses(tmp_path, "whole")
    assert losses(tmp_path, "same") == whole  # bit-identical
    for name in changes:
        assert apart(losses(tmp_path, name), whole) <= 1e-5, name


def test_an_adapters_checkpoint_holds_the_adapter_and_its_optimizer_only(two_workers: Path) -> None:
    folder = two_workers / "lora-zero3" / "checkpoints" / f"step-{STEPS:06d}"
    parts = sorted(path.name for path in (folder / "zero").iterdir())
    assert parts == ["rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"]
    adapter = load_file(two_workers / "lora-zero3" / "final" / "adapter_model.safetensors")
    num_trained = sum(tensor.numel() for tensor in adapter.values())
    held = sum(tensor.numel() for name in parts for tensor in load_file(folder / "zero" / name).values())
    assert 3 * num_trained <= held <= 3.02 * num_trained


def test_old_checkpoints_count_by_their_seal_alone(two_workers: Path) -> None:
    run = RunDir(two_workers, "full-zero3")
    assert run.newest_checkpoint() == STEPS
    part = two_workers / "full-zero3" / "checkpoints" / f"step-{STEPS:06d}" / "zero" / "rank-00001-of-00002.safetensors"
    data = bytearray(part.read_bytes())
    data[-9] ^= 1
    part.write_bytes(data)
    assert run.newest_checkpoint() != STEPS


def what_goes_wrong(rank: int, size: int, jobs: list[Job]) -> list[str]:
    """A gather that leaves parameters empty; gradients that are not finite; a part of a checkpoint that cannot be written."""
    from contextlib import nullcontext

    from ftcore import zero_export, zero_state
    from ftcore.backends.base import World
    from ftcore.errors import FtcoreError
    from ftcore.loop import Training, train

    told = []
    empty, infinite, full, misspelt = (Recipe.model_validate(each.tree) for each in jobs)
    world = World(rank=rank, size=size, local_rank=rank)
    gathering, zero_export.gathering = zero_export.gathering, lambda parameter: nullcontext()
    try:
        train(empty, world, BLOCKS, RunDir(empty.output.runs, empty.name))
    except FtcoreError as error:
        told.append(error.what)
    zero_export.gathering = gathering

    training = Training(infinite, world, BLOCKS, RunDir(infinite.output.runs, infinite.name), None, None)
    training.restore()
    training._step()
    before = training.stepper.state.flats[0].clone()
    next(p for p in training.model.parameters() if p.requires_grad).register_hook(lambda gradient: gradient * float("inf"))
    try:
        training._step()
    except FtcoreError as error:
        told.append(f"{error.what}; weights kept: {torch.equal(before, training.stepper.state.flats[0])}")
    training.close()

    save = zero_state.ZeroState.save

    def no_room(self: zero_state.ZeroState, path: Path, buffers: dict[str, torch.Tensor]) -> None:
        if rank == 1:
            raise OSError(28, "No space left on device")
        save(self, path, buffers)

    zero_state.ZeroState.save = no_room
    try:
        train(full, world, BLOCKS, RunDir(full.output.runs, full.name))
    except FtcoreError as error:
        told.append(error.what)
    zero_state.ZeroState.save = save
    try:
        train(misspelt, world, BLOCKS, RunDir(misspelt.output.runs, misspelt.name))
    except FtcoreError as error:
        told.append(f"{error.where}: {error.got}")
    return told


def test_an_empty_adapter_an_infinite_gradient_and_a_lost_part_are_refused_on_every_rank(tiny_model_dir: Path, tmp_path: Path) -> None:
    jobs = [job(tiny_model_dir, tmp_path, name, zero(3), LORA, max_steps=2) for name in ("empty", "infinite", "full")]
    jobs.append(job(tiny_model_dir, tmp_path, "misspelt", zero(3, deepspeed={"zero_optimization": {"overlap_com": True}}), LORA))
    first, second = in_world(2, what_goes_wrong, jobs)
    gathered = "a gathered parameter is not what its shards hold"
    infinite = "the gradient of step 2 is not finite; weights kept: True"
    misspelt = "backend.deepspeed: overlap_com: Extra inputs are not permitted"
    assert first == [gathered, infinite, "rank 1 could not write its part of a checkpoint", misspelt]
    assert second == [gathered, infinite, "cannot write a checkpoint this", misspelt]
    assert not (tmp_path / "empty" / "final").exists()
    assert RunDir(tmp_path, "full").checkpoint_steps() == []
    assert not [path for path in (tmp_path / "full" / "checkpoints").iterdir() if path.name.endswith(".tmp")]


def test_a_recipe_with_a_raw_section_survives_being_written_out() -> None:
    from ftcore.recipe import dump_recipe, parse_recipe

    tree = job(Path("base"), Path("runs"), "run", zero(3), LORA).tree | {"resources": {"workers": 2}}
    recipe = Recipe.model_validate(tree)
    assert parse_recipe(dump_recipe(recipe)) == recipe


def test_a_bf16_model_with_an_fp32_buffer_is_exported(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16)
    model.register_buffer("correction", torch.arange(3.0))
    export_model(model, tmp_path, torch.bfloat16, World(), lambda values: values)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["correction"], torch.arange(3.0))
