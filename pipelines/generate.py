"""Generate: answers of an adapter (or a bare base) to many rows, as Parquet; with Ray Data, one engine a worker.

    ray job submit --working-dir . -- python pipelines/generate.py acme/support s3://bucket/rows --out s3://bucket/answers

In: rows with `messages`, `conversations` or a `prompt` (a last answer is left out and made anew). Out: a sealed folder of Parquet files.
Runs in: the driver.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file: the rooms are siblings of this script's folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from ftcore.cli import guarded
from ftcore.engines.base import Sampling
from ftcore.engines.torch import Torch, add_base_options


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ftcore generate", description="answer many rows with an adapter, or a bare base, into Parquet")
    parser.add_argument("ref", metavar="REF", help="tenant/name, tenant/name@digest, or `base` for the bare --base")
    parser.add_argument("rows", metavar="ROWS", nargs="+", help="files, folders, s3:// or hf: sources")
    parser.add_argument("--out", required=True, help="a folder or fsspec path; the same command goes on where it was stopped")
    parser.add_argument("--base", default="", help="the base's folder or hub name; else the one that the adapter's card names")
    parser.add_argument("--store", default="adapters", help="the adapter store (default: adapters)")
    parser.add_argument("--max-tokens", type=int, default=256, help="of an answer (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (the default) takes the most likely token each time")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="the same answers to the same rows (default: 0)")
    parser.add_argument("--batch", type=int, default=16, help="answers made at once by a worker (default: 16)")
    parser.add_argument("--context", type=int, default=2048, help="tokens of prompt and answer at most (default: 2048)")
    parser.add_argument("--workers", type=int, default=1, help="engines at once, each with a copy of the base (default: 1)")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of each worker (default: 0)")
    add_base_options(parser)
    options = parser.parse_args(argv)
    from pipelines.generating import Wanted, generate

    sampling = Sampling(temperature=options.temperature, top_p=options.top_p, seed=options.seed)
    engine = Torch(max_batch=options.batch, max_context=options.context, dtype=options.dtype, quantise=options.quantise)
    ref = "" if options.ref == "base" else options.ref
    wanted = Wanted.of(ref, options.base, options.store, options.rows, options.out, engine, sampling, options.max_tokens)
    return generate(wanted, workers=options.workers, gpus=options.gpus)


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
