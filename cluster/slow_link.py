"""Slow link: a relay that hands every frame of one interface to another, some milliseconds later, both ways.

In: two interfaces, a delay. Out: the same frames. Runs in: a process of its own on the host; root (packet sockets).

Frames travel with their offload header (PACKET_VNET_HDR): checksums and segmentation that the sender left to the device stay valid.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import sys
import time
from collections import deque

SOL_PACKET, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 263, 15, 23
ETH_P_ALL = 3
MAX_FRAME_BYTES = 70_000


def main(argv: list[str]) -> int:
    relay(argv[0], argv[1], float(argv[2]) / 1000)
    return 0


def relay(one: str, other: str, delay_s: float) -> None:
    """Never returns."""
    ends = [_opened(one), _opened(other)]
    ways = [(ends[0], ends[1]), (ends[1], ends[0])]
    waiting: deque[tuple[float, socket.socket, bytes]] = deque()
    looking = selectors.DefaultSelector()
    for source, target in ways:
        looking.register(source, selectors.EVENT_READ, target)
    print("ready", flush=True)
    while True:
        timeout = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for key, _ in looking.select(timeout):
            frame = key.fileobj.recv(MAX_FRAME_BYTES)  # type: ignore[union-attr]
            waiting.append((time.monotonic() + delay_s, key.data, frame))
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, target, frame = waiting.popleft()
            with contextlib.suppress(OSError):  # a link that is down loses frames; so would a cable
                target.send(frame)


def _opened(interface: str) -> socket.socket:
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    end.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    end.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
    end.bind((interface, 0))
    return end


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
