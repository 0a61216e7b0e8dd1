"""The torch engine against vLLM on a CPU: tokens/s with the same threads, model, prompts and sampling, in one run, taking turns.

    .venv-vllm/bin/python benchmarks/vllm_cpu.py [--layers 8] [--hidden 512] [--rows 16] [--tokens 32] [--dtype fp32] [--threads 1]

Needs an environment with vLLM (tests/vllm.txt; `make proof` builds .venv-vllm); elsewhere it says so and leaves. For its base vLLM runs
without LoRA, as it does best (compiled); for adapters with LoRA enabled. Every figure is the median of `--rounds` rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import os
import statistics
import sys
import tempfile
import warnings
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
DEMO = REPO / "ftcore/demo/base"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"layers": 8, "hidden": 512, "vocabulary": 8192, "rows": 16, "prompt": 16, "tokens": 32, "rank": 8, "rounds": 3, "threads": 1}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    return parser.parse_args()


def compare(args: argparse.Namespace) -> dict[str, list[float]]:
    """Tokens/s of each round, by case."""
    import torch
    from multi_lora import Ours, in_turn, make_adapters, make_base
    from transformers import AutoTokenizer

    from ftcore.engines.base import Engine
    from ftcore.engines.torch import Torch
    from ftcore.engines.vllm import Vllm

    torch.set_num_threads(args.threads)
    common = {"max_batch": args.rows, "max_context": 512, "dtype": args.dtype}
    sections: dict[str, Engine] = {
        "ftcore": Torch(**common, num_threads=args.threads, prefix_mib=0),
        "vLLM without LoRA": Vllm(**common, kv_cache_mib=256, max_loras=0),
        "vLLM": Vllm(**common, kv_cache_mib=256, max_loras=8, max_rank=args.rank),
    }
    loop = asyncio.new_event_loop()
    with tempfile.TemporaryDirectory(prefix="vllm-cpu-") as folder:
        base = make_base(Path(folder) / "base", args.layers, args.hidden, args.vocabulary)
        AutoTokenizer.from_pretrained(DEMO).save_pretrained(base)  # vLLM wants one; nothing here is text
        adapters = make_adapters(base, Path(folder), 8, args.rank)
        engines = {}
        for name, section in sections.items():
            engines[name] = loop.run_until_complete(section.open(str(base)))
        for name in ("ftcore", "vLLM"):
            for digest, path in adapters.items():
                loop.run_until_complete(engines[name].load_adapter(digest, path))
        works = {name: Ours(engine, loop, args.prompt, args.tokens) for name, engine in engines.items()}
        bare, many = [""] * args.rows, [list(adapters)[row % 8] for row in range(args.rows)]
        cases = {
            "base only, ftcore": (works["ftcore"], bare),
            "base only, vLLM": (works["vLLM without LoRA"], bare),
            "8 adapters, ftcore": (works["ftcore"], many),
            "8 adapters, vLLM": (works["vLLM"], many),
        }
        found = in_turn(cases, args.rounds)
        for engine in engines.values():
            loop.run_until_complete(engine.close())
    return found


def is_ready(threads: int) -> bool:
    """Whether vLLM is here, and then told to use that many threads and to be quiet; otherwise it says what to do."""
    if importlib.util.find_spec("vllm") is None:
        print("vLLM is not installed here: run this with .venv-vllm/bin/python (make proof builds it)")
        return False
    os.environ |= {
        "OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": str(REPO),  # vLLM's processes import what this one does
    }  # fmt: skip
    warnings.simplefilter("ignore")
    return True


def main() -> int:
    args = parsed()
    if not is_ready(args.threads):
        return 0
    sys.path.insert(0, str(REPO))
    found = compare(args)
    print(f"{'':24}{'tokens/s':>9}{'of vLLM':>9}   ({args.rows} rows, {args.threads} threads, {args.dtype}, load {os.getloadavg()[0]:.0f})")
    for name, speeds in found.items():
        peers = found[name.replace("ftcore", "vLLM")]
        ratios = [ours / theirs for ours, theirs in zip(speeds, peers, strict=True)]
        print(f"{name:24}{statistics.median(speeds):9.0f}{statistics.median(ratios):8.2f}x")
    return 0


if __name__ == "__main__":
    sys.exit(main())
