"""An open cluster beyond this machine is refused; a wrong token is said at once. Asked of a real gRPC server."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from cluster import token_auth
from cluster.token_auth import ALLOW_OPEN, check_token, is_loopback, is_open, is_this_machine
from ftcore.errors import ClusterError

TOKEN = "a" * 64


class Gcs(grpc.GenericRpcHandler):
    """Answers like Ray's: everything to whoever has the token, or to everybody when it wants none."""

    def __init__(self, token: str) -> None:
        self.token = token

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        welcome = not self.token or ("authorization", f"Bearer {self.token}") in list(details.invocation_metadata)

        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            if not welcome:
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


def serving(token: str) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((Gcs(token),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.fixture
def closed() -> Iterator[str]:
    yield from serving(TOKEN)


@pytest.fixture
def wide_open() -> Iterator[str]:
    yield from serving("")


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_auth, "is_this_machine", lambda address: False)


@pytest.fixture(autouse=True)
def own_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.delenv(ALLOW_OPEN, raising=False)


def test_a_cluster_that_takes_our_token_is_joined(closed: str, elsewhere: None) -> None:
    assert not is_open(closed)
    check_token(closed, print)


def test_a_wrong_token_is_said_before_ray_tries_it_for_twenty_seconds(closed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "b" * 64)
    with pytest.raises(ClusterError, match="does not take our token") as refused:
        check_token(closed, print)
    assert "b" * 64 not in str(refused.value)


def test_an_open_cluster_on_another_machine_is_refused(wide_open: str, elsewhere: None) -> None:
    with pytest.raises(ClusterError, match="whoever reaches it runs code on it") as refused:
        check_token(wide_open, print)
    assert ALLOW_OPEN in refused.value.remedy and "RAY_AUTH_MODE=token" in refused.value.remedy


def test_an_open_cluster_is_joined_with_a_warning_where_the_user_says_so(
    wide_open: str, elsewhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ALLOW_OPEN, "1")
    said: list[str] = []
    check_token(wide_open, said.append)
    assert said and said[0].startswith("warning: ")


def test_an_open_cluster_on_this_machine_alone_is_nobody_elses(wide_open: str) -> None:
    check_token(wide_open, print)


def test_addresses_of_this_machine_are_known() -> None:
    assert is_this_machine("127.0.0.1:1") and not is_this_machine("203.0.113.7:6379") and not is_this_machine("no.such.host.invalid:1")
    assert is_loopback("127.0.0.1:1") and is_loopback("[::1]:1") and is_loopback("localhost:1") and not is_loopback("10.0.0.2:1")
