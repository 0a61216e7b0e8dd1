"""What serving with the vllm engine costs: output tokens/s of `ftcore serve` over those of vLLM's own OpenAI server, taking turns.

    .venv-vllm/bin/python benchmarks/vllm_serve.py [--clients 16] [--adapters 8] [--layers 8] [--hidden 512] [--tokens 48] [--haproxy]

Both servers run on this machine, with one base, the same adapters, batch, context, memory and compute threads; they are asked in turn.
Every client asks for one answer after another, each of its own prompt and an adapter in turn, streamed or whole. Plain vLLM is told of its
adapters as it starts; ours come from a store, proven by their probes. Every figure is the median of `--rounds` rounds. Goal: 0.97.

Needs an environment with vLLM (tests/vllm.txt; `make proof` builds .venv-vllm); elsewhere it says so and leaves.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
BASE = ROOT / "ftcore/demo/base"
GOAL, READY_S = 0.97, 400
NEVER_ENDS = dict.fromkeys(map(str, range(4)), -100)
"""logit_bias on the special tokens of the demo's tokenizer."""


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"clients": 16, "adapters": 8, "asks": 2, "layers": 8, "hidden": 512, "prompt": 32, "tokens": 48, "rank": 8}
    sizes |= {"rounds": 3, "threads": 1}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"({default})")
    parser.add_argument("--haproxy", action="store_true", help="in front of ours, in place of Ray Serve's own proxy")
    return parser.parse_args()


