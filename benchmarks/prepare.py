"""Preparation: cold and cached against `datasets.map(num_proc=2)` on the same rows, and the peak memory at 1x and 10x rows.

    python benchmarks/prepare.py [--rows 20000] [--memory-rows 8000] [--skip speed|memory]

Every case is a process of its own, imports included. Cold: rows -> tokens with masks -> packed blocks on disk (ours: audited, deduplicated,
split, on Ray with 2 CPUs, and in one process); `datasets`: load_dataset + map(apply_chat_template), nothing packed. Memory: the highest
resident set (VmHWM) of the driver and of any Ray worker while the same recipe reads n and 10 n rows of about 2 KB. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

REPO = Path(__file__).resolve().parents[1]
VOCABULARY = 16_000
THEIRS = """
import sys, datasets
from transformers import AutoTokenizer
rows, model, cache = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model)
def encode(row):
    turns = [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
    return {"input_ids": tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)}
data = datasets.load_dataset("json", data_files=rows, split="train", cache_dir=cache)
data = data.map(encode, num_proc=2, remove_columns=data.column_names)
print(len(data))
"""


def make_rows(path: Path, count: int, words_a_row: int) -> Path:
    """Rows that all differ: words by Zipf's law over a made-up vocabulary."""
    random = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = np.array(["".join(random.choice(letters, random.integers(2, 9))) for _ in range(20_000)])
    with path.open("w") as file:
        for number in range(count):
            chosen = words[np.minimum(random.zipf(1.3, words_a_row) - 1, len(words) - 1)]
            cut = words_a_row // 5
            file.write(json.dumps({"instruction": f"{number} " + " ".join(chosen[:cut]), "output": " ".join(chosen[cut:])}) + "\n")
    return path


def make_tokenizer(folder: Path, rows: Path) -> Path:
    sys.path.insert(0, str(REPO))
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from tests.conftest import CHATML

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    with rows.open() as file:
        bpe.train_from_iterator((line for _, line in zip(range(2000), file, strict=False)), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


def make_recipe(path: Path, rows: Path, model: Path, engine: str) -> Path:
    data = {
        "sources": [str(rows)],
        "cache": str(path.parent / f"cache-{path.stem}"),
        "engine": engine,
        "max_length": 2048,
        "duplicates": "drop",
    }
    recipe = {"name": "bench", "model": {"path": str(model)}, "data": data, "method": "lora", "stage": "sft"}
    path.write_text(json.dumps(recipe))
    return path


def run(command: list[str], watch: dict[int, tuple[str, int]] | None = None) -> float:
    """Seconds a command takes. `watch` collects name and peak KiB of it and of every process under it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "FTCORE_LOCAL_CPUS": "2", "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    with subprocess.Popen(command, cwd=REPO, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        done = threading.Event()
        watcher = threading.Thread(target=_watch, args=(process.pid, watch, done)) if watch is not None else None
        if watcher:
            watcher.start()
        output = process.communicate()[0]
        done.set()
        if watcher:
            watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)[:200]}\n{output[-3000:]}")
    return time.perf_counter() - started


def _watch(root: int, found: dict[int, tuple[str, int]], done: threading.Event) -> None:
    while not done.wait(0.1):
        parents = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                status = (folder / "status").read_text()
                name = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            except OSError:
                continue  # it ended while we looked
            fields = dict(re.findall(r"^(PPid|VmHWM):\s+(\d+)", status, re.M))
            parents[int(folder.name)] = (int(fields["PPid"]), name, int(fields.get("VmHWM", 0)))
        for pid, (_, name, peak) in parents.items():
            ancestor = pid
            while ancestor not in (0, root):
                ancestor = parents.get(ancestor, (0, "", 0))[0]
            if ancestor == root:
                known, most = found.get(pid, ("", 0))
                found[pid] = (name if name.startswith("ray::") else known or name, max(peak, most))  # an ending process has no name


def speed(folder: Path, count: int) -> None:
    rows = make_rows(folder / "speed.jsonl", count, 100)
    model = make_tokenizer(folder / "model", rows)
    print(f"{count:,} rows, {rows.stat().st_size / 2**20:.1f} MiB, 2 CPUs; load average {os.getloadavg()[0]:.1f}\n")
    print(f"{'case':<40}{'cold s':>10}{'cached s':>10}")
    theirs = [sys.executable, "-c", THEIRS, str(rows), str(model), str(folder / "theirs")]
    print(f"{'datasets.map(num_proc=2), tokens only':<40}{run(theirs):>10.2f}{run(theirs):>10.2f}", flush=True)
    for engine, name in (("process", "ours, in one process"), ("ray", "ours, on a Ray started for it")):
        ours = [sys.executable, "-m", "pipelines.prepare", str(make_recipe(folder / f"{engine}.json", rows, model, engine))]
        print(f"{name:<40}{run(ours):>10.2f}{run(ours):>10.2f}", flush=True)


def memory(folder: Path, count: int) -> None:
    model = make_tokenizer(folder / "model", make_rows(folder / "sample.jsonl", 2000, 100))
    print(f"\n{'rows':>10}{'MiB':>8}{'seconds':>9}{'driver peak MiB':>17}{'worker peak MiB':>17}")
    peaks = []
    for times in (1, 10):
        rows = make_rows(folder / f"memory-{times}.jsonl", times * count, 350)
        watched: dict[int, tuple[str, int]] = {}
        seconds = run([sys.executable, "-m", "pipelines.prepare", str(make_recipe(folder / f"m{times}.json", rows, model, "ray"))], watched)
        driver = watched[min(watched)][1] / 1024  # the first of its tree, so the lowest process id
        worker = max(peak for name, peak in watched.values() if name.startswith("ray::")) / 1024
        peaks.append((driver, worker))
        print(f"{times * count:>10,}{rows.stat().st_size / 2**20:>8.0f}{seconds:>9.1f}{driver:>17.0f}{worker:>17.0f}", flush=True)
    print(f"{'10x / 1x':>27}{peaks[1][0] / peaks[0][0]:>17.2f}{peaks[1][1] / peaks[0][1]:>17.2f}   (goal <= 1.30)")


def main() -> None:
    parser = argparse.ArgumentParser(description="Preparation: speed and memory.")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--memory-rows", type=int, default=8_000)
    parser.add_argument("--skip", choices=("speed", "memory"))
    arguments = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="ftbench-") as name:
        if arguments.skip != "speed":
            speed(Path(name), arguments.rows)
        if arguments.skip != "memory":
            memory(Path(name), arguments.memory_rows)
    print(f"\nseed 0, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
