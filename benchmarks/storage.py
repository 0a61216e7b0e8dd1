"""Storage: what a checkpoint on s3:// costs over the raw put: seconds to seal 100 MB and the requests it takes; what a bad network adds.

    python benchmarks/storage.py [--mb 100]        moto's server on loopback, as in the tests (FTCORE_S3_SERVER_PYTHON or .venv-s3)

In: nothing. Out: a table. The server is Python and shares the machine, so ratios say more than seconds.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run as a file: the rooms are siblings of this script's folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ftcore.rundir import RunDir, checkpoint_key
from ftcore.s3 import open_s3
from ftcore.storage import Folder
from tests.s3_faults import FaultyProxy, faulty_proxy, seeded
from tests.s3_server import credentials_file, make_bucket, moto_server, variables


def main() -> None:
    parser = argparse.ArgumentParser(description="What a checkpoint on s3:// costs.")
    parser.add_argument("--mb", type=int, default=100, help="size of the checkpoint's largest file")
    options = parser.parse_args()
    with moto_server() as endpoint, tempfile.TemporaryDirectory() as scratch, faulty_proxy(endpoint) as proxy:
        environment = variables(endpoint, credentials_file(Path(scratch)))
        os.environ.update(environment)
        bucket = make_bucket(endpoint)
        parts = {
            "weights.safetensors": os.urandom(options.mb << 20),
            "optimizer.safetensors": os.urandom(1 << 20),
            "state.json": b"{}" * 200,
        }
        local = Path(scratch) / "file"
        local.write_bytes(parts["weights.safetensors"])
        Folder(bucket).write("warm", b"x")
        run = RunDir(bucket, "run")
        raw, _ = timed(lambda: open_s3().pipe_file(f"{bucket.removeprefix('s3://')}/raw", parts["weights.safetensors"], chunksize=1 << 40))
        put, put_requests = timed(lambda: Folder(bucket).put(local, "put"))
        get, get_requests = timed(lambda: Folder(bucket).get("put", Path(scratch) / "back"))
        sealed, seal_requests = timed(lambda: seal(run, 1, parts))
        opened, open_requests = timed(lambda: opened_once(run, 1))
        tiny, tiny_requests = timed(lambda: seal(run, 2, {name: data[:1000] for name, data in parts.items()}))
        print(f"{'':44}seconds   of raw   requests")
        for label, seconds, requests in (
            (f"one put of {options.mb} MB", raw, Counter({"put_object": 1})), ("the same in parts", put, put_requests),
            ("and back", get, get_requests), ("checkpoint: hash, upload, seal, read back", sealed, seal_requests),
            ("checkpoint opened (verified copy)", opened, open_requests), ("checkpoint of 3 small files", tiny, tiny_requests),
        ):  # fmt: skip
            print(f"{label:44}{seconds:7.2f}{seconds / raw:8.1f}x   {sum(requests.values())} ({shown(requests)})")
        under_faults(proxy, bucket)


def under_faults(proxy: FaultyProxy, bucket: str) -> None:
    os.environ["AWS_ENDPOINT_URL"] = proxy.url
    for rate in (0.0, 0.1, 0.2):
        proxy.restart(seeded(rate, 0))
        seconds, _ = timed(
            lambda rate=rate: [seal(RunDir(bucket, f"rate-{rate}"), step, {"a": b"a" * 1000, "b": b"b"}) for step in range(5)]
        )
        met = sum(bool(request.fault) for request in proxy.seen)
        print(f"5 small checkpoints, {rate:.0%} of requests faulty   {seconds:7.2f} s, {len(proxy.seen)} requests, {met} faults")


def seal(run: RunDir, step: int, parts: dict[str, bytes]) -> None:
    with run.sealing(checkpoint_key(step)) as folder:
        for name, data in parts.items():
            (folder / name).write_bytes(data)


def opened_once(run: RunDir, step: int) -> None:
    with run.opened(checkpoint_key(step)):
        pass


def timed(action: Callable[[], object]) -> tuple[float, Counter[str]]:
    """(seconds, what was sent)."""
    fs = open_s3()
    before, started = fs.num_requests.copy(), time.perf_counter()
    action()
    return time.perf_counter() - started, fs.num_requests - before


def shown(requests: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in requests.most_common())


if __name__ == "__main__":
    main()
