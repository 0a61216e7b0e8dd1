"""A forecast adds up, refuses what cannot fit with something that does, and costs no torch."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ftcore.devices import DEVICES
from ftcore.errors import ConfigError, ModelError
from ftcore.forecast import Forecast, forecast
from ftcore.memory import GIB, Host
from ftcore.recipe import Recipe, load_recipe
from pipelines.plan import main
from tests.unit.test_shapes import LLAMA_8B, MIXTRAL_8X7B, QWEN2_72B, QWEN3_30B_A3B

REPO = Path(__file__).resolve().parents[2]
GPU = "resources.gpus_per_worker=1"


def recipe_file(folder: Path, config: dict[str, Any], method: str = "lora") -> Path:
    base = folder / "base"
    base.mkdir(exist_ok=True)
    (base / "config.json").write_text(json.dumps(config))
    path = folder / "recipe.yaml"
    path.write_text(
        f"name: planned\nmodel: {{path: {base}}}\ndata: {{sources: {folder / 'rows.jsonl'}, cache: {folder / 'cache'}}}\n"
        f"method: {method}\nstage: sft\n"
    )
    return path


def told(folder: Path, config: dict[str, Any], *overrides: str, method: str = "lora") -> Forecast:
    return forecast(load_recipe(recipe_file(folder, config, method), overrides))


def gib(known: Forecast, name: str) -> float:
    return sum(part.bytes for part in known.need.parts if part.name == name) / GIB


def test_full_fine_tuning_holds_sixteen_bytes_a_parameter(tmp_path: Path) -> None:
    known = told(tmp_path, LLAMA_8B, GPU, method="full")
    state = sum(gib(known, name) for name in ("trained weights", "gradients", "optimizer"))
    assert state == pytest.approx(16 * 8_030_261_248 / GIB)
    assert known.need.peak / GIB > state
    assert known.need.host_peak / GIB > 12 * 8_030_261_248 / GIB  # the copy a checkpoint is written from


def test_lora_holds_the_base_in_its_dtype_and_the_adapter_in_fp32(tmp_path: Path) -> None:
    known = told(tmp_path, LLAMA_8B, GPU, "method.rank=16", "method.targets=all-linear")
    assert gib(known, "base") == pytest.approx(2 * 8_030_261_248 / GIB)
    adapter = 32 * 16 * ((4096 + 4096) * 2 + (4096 + 1024) * 2 + (4096 + 14336) * 3)
    assert known.moves.count == adapter == 41_943_040
    assert gib(known, "optimizer") == pytest.approx(8 * adapter / GIB)


@pytest.mark.parametrize(
    ("overrides", "bits"), [((), 4 + 8 / 64 + 32 / 64 / 256), (("method.double_quant=false",), 4.5), (("method.bits=8",), 8 + 32 / 4096)]
)
def test_qlora_holds_linear_layers_in_their_bits_and_the_rest_in_its_dtype(tmp_path: Path, overrides: tuple[str, ...], bits: float) -> None:
    known = told(tmp_path, LLAMA_8B, GPU, *overrides, method="qlora")
    linears = known.shape.parts()["attention"] + known.shape.parts()["mlp"]
    rest = known.shape.num_parameters - linears
    assert gib(known, "base") == pytest.approx((linears * bits / 8 + 2 * rest) / GIB, rel=2e-3)


def test_experts_are_not_quantised_and_the_plan_says_so(tmp_path: Path) -> None:
    known = told(tmp_path, QWEN3_30B_A3B, GPU, method="qlora")
    assert gib(known, "base") > 2 * known.shape.parts()["experts"] / GIB
    assert any("experts are not quantised" in note for note in known.notes)


def test_zero_shards_what_it_says_over_the_workers(tmp_path: Path) -> None:
    known = told(tmp_path, QWEN2_72B, GPU, "resources.workers=16", "backend.kind=deepspeed", "backend.zero=3", method="full")
    state = sum(gib(known, name) for name in ("trained weights", "masters", "gradients", "optimizer"))
    assert state == pytest.approx(18 * 72_706_203_648 / 16 / GIB, rel=1e-3)
    away = told(tmp_path, QWEN2_72B, GPU, "backend.kind=deepspeed", "backend.offload_optimizer=cpu", method="full")
    assert away.need.held("step") < known.need.held("step") + 18 * 72_706_203_648
    assert away.need.host_peak > 16 * 72_706_203_648


def test_checkpointing_smaller_micro_batches_and_shorter_blocks_take_less(tmp_path: Path) -> None:
    most = told(tmp_path, LLAMA_8B, GPU, "backend.micro_batch=4")
    assert told(tmp_path, LLAMA_8B, GPU).need.peak < most.need.peak
    assert told(tmp_path, LLAMA_8B, GPU, "backend.micro_batch=4", "backend.gradient_checkpointing=true").need.peak < most.need.peak
    assert told(tmp_path, LLAMA_8B, GPU, "backend.micro_batch=4", "data.max_length=512").need.peak < most.need.peak


@pytest.mark.parametrize("memory_gib", [20, 40, 80])
@pytest.mark.parametrize("config", [LLAMA_8B, QWEN2_72B, MIXTRAL_8X7B])
def test_a_refusal_names_a_recipe_that_fits(tmp_path: Path, config: dict[str, Any], memory_gib: int) -> None:
    path = recipe_file(tmp_path, config, "full")
    known = forecast(load_recipe(path, [GPU, "backend.micro_batch=2"]))
    with pytest.raises(ConfigError, match="more memory than a worker has") as caught:
        known.require_fits(memory_gib * GIB)
    overrides = shlex.split(caught.value.remedy)
    assert overrides and all("=" in text for text in overrides)
    forecast(load_recipe(path, [GPU, "backend.micro_batch=2", *overrides])).require_fits(memory_gib * GIB)


def test_offload_that_no_host_holds_is_neither_accepted_nor_suggested(tmp_path: Path) -> None:
    away = (GPU, "backend.kind=deepspeed", "backend.zero=3", "backend.offload_optimizer=cpu", "backend.offload_params=cpu")
    known = told(tmp_path, QWEN2_72B, *away, "backend.gradient_checkpointing=true", method="full")
    assert known.verdict(80 * GIB) == "fits"
    host = Host("n1", 512, 8)
    with pytest.raises(ConfigError, match="its workers' host") as caught:
        known.require_fits(80 * GIB, [host])
    assert "512.0 GiB by 1 worker(s) (n1)" in str(caught.value)
    found = known.nearest(80 * GIB, [host])
    assert found is not None and host.takes(found.need) <= 0.9 * 512
    least = told(tmp_path, QWEN2_72B, GPU, method="full").nearest(80 * GIB)
    assert least is not None and least.need.host_peak < 2 * GIB, "more machines come before a terabyte on one host"


def test_a_host_holds_all_its_workers_and_one_copy_of_the_checkpoint(tmp_path: Path) -> None:
    overrides = (GPU, "resources.workers=4", "backend.kind=deepspeed", "backend.zero=3", "backend.offload_optimizer=cpu")
    four = told(tmp_path, LLAMA_8B, *overrides, method="full").need
    assert Host("n1", 512, 8).takes(four) == pytest.approx(4 * four.host_peak / GIB)
    assert Host("n1", 512, 2).takes(four) == Host("n1", 512, 8, num_nodes=2).takes(four) == pytest.approx(2 * four.host_peak / GIB)
    plain = told(tmp_path, LLAMA_8B, GPU, "resources.workers=4", method="full").need
    runtime = next(part.bytes for part in plain.parts if part.name == "runtime")
    assert plain.on_one_host(4) == plain.host_peak + 3 * runtime


def test_the_smallest_change_comes_first(tmp_path: Path) -> None:
    known = told(tmp_path, LLAMA_8B, GPU, "backend.micro_batch=4")
    small = told(tmp_path, LLAMA_8B, GPU, "backend.micro_batch=1")
    found = known.nearest(small.need.peak / 0.89)
    assert found is not None and found.overrides == ("backend.micro_batch=1",)


def test_what_nothing_can_make_fit_is_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        told(tmp_path, QWEN2_72B).require_fits(GIB)
    assert "smaller model" in caught.value.remedy


def test_prepared_blocks_give_steps_and_the_longest_block(tmp_path: Path, tiny_model_dir: Path) -> None:
    from pipelines.prepare import prepare

    rows = [{"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes " * (n % 7 + 1)}]} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {"name": "a", "model": {"path": str(tiny_model_dir), "dtype": "fp32"}, "method": "full", "stage": "sft"}
    data = {
        "sources": str(tmp_path / "rows.jsonl"),
        "cache": str(tmp_path / "cache"),
        "max_length": 64,
        "engine": "process",
        "validation": 0,
    }
    recipe = Recipe.model_validate(tree | {"data": data, "optim": {"batch_size": 2, "epochs": 3}})
    before = forecast(recipe)
    assert "not prepared yet" in " ".join(before.notes)
    prepared = prepare(recipe, log=lambda line: None)
    known = forecast(recipe)
    assert known.volume.blocks == prepared.num_blocks("train")
    assert known.volume.top == tuple(sorted((int(n) for n in prepared.block_lengths("train")), reverse=True)[:2])
    assert known.steps == round(3 * -(-prepared.num_blocks("train") // 2))
    assert known.need.peak <= before.need.peak


def test_time_follows_from_the_arithmetic(tmp_path: Path) -> None:
    slow, fast = DEVICES["A100-80"], DEVICES["H100"]
    known = told(tmp_path, LLAMA_8B, GPU, "optim.max_steps=100", "optim.batch_size=16")
    seconds = known.seconds(fast)
    assert seconds is not None and seconds < (known.seconds(slow) or 0)
    tokens = 100 * 16 * 2048
    assert seconds == pytest.approx(tokens * 4 * known.shape.num_active / (0.4 * 989e12), rel=0.1)
    assert told(tmp_path, LLAMA_8B, GPU).seconds(fast) is None  # nobody knows how many rows there are


def test_a_method_without_a_forecast_and_a_base_without_a_config_are_refused(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, LLAMA_8B)
    (tmp_path / "base" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        forecast(load_recipe(path))
    (tmp_path / "base" / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not JSON"):
        forecast(load_recipe(path))


def test_the_command_tells_exit_codes_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(recipe_file(tmp_path, LLAMA_8B, "qlora"))
    assert main([path, GPU, "--gpu", "H100", "--price", "2", "optim.max_steps=10"]) == 0
    out = capsys.readouterr().out
    assert "8,030,261,248" in out and "FITS" in out and "cost" in out
    assert main([path, GPU, "--memory", "5"]) == 3
    assert "DOES NOT FIT" in capsys.readouterr().out
    peak = forecast(load_recipe(path, [GPU])).need.peak / GIB
    assert main([path, GPU, "--memory", str(peak * 1.02)]) == 0
    assert main([path, GPU, "--memory", str(peak * 1.02), "--strict"]) == 3
    capsys.readouterr()
    assert main([path, GPU, "--gpu", "H100"]) == 0
    assert "on its host" in (out := capsys.readouterr().out) and "not judged: give --host-memory GIB" in out
    assert main([path, GPU, "--gpu", "H100", "--host-memory", "0.5"]) == 3
    assert "of 0.50 GiB, by 1 worker(s) (--host-memory)" in capsys.readouterr().out
    assert main([path, GPU, "--gpu", "h200", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "fits"


def test_bad_flags_are_refused(tmp_path: Path) -> None:
    path = str(recipe_file(tmp_path, LLAMA_8B))
    with pytest.raises(ConfigError, match="unknown GPU") as caught:
        main([path, GPU, "--gpu", "H10"])
    assert "H100" in caught.value.remedy
    for place in (["--gpu", "H100"], ["--host-memory", "64"]):
        with pytest.raises(ConfigError, match="trains on CPUs"):
            main([path, *place])
    for bad in ("0", "-3", "nan", "much"):
        with pytest.raises(SystemExit):
            main([path, "--memory", bad])


@pytest.mark.parametrize("config", [LLAMA_8B, QWEN2_72B, QWEN3_30B_A3B])
def test_a_plan_takes_less_than_a_second_and_loads_nothing_heavy(tmp_path: Path, config: dict[str, Any]) -> None:
    """Processor time, so that a busy machine does not fail it; what importing costs is left out, as it is any command's."""
    path = recipe_file(tmp_path, config, "full")
    heavy = ("torch", "transformers", "ray", "peft", "deepspeed", "bitsandbytes")
    code = (
        f"import sys, time; from pipelines.plan import main; start = time.process_time(); main([{str(path)!r}, {GPU!r}, '--gpu', 'L4']);"
        f"print(time.process_time() - start); print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    *_, seconds, loaded = done.stdout.splitlines()
    assert loaded == "[]"
    assert float(seconds) < 1


def test_zero_gathers_a_module_at_a_time_and_reduces_a_second_bucket_only_beside_what_is_left(tmp_path: Path) -> None:
    overrides = (GPU, "resources.workers=2", "backend.kind=deepspeed", "backend.zero=3")
    known = told(tmp_path, LLAMA_8B, *overrides, method="full")
    assert gib(known, "gathered weights") == 2 * known.shape.embedding / GIB  # larger than any linear layer
    ahead = told(tmp_path, LLAMA_8B, *overrides, "backend.deepspeed.zero_optimization.stage3_prefetch_bucket_size=1000000", method="full")
    assert gib(ahead, "gathered weights") == pytest.approx(gib(known, "gathered weights") + 2e6 / GIB)
    assert gib(known, "reduce bucket") == 4 * 16_000_000 / GIB
