"""Token authentication: whether a cluster answers callers without a token, and whether ours is the right one, in milliseconds.

In: the address of a cluster's GCS. Out: nothing, or a ClusterError. Runs in: the driver, before Ray connects.

Who reaches an open cluster runs code on it. Ray itself tries a wrong token for 20 seconds and then says only that it cannot connect.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path

from ftcore.errors import ClusterError

ALLOW_OPEN = "FTCORE_ALLOW_OPEN_CLUSTER"
QUESTION = "/ray.rpc.NodeInfoGcsService/CheckAlive"
TIMEOUT_S = 5.0
HOW = "start every node with RAY_AUTH_MODE=token and one RAY_AUTH_TOKEN (`ray get-auth-token --generate`)"


def check_token(address: str, log: Callable[[str], None]) -> None:
    """Refuses an open cluster on another machine, and a token that this cluster does not take. `address` is host:port."""
    if is_open(address):
        if not is_this_machine(address):
            refuse_open(address, log)
    elif _is_refused(address, _our_token()):
        raise ClusterError(
            "this Ray cluster does not take our token", where=address, got="a token it does not know" if _our_token() else "no token",
            wanted="the token its nodes were started with", remedy="set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to it",
        )  # fmt: skip


def refuse_open(address: str, log: Callable[[str], None]) -> None:
    """Raises ClusterError for an open cluster, or only warns when the user said that this is what they want."""
    if os.environ.get(ALLOW_OPEN) == "1":
        log(f"warning: the Ray cluster at {address} takes anybody's code (no token authentication); {ALLOW_OPEN}=1 allows it")
        return
    raise ClusterError(
        "this Ray cluster is open: whoever reaches it runs code on it", where=address, got="no token authentication",
        wanted="RAY_AUTH_MODE=token on every node", remedy=f"{HOW}; or set {ALLOW_OPEN}=1 in a network that only you reach",
    )  # fmt: skip


def is_open(address: str) -> bool:
    """Whether the cluster answers a caller without a token."""
    return not _is_refused(address, "")


def is_loopback(address: str) -> bool:
    host = _host(address)
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def is_this_machine(address: str) -> bool:
    """Whether the address is one of this machine's own: only then can a socket be bound to it."""
    try:
        host = socket.gethostbyname(_host(address))
        with socket.socket() as door:
            door.bind((host, 0))
        return True
    except OSError:
        return False


def _host(address: str) -> str:
    return address.rpartition(":")[0].strip("[]")


def _is_refused(address: str, token: str) -> bool:
    """Whether the cluster takes a question with this token for one without the right."""
    try:
        import grpc  # a tenth of a second, which a Ray of our own need not wait for
    except ModuleNotFoundError as error:
        raise ClusterError(
            "a running cluster needs more of Ray than is installed", got="no grpcio", remedy="pip install 'ray[default]'"
        ) from error
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(QUESTION)(b"", timeout=TIMEOUT_S, metadata=metadata)
        except grpc.RpcError as error:
            return bool(error.code() == grpc.StatusCode.UNAUTHENTICATED)
    return False


def has_token() -> bool:
    """Whether Ray would find a token on this machine."""
    return bool(_our_token())


def _our_token() -> str:
    """Where Ray looks, in its order."""
    if token := os.environ.get("RAY_AUTH_TOKEN", ""):
        return token.strip()
    for path in (os.environ.get("RAY_AUTH_TOKEN_PATH", ""), str(Path.home() / ".ray" / "auth_token")):
        if path and Path(path).is_file():
            return Path(path).read_text(encoding="utf-8").strip()
    return ""
