"""The network of several nodes on one machine, without Ray: addresses, links that are cut, limited and delayed, nothing left behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import bridge
from cluster.bridge import Bridge, remove_leftovers
from cluster.loopback import Loopback
from cluster.netns import NetnsCluster, main
from ftcore.errors import ClusterError

REASON = bridge.why_not()
needs_namespaces = pytest.mark.skipif(bool(REASON), reason=f"no network namespaces here: {REASON}")
SERVER = """
import socket, sys, threading
def answer(caller):
    while part := caller.recv(1 << 16):
        if part.endswith(b"!"): caller.send(b"k")
server = socket.create_server((sys.argv[1], 5000)); print("up", flush=True)
while True: threading.Thread(target=answer, args=server.accept()[:1], daemon=True).start()
"""
CALL = """
import socket, sys, time
caller = socket.create_connection((sys.argv[1], 5000), timeout=float(sys.argv[3]))
caller.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
for size in (1, 1, int(sys.argv[2])):
    began = time.monotonic(); caller.sendall(b"x" * (size - 1) + b"!"); caller.settimeout(60); caller.recv(1)
    print(time.monotonic() - began)
"""


@pytest.fixture(scope="module")
def pair() -> Iterator[Bridge]:
    """Two nodes; node 0 answers."""
    network = Bridge()
    try:
        for node in range(2):
            network.add(node)
        server = subprocess.Popen([*network.inside(0), sys.executable, "-c", SERVER, network.address(0)], stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None and server.stdout.readline() == "up\n"
        yield network
    finally:
        network.close()
        server.communicate()


def call(network: Bridge, size: int = 1, within_s: float = 60) -> tuple[float, float]:
    """(seconds there and back, seconds for `size` bytes) from node 1 to node 0. Raises ConnectionError when nobody is reached."""
    words = [*network.inside(1), sys.executable, "-c", CALL, network.address(0), str(size), str(within_s)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConnectionError(done.stderr)
    _, there_and_back, sent = map(float, done.stdout.split())
    return there_and_back, sent


@needs_namespaces
def test_nodes_reach_each_other_by_their_own_addresses(pair: Bridge) -> None:
    assert pair.address(0) != pair.address(1)
    assert any(call(pair)[0] < 0.05 for _ in range(30))


@needs_namespaces
def test_a_cut_link_reaches_nobody_until_it_is_restored(pair: Bridge) -> None:
    pair.cut(1)
    with pytest.raises(ConnectionError, match=r"timed out|unreachable"):
        call(pair, within_s=2)
    pair.restore(1)
    call(pair)


@needs_namespaces
def test_a_limited_link_takes_as_long_as_its_rate_says(pair: Bridge) -> None:
    pair.limit(1, mbit=8)
    seconds = call(pair, size=1 << 20)[1]
    pair.restore(1)
    assert 0.7 < seconds < 20, "a mebibyte at a mebibyte a second"
    assert any(call(pair, size=1 << 20)[1] < 0.5 for _ in range(30))


@needs_namespaces
def test_a_delayed_link_is_late_each_way_and_delivers_everything(pair: Bridge) -> None:
    pair.delay(1, milliseconds=30)
    late = call(pair, size=1 << 20)[0]
    pair.restore(1)
    assert 0.055 < late < 20
    assert any(call(pair)[0] < 0.05 for _ in range(30))


@needs_namespaces
def test_two_networks_stand_side_by_side() -> None:
    one, other = Bridge(), Bridge()
    try:
        assert one.subnet != other.subnet and one.owner != other.owner
    finally:
        one.close()
        other.close()


@needs_namespaces
def test_what_a_killed_owner_left_behind_is_removed_by_the_next() -> None:
    code = (
        "import os, subprocess\nfrom cluster.bridge import Bridge\n"
        "b = Bridge(); b.add(0); subprocess.Popen([*b.inside(0), 'sleep', '600'], stdout=subprocess.DEVNULL)\n"
        "while not b.pids(0): pass\n"
        "print(b.pids(0)[0], b.owner, flush=True); os.kill(os.getpid(), 9)"
    )
    dead = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False)
    sleeper, owner = dead.stdout.split()
    assert Path(f"/run/netns/{owner}-0").exists() and dead.returncode == -signal.SIGKILL
    assert owner in remove_leftovers()
    assert not Path(f"/run/netns/{owner}-0").exists() and not Path(f"/sys/class/net/{owner}b").exists()
    status = Path(f"/proc/{sleeper}/stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"  # dead; nobody may have asked for its exit code yet


def test_on_the_fallback_a_link_cannot_be_cut_and_this_is_said() -> None:
    with pytest.raises(ClusterError, match="share one address space"):
        Loopback().cut(0)


def test_the_fallback_finds_a_nodes_processes_by_their_mark() -> None:
    network = Loopback()
    sleeper = subprocess.Popen([*network.inside(1), "sleep", "600"])
    try:
        while not network.pids(1):
            assert sleeper.poll() is None
        assert (network.pids(0), network.pids(1)) == ([], [sleeper.pid])
        network.kill(1)
        assert sleeper.wait(10) == -signal.SIGKILL
    finally:
        sleeper.kill()
        sleeper.wait()


def test_a_node_that_does_not_start_says_why_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NetnsCluster, "_start_words", lambda self, node: ["sh", "-c", "echo the disk is full; exit 3"])
    cluster = NetnsCluster(1, log=lambda line: None)
    with pytest.raises(ClusterError, match="the disk is full"):
        cluster.start()
    assert not cluster.folder.exists() and not Path(f"/sys/class/net/{cluster.network.owner}b").exists()


def test_the_command_hands_on_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NetnsCluster, "_start_words", lambda self, node: ["true"])
    assert main(["--nodes", "2", "--", "sh", "-c", 'test -n "$RAY_ADDRESS$RAY_AUTH_TOKEN" && exit 5']) == 5
