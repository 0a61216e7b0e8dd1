"""What a quantised base takes: its tensors with their scales, the anonymous memory of a fresh process that holds it; and tokens a second.

    python benchmarks/qlora_memory.py [--layers 24 --hidden 1024 --vocabulary 16000] [--tokens 512 --steps 3]

In: a Qwen2 made here (about 350 million parameters in its linear layers). Out: a table. Runs in: one process a figure, all on this machine.
Embeddings are never quantised and are printed apart: the larger the model, the less they count (7B: 14 %, 0.5B: 28 % of all parameters).
Anonymous memory is RssAnon over what the process held after its imports; the peak is sampled every 5 ms while loading. A bf16 base stays in
the pages of its file (RssAnon counts none of it), so shares are of its tensors' bytes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

CASES: dict[str, dict[str, Any]] = {
    "lora, bf16": {"kind": "lora"},
    "qlora, int8": {"kind": "qlora", "bits": 8},
    "qlora, nf4": {"kind": "qlora", "double_quant": False},
    "qlora, nf4 double": {"kind": "qlora"},
}


def anonymous_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


class Peak:
    """Samples this process's anonymous memory in a thread."""

    def __init__(self) -> None:
        self.mib, self._over = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._over.wait(0.005):
            self.mib = max(self.mib, anonymous_mib())

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()


def make_model(folder: Path, args: argparse.Namespace) -> None:
    """bf16 on disk, as bases are published."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = Qwen2Config(
        vocab_size=args.vocabulary, hidden_size=args.hidden, intermediate_size=int(args.hidden * 3.5) // 64 * 64,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden // 64, num_key_value_heads=max(1, args.hidden // 256),
        tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)


def measure(case: str, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    import peft  # noqa: F401  counted as an import, not as the base
    import torch
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    from ftcore.layers.quantised import held_bytes, quantised_layers
    from ftcore.methods.base import METHODS
    from ftcore.models import load_base
    from ftcore.recipe import Model

    torch.set_num_threads(1)
    method = METHODS[CASES[case]["kind"]].model_validate(CASES[case] | {"rank": 8, "targets": "all-linear"})
    before = anonymous_mib()
    with Peak() as peak:
        model = load_base(Model(path=str(folder), dtype="bf16"), method)
    inside, around = held_bytes(model)
    if not quantised_layers(model):  # bf16: the same linear layers, unquantised
        inside = sum(
            p.nbytes for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear) and "lm_head" not in name
            for p in layer.parameters()
        )  # fmt: skip
        around -= inside
    figures = {"linears": inside / 2**20, "rest": around / 2**20, "peak": peak.mib - before, "held": anonymous_mib() - before}
    return figures | {"footprint": model.get_memory_footprint() / 2**20, "speed": speed(method.apply(model), args)}


def speed(model: Any, args: argparse.Namespace) -> float:
    """Tokens a second of forward and backward over one packed block, under the loop's autocast."""
    import torch

    from ftcore.data.collate import collate
    from ftcore.data.types import Block
    from ftcore.models import CausalModel, autocasting, choose_layout

    if not args.steps:
        return 0.0
    import numpy as np

    ids = np.random.default_rng(0).integers(0, args.vocabulary, args.tokens).astype(np.int32)
    lengths = np.full(4, args.tokens // 4, np.int32)
    batch = collate([Block(ids=ids, mask=np.ones(args.tokens, np.uint8), lengths=lengths, rows=np.arange(4))], padded=False)
    causal = CausalModel(model, choose_layout(model.get_base_model(), "auto", packs=True))
    model.train()
    best = 0.0
    for _ in range(args.steps + 1):  # the first warms up
        started = time.perf_counter()
        with autocasting("cpu", torch.bfloat16):
            loss = causal.cross_entropy(batch)
        loss.backward()
        best = max(best, args.tokens / (time.perf_counter() - started))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=26)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=16000)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2, help="0: memory only")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.folder, args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), args)
        print(f"{args.layers} layers, hidden {args.hidden}, vocabulary {args.vocabulary}; MiB, and the share of bf16's tensors")
        heads = (
            ("linears", 15),
            ("embeddings", 12),
            ("base", 15),
            ("RssAnon", 15),
            ("peak loading", 15),
            ("transformers says", 19),
            ("tokens/s", 10),
        )
        print(" " * 20 + "".join(f"{name:>{width}}" for name, width in heads))
        whole: dict[str, float] = {}
        for case in CASES:
            command = [sys.executable, __file__, *sys.argv[1:], "--one", case, "--folder", folder]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            f = json.loads(done.stdout.splitlines()[-1])
            base = f["linears"] + f["rest"]
            whole = whole or {"linears": f["linears"], "base": base}
            shares = [(f["linears"], "linears"), (base, "base"), (f["held"], "base"), (f["peak"], "base")]
            linears, total, held, peak = (f"{mib:.0f} ({mib / whole[key]:.2f}x)" for mib, key in shares)
            print(
                f"{case:<20}{linears:>15}{f['rest']:>12.0f}{total:>15}{held:>15}{peak:>15}{f['footprint']:>19.0f}{f['speed']:>10.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
