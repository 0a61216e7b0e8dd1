"""Peak memory of the training loss at a 32k vocabulary: chunked against plain, forward and backward.

    python benchmarks/loss_memory.py [--tokens 4096] [--hidden 512] [--vocabulary 32000]

Each case is a process of its own; the figure is the peak resident memory over what the process held before the loss was computed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path


def peak_mib() -> float:
    """VmHWM, the process's peak resident memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def measure(case: str, args: argparse.Namespace) -> tuple[float, float]:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import torch

    from ftcore.losses import linear_cross_entropy, token_logps

    torch.manual_seed(0)
    torch.set_num_threads(1)
    hidden = torch.randn(args.tokens, args.hidden, requires_grad=True)
    weight = torch.randn(args.vocabulary, args.hidden, requires_grad=args.trained_head) * 0.05
    weight = weight.detach().requires_grad_(args.trained_head)
    targets = torch.randint(0, args.vocabulary, (args.tokens,))
    linear_cross_entropy(hidden[:16], weight, targets[:16]).backward()  # warm the allocator and libraries
    hidden.grad = weight.grad = None
    before, started = peak_mib(), time.perf_counter()
    if case == "chunked":
        total = linear_cross_entropy(hidden, weight, targets)
    elif case == "chunked, any head":
        total = -token_logps(hidden, lambda h: h @ weight.T, targets, args.vocabulary).sum()
    else:
        total = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    total.backward()
    return peak_mib() - before, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--trained-head", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(*measure(args.one, args))
        return
    head = "trained" if args.trained_head else "frozen"
    print(f"{args.tokens} tokens, hidden {args.hidden}, vocabulary {args.vocabulary}, fp32, head {head}")
    figures = {}
    for case in ("plain", "chunked", "chunked, any head"):
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--one", case], capture_output=True, text=True, check=True)
        figures[case] = [float(word) for word in done.stdout.split()]
        peak, seconds = figures[case]
        print(f"{case:<20}{peak:>9.0f} MiB  {peak / figures['plain'][0] - 1:>+7.0%}  {seconds:>6.2f} s")


if __name__ == "__main__":
    main()
