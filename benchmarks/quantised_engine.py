"""What a base in 4 or 8 bits saves and costs in the torch engine: bytes of its layers, tokens a second of one row and of many adapters.

    python benchmarks/quantised_engine.py [--layers 4] [--hidden 512] [--rows 16] [--tokens 16] [--threads 1]

In: a base made here, an adapter a row. Out: a table, in fp32. Seconds are the processor's, so that what else runs on the machine counts
little; medians of `--rounds` rounds, the engines taking turns. On a CPU every step makes each layer's weights anew from their codes.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a benchmark runs from anywhere, so what it imports of ours comes after this

from multi_lora import Ours, make_adapters, make_base

from ftcore.engines.torch import Torch
from ftcore.layers.quantised import held_bytes
from ftcore.models import load_base
from ftcore.recipe import Model


def layer_bytes(base: Path, section: Torch) -> int:
    """Of everything but the embeddings (and the head, which is tied to them here)."""
    model = load_base(Model(path=str(base), dtype="fp32"), section.held_as)
    return sum(held_bytes(model)) - model.get_input_embeddings().weight.nbytes


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in (("layers", 4), ("hidden", 512), ("rows", 16), ("tokens", 16), ("prompt", 16), ("rounds", 5), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    loop = asyncio.new_event_loop()
    with tempfile.TemporaryDirectory() as scratch:
        base = make_base(Path(scratch) / "base", args.layers, args.hidden, 8000)
        adapters = make_adapters(base, Path(scratch), args.rows, 16)
        sections = {
            form: Torch(max_batch=args.rows, max_context=256, num_threads=args.threads, dtype="fp32", prefix_mib=0, quantise=form)
            for form in ("none", "int8", "nf4")
        }
        mib = {form: layer_bytes(base, section) / 2**20 for form, section in sections.items()}
        engines = {form: loop.run_until_complete(section.open(str(base))) for form, section in sections.items()}
        for engine in engines.values():
            for digest, folder in adapters.items():
                loop.run_until_complete(engine.load_adapter(digest, folder))
        rows = {"1 row": [""], f"{args.rows} rows": [""] * args.rows, f"{args.rows} adapters": list(adapters)}
        speeds: dict[tuple[str, str], list[float]] = {(form, what): [] for form in engines for what in rows}
        for turn in range(args.rounds + 1):
            for (form, what), found in speeds.items():
                started = time.process_time()
                Ours(engines[form], loop, args.prompt, args.tokens)(rows[what])
                if turn:
                    found.append(len(rows[what]) * args.tokens / (time.process_time() - started))
        for engine in engines.values():
            loop.run_until_complete(engine.close())
    print(f"{'base':<6} {'MiB':>8} {'share':>6}   " + "   ".join(f"{what:>18}" for what in rows))
    for form in engines:
        told = {what: statistics.median(speeds[form, what]) for what in rows}
        shares = (f"{told[what]:9.1f} ({told[what] / statistics.median(speeds['none', what]):.2f}x)" for what in rows)
        print(f"{form:<6} {mib[form]:8.1f} {mib[form] / mib['none']:6.3f}   " + "   ".join(f"{each:>18}" for each in shares))


if __name__ == "__main__":
    main()
