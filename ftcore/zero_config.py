"""The one DeepSpeed configuration, derived from the recipe: what follows from which key, what is our default, what the user added.

In: the `backend` and `optim` sections, the model's dtype. Out: the dictionary `deepspeed.initialize` takes; the conflicts in a raw section.
Runs in: everywhere a recipe is read (no torch, no deepspeed), train workers.

Derived keys belong to the recipe: the raw `backend.deepspeed` section may repeat them but not contradict them. Defaults (bucket sizes, how
much stays gathered) only tune, so the raw section may set them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from pydantic import JsonValue

if TYPE_CHECKING:
    from ftcore.backends.deepspeed import DeepSpeed
    from ftcore.optim import Optim

Tree = dict[str, JsonValue]

BUCKET = 16_000_000
DEFAULTS: dict[str, JsonValue] = {
    # elements; DeepSpeed's own defaults keep up to 2 GB of buffers and a billion gathered parameters on every rank
    "zero_optimization.reduce_bucket_size": BUCKET,
    "zero_optimization.allgather_bucket_size": BUCKET,
    "zero_optimization.sub_group_size": BUCKET,
    "zero_optimization.stage3_prefetch_bucket_size": 0,
    "zero_optimization.stage3_max_live_parameters": 50_000_000,
    "zero_optimization.stage3_max_reuse_distance": 0,
    "zero_optimization.stage3_param_persistence_threshold": 10_000,
    "wall_clock_breakdown": False,
}
BELONGS = {
    "optimizer": "optim", "scheduler": "optim.schedule", "train_batch_size": "optim.batch_size", "bf16": "model.dtype",
    "fp16": "model.dtype", "bfloat16": "model.dtype",
    "torch_autocast": "model.dtype", "amp": "model.dtype", "tensor_parallel": "resources.workers",
    "sequence_parallel_size": "resources.workers", "zero_optimization.zenflow": "optim", "compile": "backend.kind",
    "zero_optimization.offload_optimizer.device": "backend.offload_optimizer",
    "zero_optimization.offload_optimizer.nvme_path": "backend.nvme_path",
    "zero_optimization.offload_param.device": "backend.offload_params", "zero_optimization.offload_param.nvme_path": "backend.nvme_path",
    "zero_optimization.cpu_offload": "backend.offload_optimizer", "zero_optimization.cpu_offload_param": "backend.offload_params",
    "zero_optimization.cpu_offload_use_pin_memory": "backend.offload_optimizer",
}  # fmt: skip
"""Keys with a home elsewhere in the recipe, or that would change who computes what; the raw section may not hold them at all."""
TOP_LEVEL = frozenset({
    "aio", "amp", "autotuning", "bf16", "bfloat16", "checkpoint", "comet", "comms_logger", "communication_data_type", "compile",
    "compression_training", "csv_monitor", "curriculum_learning", "activation_checkpointing", "data_efficiency", "data_types",
    "dataloader_drop_last", "datastates_ckpt", "disable_allgather", "disable_python_gc", "dump_state", "eigenvalue", "elasticity",
    "expert_parallel", "flops_profiler", "fp16", "gradient_accumulation_steps", "gradient_allreduce_op", "gradient_clipping",
    "gradient_predivide_factor", "graph_harvesting", "hybrid_engine", "log_level", "managed_gradient_accumulation", "memory_breakdown",
    "nebula", "optimizer", "pipeline", "prescale_gradients", "progressive_layer_drop", "scheduler",
    "seq_parallel_communication_data_type", "sequence_parallel_size", "sparse_attention", "sparse_gradients", "steps_per_print",
    "tensor_parallel", "tensorboard", "timers", "torch_autocast", "train_batch_size", "train_micro_batch_size_per_gpu",
    "use_data_before_expert_parallelism", "vocabulary_size", "wall_clock_breakdown", "wandb", "weight_quantization",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization",
})  # fmt: skip
"""Every name that DeepSpeed 0.19.8 looks up at the top of its configuration; it passes over any other without a word."""


def derived(backend: DeepSpeed, optim: Optim, *, bf16: bool) -> dict[str, tuple[JsonValue, str]]:
    """Dotted DeepSpeed key -> (value, the recipe key it follows from). `bf16`: DeepSpeed holds bf16 weights and keeps the fp32 masters."""
    found: dict[str, tuple[JsonValue, str]] = {
        "train_micro_batch_size_per_gpu": (1, "optim.batch_size"),  # our windows decide what is accumulated; DeepSpeed must not divide
        "gradient_accumulation_steps": (1, "optim.batch_size"),
        "gradient_clipping": (optim.clip_norm, "optim.clip_norm"),
        "fp16.enabled": (False, "model.dtype"),
        "bf16.enabled": (bf16, "model.dtype"),
        "bf16.check_grad_overflow": (True, "model.dtype"),
        "communication_data_type": ("fp32", "model.dtype"),
        "data_types.grad_accum_dtype": ("fp32", "model.dtype"),
        "zero_optimization.stage": (backend.zero, "backend.zero"),
        "zero_optimization.memory_efficient_linear": (False, "backend.kind"),  # it replaces torch's linear in the whole process
        "zero_allow_untested_optimizer": (True, "optim"),
        "zero_force_ds_cpu_optimizer": (False, "backend.offload_optimizer"),
    }
    for name in ("offload_param", "offload_optimizer"):
        key = "offload_params" if name == "offload_param" else name
        device = backend.offload_params if name == "offload_param" else backend.offload_optimizer
        if device != "none":
            found[f"zero_optimization.{name}.device"] = (device, f"backend.{key}")
        if device == "nvme":
            found[f"zero_optimization.{name}.nvme_path"] = (backend.nvme_path, "backend.nvme_path")
    return found


def configuration(backend: DeepSpeed, optim: Optim, *, bf16: bool, num_trainable: int = BUCKET) -> Tree:
    """What DeepSpeed is given: defaults, the raw section over them, what the recipe decides over both.

    `num_trainable`: the reduce bucket is allocated whole, and again in each reduction, so for an adapter it is a quarter of the adapter.
    """
    tree: Tree = {}
    fitting = {"zero_optimization.reduce_bucket_size": _fitting_bucket(num_trainable)}
    for path, value in {**DEFAULTS, **fitting, **dict(leaves(backend.deepspeed))}.items():
        _put(tree, path, value)
    for path, (value, _) in derived(backend, optim, bf16=bf16).items():
        _put(tree, path, value)
    return tree


def _fitting_bucket(num_trainable: int) -> int:
    return min(BUCKET, max(num_trainable // 4, 1_000_000))


def reduce_bucket(backend: DeepSpeed, num_trainable: int) -> int:
    """Elements of the reduce bucket: what the raw section says, else what fits the number of trained parameters."""
    said = dict(leaves(backend.deepspeed)).get("zero_optimization.reduce_bucket_size")
    return int(said) if isinstance(said, int | float) else _fitting_bucket(num_trainable)


def prefetched(backend: DeepSpeed) -> int:
    """Elements that stage 3 gathers ahead of the module in use."""
    said = dict(leaves(backend.deepspeed)).get("zero_optimization.stage3_prefetch_bucket_size", 0)
    return int(said) if isinstance(said, int | float) else 0


def conflicts(backend: DeepSpeed, optim: Optim) -> Iterator[tuple[str, str]]:
    """(path in the recipe, sentence) for every raw key that contradicts the recipe."""
    ours = derived(backend, optim, bf16=False)
    for name in backend.deepspeed:
        if name.split(".")[0] not in TOP_LEVEL:
            near = difflib.get_close_matches(name, TOP_LEVEL, n=1)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            yield f"backend.deepspeed.{name}", f"DeepSpeed has no such key, and would pass over it in silence{hint}"
    for path, value in leaves(backend.deepspeed):
        home = next((BELONGS[key] for key in BELONGS if path == key or path.startswith(f"{key}.")), None)
        if home:
            yield f"backend.deepspeed.{path}", f"this follows from {home}; set it there and remove it here"
        elif path in ours and value != ours[path][0]:
            wanted, source = ours[path]
            yield f"backend.deepspeed.{path}", f"got {value!r}, but {source} makes it {wanted!r}; change {source} and remove this key"
        elif any(key.startswith(f"{path}.") for key in ours):
            yield f"backend.deepspeed.{path}", f"wanted a mapping; got {value!r}"
        elif value == "auto":
            yield f"backend.deepspeed.{path}", "`auto` is filled in by Hugging Face's Trainer only; remove the key to get our value"


def leaves(tree: Mapping[str, JsonValue], prefix: str = "") -> Iterator[tuple[str, JsonValue]]:
    """Dotted path and value of every leaf; an empty mapping is a leaf."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _put(tree: Tree, path: str, value: JsonValue) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        below = tree.setdefault(parent, {})
        assert isinstance(below, dict), f"{path}: {parent} is no mapping (conflicts() refuses that)"
        tree = below
    tree[last] = value