@dataclass(frozen=True)
class Server:
    """One that answers on this machine, and the key it wants."""

    port: int
    key: str

    def is_ready(self, model: str) -> bool:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {self.key}"})
            reply = connection.getresponse()
            return reply.status == 200 and f'"{model}"' in reply.read().decode()
        except OSError:
            return False
        finally:
            connection.close()

    async def ask(self, body: dict[str, object]) -> int:
        """Tokens of one answer, read to its end; little of the time is the client's."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        content = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {self.key}\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)
        reply = (await reader.read(-1)).decode()
        writer.close()
        counts = re.findall(r'"completion_tokens":\s*(\d+)', reply)
        if not reply.startswith("HTTP/1.1 200") or not counts:
            raise SystemExit(f"an answer failed: {reply[:600]}")
        return int(counts[-1])


@contextmanager
def running(command: list[str], server: Server, model: str, log: Path) -> Iterator[Server]:
    """The server while it lists the model; ended with the block."""
    with log.open("w") as lines, subprocess.Popen(command, stdout=lines, stderr=subprocess.STDOUT, cwd=log.parent) as process:
        deadline = time.monotonic() + READY_S
        try:
            while not server.is_ready(model):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"this server did not start: {' '.join(command)}\n{log.read_text()[-3000:]}")
                time.sleep(0.5)  # it compiles and loads: nothing tells when it is there but an answer
            yield server
        finally:
            process.terminate()
            process.wait(60)


def prepared(args: argparse.Namespace, home: Path) -> tuple[Path, dict[str, Path], str]:
    """(a base, adapter folders by name, a tenant's key); the adapters are in a store too, promoted."""
    from multi_lora import make_adapters, make_base
    from transformers import AutoTokenizer

    from ftcore.adapters import AdapterStore
    from ftcore.publish import import_adapter
    from ftcore.recipe import Model
    from serving.tenants import TenantStore

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    base = make_base(home / "base", args.layers, args.hidden, len(tokenizer))
    tokenizer.save_pretrained(base)
    folders = {f"a{i}": path for i, path in enumerate(make_adapters(base, home, args.adapters, args.rank).values())}
    store = AdapterStore(home / "adapters")
    for name, folder in folders.items():
        store.promote(import_adapter(folder, f"acme/{name}", Model(path=str(base), dtype="fp32"), store, log=lambda _: None))
    tenants = TenantStore(str(home / "tenants"))
    tenants.add("acme")
    return base, folders, tenants.new_key("acme")[0]


def commands(args: argparse.Namespace, base: Path, folders: dict[str, Path], home: Path, ports: list[int]) -> dict[str, list[str]]:
    ours = {
        "base": base, "store": home / "adapters", "tenants": home / "tenants", "port": ports[0], "preload": "all",
        "haproxy": str(args.haproxy).lower(), "engine.kind": "vllm", "engine.dtype": "fp32", "engine.max_batch": args.clients,
        "engine.max_context": 512, "engine.kv_cache_mib": 256, "engine.max_loras": args.adapters, "engine.max_cpu_loras": args.adapters,
        "engine.max_rank": args.rank,
    }  # fmt: skip
    plain = {
        "model": base, "served-model-name": "base", "port": ports[1], "dtype": "float32", "max-num-seqs": args.clients,
        "max-model-len": 512, "kv-cache-memory-bytes": 256 << 20, "max-loras": args.adapters, "max-cpu-loras": args.adapters,
        "max-lora-rank": args.rank,
    }  # fmt: skip
    api = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enable-lora", "--disable-uvicorn-access-log"]
    told = ["--lora-modules", *(f"{name}={folder}" for name, folder in folders.items())]
    return {
        "ftcore serve": [sys.executable, "-m", "ftcore.cli", "serve", *(f"{key}={value}" for key, value in ours.items())],
        "plain vLLM": [*api, *(word for key, value in plain.items() for word in (f"--{key}", str(value))), *told],
    }


async def tokens_a_second(server: Server, args: argparse.Namespace, turn: int, stream: bool) -> float:
    options: dict[str, object] = {"max_tokens": args.tokens, "temperature": 0, "logit_bias": NEVER_ENDS}
    if stream:
        options |= {"stream": True, "stream_options": {"include_usage": True}}

    async def client(number: int) -> int:
        total = 0
        for ask in range(args.asks):
            first = 31 * turn + 7 * ask + 3 * number
            prompt = [(first * 13 + i * i) % 1000 + 10 for i in range(args.prompt)]
            total += await server.ask({"model": f"a{(number + ask) % args.adapters}", "prompt": prompt, **options})
        return total

    started = time.perf_counter()
    total = sum(await asyncio.gather(*map(client, range(args.clients))))
    took = time.perf_counter() - started
    if total != args.clients * args.asks * args.tokens:
        raise SystemExit(f"answers of another length: {total} tokens")
    return total / took


def main() -> int:
    from vllm_cpu import is_ready

    args = parsed()
    if not is_ready(args.threads):
        return 0
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    from tests.serve_command import free_port

    found: dict[tuple[bool, str], list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="vllm-serve-") as folder:
        home = Path(folder)
        base, folders, key = prepared(args, home)
        ports = [free_port(), free_port()]
        ours, plain = commands(args, base, folders, home, ports).values()
        with (
            running(ours, Server(ports[0], key), "a0", home / "ours.log") as first,
            running(plain, Server(ports[1], key), "a0", home / "plain.log") as second,
        ):
            for turn in range(args.rounds + 1):
                for stream in (True, False):
                    for name, server in (("ftcore serve", first), ("plain vLLM", second)):
                        speed = asyncio.run(tokens_a_second(server, args, turn, stream))
                        if turn:  # the first one warms up
                            found.setdefault((stream, name), []).append(speed)
    print(f"{'':24}{'tokens/s':>9}{'of plain':>10}   ({args.clients} clients, {args.adapters} adapters, ", end="")
    print(f"{args.threads} threads, fp32, {'HAProxy' if args.haproxy else 'Serve proxy'}, load {os.getloadavg()[0]:.0f})")
    for (stream, name), speeds in found.items():
        ratios = [ours / theirs for ours, theirs in zip(speeds, found[stream, "plain vLLM"], strict=True)]
        goal = f"   goal {GOAL}" if name == "ftcore serve" else ""
        print(f"{'streamed' if stream else 'whole':10}{name:14}{statistics.median(speeds):9.0f}{statistics.median(ratios):9.2f}x{goal}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
