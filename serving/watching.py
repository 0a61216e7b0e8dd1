"""Watching: a running server from outside. `ftcore adapters status URL` (or `ftcore serve --status URL`) tells who serves what;
`ftcore serve --top URL` shows what happens, live.

In: /status and /metrics of a server, by its metrics key (FTCORE_METRICS_KEY). Out: lines on the terminal; printed once where it is no
terminal. Runs in: a person's terminal.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from ftcore.adapters import split_ref
from ftcore.card import printable
from ftcore.errors import ConfigError, FtcoreError
from serving.top import Sample, frame

KEY = "FTCORE_METRICS_KEY"
CLEAR = "\x1b[H\x1b[2J"
TRIES = 20


def status_main(arguments: Sequence[str]) -> int:
    """`ftcore adapters status URL`"""
    parser = argparse.ArgumentParser(
        prog="ftcore adapters status", description=f"which replica serves which version, and what was refused; needs {KEY}"
    )
    parser.add_argument("url", metavar="URL", help="of a running server, like http://127.0.0.1:8000")
    return print_status(parser.parse_args(list(arguments)).url)


def print_status(url: str) -> int:
    print("\n".join(status_lines(json.loads(_fetched(url, "/status")))))
    return 0


def watch(url: str, every_s: float) -> int:
    """Shows the last `every_s` seconds again and again; once where nobody looks."""
    before = _sample(url)
    earlier = {before.ingress: before}
    while True:
        time.sleep(every_s)
        after = _sample(url)
        for _ in range(TRIES):  # one address may stand for several: what one counted is held against what the same one had counted before
            if after.ingress in earlier:
                break
            after = _sample(url)
        before = earlier.get(after.ingress, after)
        lines = "\n".join(frame(before, after))
        if not sys.stdout.isatty():
            print(lines)
            return 0
        print(f"{CLEAR}{lines}\n\nevery {every_s:g} s; Ctrl-C ends", flush=True)
        earlier[after.ingress] = after


def status_lines(status: dict[str, Any]) -> Iterator[str]:
    """Replicas with what they hold, names with what they mean and who holds it, refusals with their reasons."""
    replicas, desired = status["replicas"], status["desired"]
    several = len({state["base"] for state in replicas}) > 1
    for state in replicas:
        why = "; ".join(f"{name}: {_line(reason)}" for name, reason in state["missing"].items())
        mib = state["engine"]["adapter_bytes"] / 2**20
        said = f"not ready: {why}" if why else "ready"
        yield f"replica {state['number']}  {said}  ({state['base']}: {len(state['resident'])} versions, {mib:.1f} MiB)"
        for full, slot in sorted(state["resident"].items()):
            tenant, name, digest = split_ref(full)
            share = desired.get(f"{tenant}/{name}", {}).get(digest)
            word = "not current" if share is None else "current" if share == 1 else f"current {share:.0%}"
            yield f"  {_short(full):<44} {word:<12} loaded in {slot['load_s']:.2f} s, {slot['pins']} in use"
        for full, reason in sorted(state["refused"].items()):
            yield f"  {_short(full):<44} REFUSED      {_line(reason)}"
    yield "names"
    for name, targets in sorted(desired.items()):
        for digest, share in targets.items():
            homes = [str(state["number"]) for state in replicas if f"{name}@{digest}" in state["resident"]]
            base = status["bases"].get(f"{name}@{digest}")
            where = f"on replica {', '.join(homes)}" if homes else "loaded when it is asked for"
            where = "its base is not served here" if base == "" else f"{where}, of {base}" if base and several else where
            yield f"  {_short(f'{name}@{digest}'):<44} {share:>4.0%}         {where}"
    yield f"store: {_line(status['store'])}"


def _short(full: str) -> str:
    name, _, digest = full.partition("@")
    return printable(f"{name}@{digest[:12]}")


def _line(text: str) -> str:
    return printable(" ".join(text.split()))[:200]


def _sample(url: str) -> Sample:
    return Sample(time.monotonic(), _fetched(url, "/metrics").decode())


def _fetched(url: str, path: str) -> bytes:
    """Raises ConfigError for an address that is none, or a key that the server does not take; FtcoreError when it does not answer."""
    if urlsplit(url).scheme not in ("http", "https"):
        raise ConfigError("this is not a server's address", got=printable(url)[:200], wanted="http://host:port")
    key = os.environ.get(KEY, "")
    request = Request(url.rstrip("/").removesuffix("/v1") + path, headers={"authorization": f"Bearer {key}"} if key else {})
    try:
        with urlopen(request, timeout=10) as reply:
            body: bytes = reply.read()
            return body
    except HTTPError as error:
        with error:
            said = error.read(2000).decode(errors="replace")
        raise ConfigError(
            f"the server refuses ({error.code})", where=request.full_url, got=_line(said), remedy=f"set {KEY} to the metrics key"
        ) from error
    except (URLError, OSError) as error:
        raise FtcoreError("the server does not answer", where=request.full_url, got=str(error)[:200]) from error
